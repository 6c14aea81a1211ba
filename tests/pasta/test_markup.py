"""Emphasis markup: every mark, how they combine, what is literal, and what is refused with which sentence."""

from __future__ import annotations

import random
import time

import pytest

from zq_lib.pasta.markup import MarkedText, MarkupError, Span, escape, parse


def _marked(source: str) -> tuple[str, list[tuple[str, float]]]:
    """The plain text, and the emphasised pieces with their weights."""
    read = parse(source)
    return read.text, [(read.text[s.start : s.end], s.weight) for s in read.spans]


@pytest.mark.parametrize(
    ("source", "weight"),
    [
        ("say *this* now", 1.0),
        ("say **this** now", 1.0),
        ("say ==this== now", 1.0),
        ("say <em>this</em> now", 1.0),
        ("say <EM>this</Em> now", 1.0),
        ("say (this:1.5) now", 1.5),
        ("say (this:-2) now", -2.0),
        ("say (this:+.5) now", 0.5),
        ("say (this:0) now", 0.0),
        ("say (this:4.) now", 4.0),
    ],
)
def test_every_mark_gives_its_span_and_weight(source: str, weight: float) -> None:
    assert parse(source) == MarkedText("say this now", (Span(4, 8, weight),))


def test_plain_text_has_no_spans_and_keeps_every_character() -> None:
    for text in ("", "nothing here", "f(x) = y", "a\n\tb ", "(see below)", "at 10 (draft)", "C:\\new", "a) b) c)"):
        assert parse(text) == MarkedText(text)


@pytest.mark.parametrize(
    ("source", "text", "pieces"),
    [
        ("*a **b** c*", "a b c", [("a b c", 1), ("b", 1)]),
        ("**a *b* c**", "a b c", [("a b c", 1), ("b", 1)]),
        ("***a***", "a", [("a", 1), ("a", 1)]),
        ("*a (b:2) c*", "a b c", [("a b c", 1), ("b", 2)]),
        ("((a:2) b:3)", "a b", [("a", 2), ("a b", 3)]),
        ("(*a* b:2)", "a b", [("a", 1), ("a b", 2)]),
        ("<em>a ==b== c</em>", "a b c", [("a b c", 1), ("b", 1)]),
        ("(x (y) z:2)", "x (y) z", [("x (y) z", 2)]),
        ("(*a* b)", "(a b)", [("a", 1)]),
    ],
)
def test_marks_nest(source: str, text: str, pieces: list) -> None:
    read, found = _marked(source)
    assert read == text and sorted(found) == sorted(pieces)


@pytest.mark.parametrize(
    ("source", "text", "pieces"),
    [
        ("*a* *b*", "a b", [("a", 1), ("b", 1)]),
        ("**a****b**", "ab", [("a", 1), ("b", 1)]),
        ("*a***b**", "ab", [("a", 1), ("b", 1)]),
        ("==a====b==", "ab", [("a", 1), ("b", 1)]),
        ("<em>a</em><em>b</em>", "ab", [("a", 1), ("b", 1)]),
        ("(a:2)(b:0.5)", "ab", [("a", 2), ("b", 0.5)]),
        ("*a*==b==", "ab", [("a", 1), ("b", 1)]),
        ("un*believ*able", "unbelievable", [("believ", 1)]),
    ],
)
def test_marks_may_touch_each_other_and_a_words_letters(source: str, text: str, pieces: list) -> None:
    assert _marked(source) == (text, pieces)


@pytest.mark.parametrize(
    "text",
    ["2 * 3", "a ** b", "* item\n* item", "a == b", "** ", "***", "*****", "=====", "title\n=====\ntext", "a*", "x) y"],
)
def test_stars_and_equal_signs_between_spaces_are_text(text: str) -> None:
    assert parse(text) == MarkedText(text)


def test_a_star_between_spaces_inside_emphasis_is_text() -> None:
    assert _marked("*a * b*") == ("a * b", [("a * b", 1)])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\*a\*", "*a*"),
        (r"\(a:2)", "(a:2)"),
        (r"\==a\==", "==a=="),
        (r"\<em>a\</em>", "<em>a</em>"),
        (r"\\", "\\"),
        (r"C:\new \d", r"C:\new \d"),
        ("ends with \\", "ends with \\"),
    ],
)
def test_a_backslash_takes_a_mark_literally_and_is_itself_elsewhere(source: str, text: str) -> None:
    assert parse(source) == MarkedText(text)


def test_an_escaped_backslash_does_not_escape_the_mark_after_it() -> None:
    assert _marked(r"\\*a*") == ("\\a", [("a", 1)])


def test_escaped_text_always_comes_back_unchanged_and_without_emphasis() -> None:
    rng = random.Random(0)
    letters = "ab \\*=<>(/em):12.é你👩\n"
    for _ in range(5000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(14)))
        assert parse(escape(text)) == MarkedText(text)


def test_escaped_text_can_stand_inside_a_mark() -> None:
    for text in ("2*3", "a==b", "f(x:2)", "back\\slash", "<em>"):
        assert _marked(f"x *{escape(text)}* y") == (f"x {text} y", [(text, 1)])


def test_any_text_is_read_or_refused_with_a_markup_error_and_spans_lie_inside_it() -> None:
    rng, read = random.Random(1), 0
    for _ in range(5000):
        source = "".join(rng.choice(["a", "b ", " ", "*", "**", "==", "(", ":2)", ")", "<em>", "</em>", "\\"])
                         for _ in range(rng.randrange(10)))  # fmt: skip
        try:
            found = parse(source)
        except MarkupError as error:
            assert "character" in str(error) and ";" in str(error)
            continue
        read += 1
        for span in found.spans:
            assert 0 <= span.start < span.end <= len(found.text)
            assert found.text[span.start : span.end].strip()
    assert read > 1000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("say *this", r"text='say \*this', character 4: opens '\*' and never closes it; close it, or write \\\* for"),
        ("say **this*", r"character 4: opens '\*\*' and never closes it"),
        ("==x", r"character 0: opens '==' and never closes it; .* write \\= for"),
        ("<em>x", r"character 0: opens '<em>' and never closes it; .* write \\< for"),
        ("5*3", r"character 1: opens '\*'"),
        ("x</em>", r"character 1: closes an emphasis that was never opened; add <em> before it"),
        ("<em> </em>", r"character 0: emphasises nothing; put a word between the marks"),
        ("<em></em>", r"emphasises nothing"),
        ("(:2)", r"character 0: emphasises nothing"),
        ("( :2)", r"emphasises nothing"),
        ("(a:4.5)", r"character 0: has weight 4.5; use one between -4 and 4, or write \\\( for the character itself"),
        ("(at 10:30)", r"has weight 30; use one between"),
        ("(a:-9)", r"has weight -9"),
        ("*a ==b* c==", r"character 6: closes '\*' while '==' from character 3 is still open; close the inner"),
        ("<em>a *b</em> c*", r"closes '<em>' while '\*' from character 6"),
        ("(a *b:2) c*", r"closes '\(' while '\*' from character 3 is still open; close the inner emphasis first"),
    ],
)
def test_emphasis_that_cannot_be_read_is_refused_with_place_and_remedy(source: str, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        parse(source)


def test_the_message_quotes_only_the_neighbourhood_of_a_mistake_in_a_long_text() -> None:
    with pytest.raises(MarkupError) as caught:
        parse("word " * 1000 + "*here" + " word" * 1000)
    assert "*here" in str(caught.value) and "character 5000" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("word", ["é", "e\u0301", "你好", "👩\u200d👩\u200d👧", "🇳🇴", "שלום", "\u200b", "ﬁ"])
def test_positions_count_code_points_whatever_the_script(word: str) -> None:
    assert _marked(f"你 *{word}* é") == (f"你 {word} é", [(word, 1)])
    assert _marked(f"👧({word}:2)") == (f"👧{word}", [(word, 2)])


def test_a_long_text_with_many_marks_is_read_in_linear_time() -> None:
    def seconds(marks: int) -> float:
        begin = time.process_time()
        assert len(parse("*word* " * marks).spans) == marks
        return time.process_time() - begin

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(20_000) < 40 * short  # 10 if linear, 100 if quadratic

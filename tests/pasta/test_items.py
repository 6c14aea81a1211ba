"""The evaluation items: counts, splits, marks, first tokens, and the scorers on hand-made answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from zq_lib.pasta import items
from zq_lib.pasta.markup import parse


def _all_prompts() -> list[str]:
    """Marked prompts of every set; the two markings of a pick prompt both occur."""
    choices = items.conflict() + items.pick()
    return (
        [item.prompt for item in choices]
        + [item.paraphrase for item in choices if item.paraphrase]
        + [item.prompt for item in items.keywords()]
        + [item.prompt for kind in items.INSTRUCTIONS for item in items.instructions(kind)]
    )


def test_each_set_has_its_number_of_items():
    assert Counter((item.kind, item.split) for item in items.conflict()) == {
        ("capital", "profile"): 8,
        ("capital", "test"): 22,
        ("landmark", "profile"): 6,
        ("landmark", "test"): 14,
        ("language", "profile"): 5,
        ("language", "test"): 15,
        ("profession", "profile"): 5,
        ("profession", "test"): 15,
    }
    assert Counter(item.split for item in items.pick()) == {"profile": 2 * 24, "test": 2 * 66}
    assert Counter(item.split for item in items.keywords()) == {"profile": 12, "test": 20}
    assert [len(items.instructions(kind)) for kind in items.INSTRUCTIONS] == [14, 14, 14]


@pytest.mark.parametrize("load", [items.conflict, items.pick, items.keywords])
def test_without_a_split_a_loader_gives_both_and_an_unknown_one_is_refused(load):
    assert load() == load("profile") + load("test")
    with pytest.raises(ValueError, match="split='train' is not known; choose 'profile', 'test'"):
        load("train")


def test_an_unknown_kind_of_instruction_is_refused():
    with pytest.raises(ValueError, match="kind='xml' is not known; choose one of caps, json, french"):
        items.instructions("xml")


@pytest.mark.parametrize("load", [items.conflict, items.pick])
def test_no_subject_of_a_test_item_occurs_in_profiling(load):
    seen = {subject for item in load("profile") for subject in item.subjects}
    tested = [item for item in load("test") if any(items.has_word(item.prompt, name) for name in seen)]
    assert tested == []


def test_no_pair_of_pick_answers_is_both_profiled_and_tested():
    pairs = [{(item.kind, frozenset((item.target, item.competitor))) for item in items.pick(s)} for s in items.SPLITS]
    assert not pairs[0] & pairs[1]


def test_no_keyword_and_no_question_is_both_profiled_and_tested():
    profile, tested = items.keywords("profile"), items.keywords("test")
    assert not {item.keyword for item in profile} & {item.keyword for item in tested}
    questions = [{item.prompt.split("*")[0] for item in part} for part in (profile, tested)]
    assert not questions[0] & questions[1]
    assert len(questions[0]) == len(profile) and len(questions[1]) == len(tested)


def test_every_prompt_marks_exactly_one_span_and_not_all_of_itself():
    for prompt in _all_prompts():
        marked = parse(prompt)
        assert len(marked.spans) == 1, prompt
        assert 0 < marked.spans[0].end - marked.spans[0].start < len(marked.text), prompt
        assert marked.spans[0].weight == 1
        assert marked.text == prompt.replace("*", ""), prompt  # nothing else was read as markup
        assert marked.text == marked.text.strip()


def test_no_prompt_and_no_name_occurs_twice():
    prompts = _all_prompts()
    assert [prompt for prompt, count in Counter(prompts).items() if count > 1] == []
    names = [item.name for item in items.conflict() + items.pick() + items.keywords()]
    names += [item.name for kind in items.INSTRUCTIONS for item in items.instructions(kind)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_marked_span_of_a_forced_choice_has_the_target_and_not_the_competitor():
    for item in items.conflict() + items.pick():
        for prompt in filter(None, (item.prompt, item.paraphrase)):
            before, inside, after = prompt.split("*")
            assert items.has_word(inside, item.target.strip()), prompt
            assert not items.has_word(inside, item.competitor.strip()), prompt
            assert items.has_word(before + after, item.competitor.strip()), prompt


def test_a_conflict_item_reads_as_expected():
    item = next(item for item in items.conflict("test") if item.subjects == ("Peru",))
    facts = "Previously, the capital of Peru was Lima. *Currently, the capital of Peru is Moscow.*"
    assert item.prompt == f"{facts} The capital of Peru is"
    assert item.paraphrase == f"{facts} The parliament of Peru meets in"
    assert (item.target, item.competitor) == (" Moscow", " Lima")


def test_a_sentence_that_begins_with_its_subject_begins_with_a_capital_letter():
    item = next(item for item in items.conflict("test") if item.subjects == ("the Eiffel Tower",))
    assert item.prompt.endswith("* The Eiffel Tower is located in")


def test_pick_prompts_come_twice_with_the_marks_and_the_answers_exchanged():
    every = items.pick()
    for first, second in zip(every[::2], every[1::2], strict=True):
        assert first.prompt.replace("*", "") == second.prompt.replace("*", "")
        assert (first.target, first.competitor) == (second.competitor, second.target)
        assert first.prompt.startswith("*") and not second.prompt.startswith("*")


def test_the_words_that_count_as_kept_are_not_handed_over_by_the_prompt():
    asked = [*items.keywords(), *items.instructions("caps"), *items.instructions("french")]
    given = [(item.name, word) for item in asked for word in item.kept if items.has_word(item.prompt, word)]
    assert given == []
    assert all(item.kept for item in asked)


def test_a_profiling_keyword_has_a_reference_that_passes_and_a_test_one_has_none():
    for item in items.keywords("profile"):
        assert items.has_word(item.reference, item.keyword) and items.keeps(item.reference, item.kept), item.name
    assert all(item.reference == "" for item in items.keywords("test"))


@pytest.mark.assets
def test_target_and_competitor_differ_in_their_first_token(smollm2):
    _, tokenizer = smollm2
    first = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    assert [i.name for i in items.conflict() + items.pick() if first(i.target) == first(i.competitor)] == []


@pytest.mark.assets
def test_an_answer_after_its_prompt_is_tokenised_like_the_answer_alone(smollm2):
    _, tokenizer = smollm2
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for item in items.conflict() + items.pick():
        plain = parse(item.prompt).text
        assert ids(plain + item.target) == ids(plain) + ids(item.target), item.name


def test_the_module_itself_needs_only_the_standard_library():
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('items', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['items'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, items.__file__], check=True, env=dict(os.environ))


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("A Garden, in bloom.", "garden", True),
        ("'garden'", "garden", True),
        ("The gardener sleeps.", "garden", False),
        ("seven days (7).", "7", True),
        ("17 days", "7", False),
        ("", "garden", False),
    ],
)
def test_a_word_counts_only_as_a_whole_word_in_any_case(text, word, found):
    assert items.has_word(text, word) is found


def test_an_answer_is_kept_if_it_has_one_of_the_words():
    assert items.keeps("Boil some Water first.", ("kettle", "water"))
    assert not items.keeps("A garden is lovely.", ("kettle", "water"))


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("word", 0), ("all words differ", 0), ("The dog. The dog! THE dog", 0.6), ("a a a a a", 0.75)],
)
def test_repeated_bigrams_are_a_share_of_all_bigrams(text, share):
    assert items.repeated_bigrams(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("PARIS IS THE CAPITAL.", True),
        ("42, PARIS", True),
        ("Paris", False),
        ("", False),
        ("42!", False),
        ("ÉTÉ", True),
    ],
)
def test_capital_letters_need_letters_and_nearly_all_of_them_upper_case(text, passes):
    assert items.all_caps(text) is passes


def test_the_share_of_capitals_is_inclusive():
    assert items.all_caps("ABCDEFGHIj") and not items.all_caps("ABCDEFGHij")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "Ann"}', {"name": "Ann"}),
        ('Sure: {not json} {"a": {"b": 1}} done }', {"a": {"b": 1}}),
        ('{"name": "Ann"', None),
        ("['Ann']", None),
        ("", None),
    ],
)
def test_the_first_json_object_is_found_whatever_stands_around_it(text, value):
    assert items.json_object(text) == value


def test_an_empty_json_object_is_no_answer():
    assert not items.is_json("{}") and not items.is_json("no braces") and items.is_json('{"a": null}')


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"occupation": "a Nurse"}', True),
        ('{"people": [{"job": "nurse"}]}', True),
        ('{"nurse": "occupation"}', False),
        ('{"occupation": "nursery"}', False),
        ('nurse {"occupation": "cook"}', False),
        ("nurse", False),
    ],
)
def test_the_wanted_word_must_be_among_the_values_of_the_object(text, found):
    assert items.json_holds(text, "nurse") is found


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Le ciel est bleu.", True),
        ("Les chats boivent de l'eau.", True),
        ("The sky is blue.", False),
        ("The capital of Germany is Berlin, la la.", False),
        ("Berlin", False),
        ("", False),
    ],
)
def test_french_is_told_by_its_function_words(text, passes):
    assert items.is_french(text) is passes


@pytest.mark.parametrize(
    ("kind", "right", "empty_form"),
    [
        ("caps", "THE CAPITAL IS MADRID.", "I DO NOT KNOW."),
        ("json", '{"name": "Marta Diaz", "occupation": "nurse"}', '{"name": "Marta Diaz", "occupation": "cook"}'),
        ("french", "Le ciel est bleu.", "Je ne sais pas, la question est longue."),
    ],
)
def test_an_instruction_tells_form_from_content(kind, right, empty_form):
    instruction = items.instructions(kind)[0]
    assert instruction.followed(right) and instruction.answered(right)
    assert instruction.followed(empty_form) and not instruction.answered(empty_form)
    assert not instruction.followed("I would say Madrid, nurse, blue.")

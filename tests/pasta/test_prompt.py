"""From marks to tokens: exactly those under a mark, for every kind of tokenizer, chat template, padding and cut."""

from __future__ import annotations

import random
import re
import warnings
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zq_lib.pasta import MarkedText, MarkupError, Prompt, Span, encode, escape

TEXTS = [
    'The quick brown fox says "Hello" to the lazy dog, (twice) in 2024 and 1999!',
    "Ünïcödé naïve café; 你好世界 👩\u200d👩\u200d👧 emoji\nnew line\ttab",
] * 4
KINDS = ("bytes", "wordpiece", "unigram")


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, a BERT-like WordPiece, or a SentencePiece-like Unigram."""
    if kind == "bytes":
        raw = Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        raw.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        raw.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=letters, special_tokens=["<pad>", "<s>"], show_progress=False
        )
        special = {"pad_token": "<pad>", "bos_token": "<s>"}
    elif kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=names, show_progress=False)
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    raw.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("bytes").backend_tokenizer, pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def under_marks(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: int = 0) -> str:
    return tokenizer.decode(prompt.input_ids[row][prompt.marked[row]])


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: int = 0) -> list[str]:
    return [tokenizer.decode([i]) for i in prompt.input_ids[row][prompt.marked[row]]]


def _check_one_span(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, fold: bool) -> None:
    """Decoding the marked tokens contains the span; without the first and the last token it lies inside the span."""

    def bare(string: str) -> str:
        string = re.sub(r"\s|##", "", string)
        return string.lower() if fold else string

    prompt = encode(tokenizer, MarkedText(text, (Span(start, end),)))
    ids = prompt.input_ids[0][prompt.marked[0]]
    inside = bare(text[start:end])
    assert inside in bare(tokenizer.decode(ids)), (text, text[start:end])
    whole = bare(tokenizer.decode(ids[1:-1])).strip("\ufffd")
    assert whole in inside, (text, text[start:end])


@pytest.mark.parametrize("kind", KINDS)
def test_marked_tokens_decode_to_the_span_and_at_most_the_rest_of_its_edge_pieces(kind: str) -> None:
    tokenizer, rng = tokenizer_of(kind), random.Random(0)
    words = ["quick", '"Hello"', "(twice)", "2024", " ", "  ", "\n", "the", "lazy", "fox!", "says,"]
    if kind == "bytes":  # the others map letters that they do not know to one token
        words += ["lazy-dog", "你好", "👩\u200d👧", "naïve", "e\u0301", "\u00a0", "🇳🇴"]
    for _ in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 7)))
        start = rng.randrange(len(text))
        end = rng.randrange(start, len(text)) + 1
        if text[start:end].strip():
            _check_one_span(tokenizer, text, start, end, fold=kind == "wordpiece")


def test_the_embedded_models_tokenizer_finds_the_same_spans(smollm2) -> None:
    tokenizer, rng = smollm2[1], random.Random(0)
    words = ["Currently,", '"Hello"', "(bar)", "2024", "\n", " ", "你好", "👩\u200d👧", "naïve", "e\u0301", "don't"]
    for _ in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 7)))
        start = rng.randrange(len(text))
        end = rng.randrange(start, len(text)) + 1
        if text[start:end].strip():
            _check_one_span(tokenizer, text, start, end, fold=False)
    digits = encode(tokenizer, "in *2024*, 19*9*9")
    assert pieces(tokenizer, digits) == list("20249")


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_under_a_mark_does_not_take_the_word_whose_token_carries_it(kind: str) -> None:
    """Byte-level tokenizers put the blank before a word into the word's token."""
    tokenizer = tokenizer_of(kind)
    prompt = encode(tokenizer, MarkedText("says hello to the dog", (Span(4, 11),)))
    assert re.sub(r"[\s#]", "", under_marks(tokenizer, prompt)) == "hello"
    if kind == "bytes":
        assert " to" in [tokenizer.decode([i]) for i in prompt.input_ids[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "source", ['say "*hello*" now', "the (*hello*) end", "line\n*hello*\nline", "a,*hello*!", "a *hello* b", "blanks"]
)
def test_a_token_that_only_touches_the_edge_of_a_span_is_not_marked(kind: str, source: str) -> None:
    tokenizer = tokenizer_of(kind)
    if source == "blanks":  # blanks inside the marks belong to nobody
        source = MarkedText("a hello b", (Span(1, 8),))
    found = under_marks(tokenizer, encode(tokenizer, source))
    assert re.sub(r"[\s#]", "", found) == "hello"


def test_every_byte_token_of_a_marked_character_is_marked() -> None:
    tokenizer = tokenizer_of("bytes")
    prompt = encode(tokenizer, "a *é𝄞* b")
    assert int(prompt.marked.sum()) > 2
    assert under_marks(tokenizer, prompt).strip() == "é𝄞"


def test_weights_go_to_tokens_and_the_largest_counts_where_marks_overlap() -> None:
    tokenizer = tokenizer_of("bytes")
    prompt = encode(tokenizer, "the *quick (brown:2) fox* says (dog:-1)")
    by_word = {}
    for i, w in zip(prompt.input_ids[0], prompt.weights[0], strict=True):
        by_word.setdefault(float(w), []).append(int(i))
    words = {weight: tokenizer.decode(ids).split() for weight, ids in by_word.items()}
    assert words == {0.0: ["the", "says"], 1.0: ["quick", "fox"], 2.0: ["brown"], -1.0: ["dog"]}
    assert torch.equal(prompt.marked, prompt.weights != 0)


def test_a_mark_of_weight_zero_is_a_mark() -> None:
    prompt = encode(tokenizer_of("bytes"), "the (quick:0) fox")
    assert prompt.marked.any() and not prompt.weights.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_column_of_a_row_together(side: str) -> None:
    tokenizer = tokenizer_of("wordpiece")
    sources = ["the *quick* fox", "the lazy dog says *hello* to the brown fox twice"]
    batch = encode(tokenizer, sources, padding_side=side)
    for b, source in enumerate(sources):
        alone, keep = encode(tokenizer, source), batch.attention_mask[b].bool()
        for name in ("input_ids", "weights", "marked", "special", "message"):
            column = getattr(batch, name)[b]
            assert torch.equal(column[keep], getattr(alone, name)[0]), name
        assert not batch.marked[b][~keep].any() and not batch.special[b][~keep].any()
        assert (batch.message[b][~keep] == -1).all() and (batch.input_ids[b][~keep] == tokenizer.pad_token_id).all()
    short = batch.attention_mask[0].tolist()
    assert short == sorted(short, reverse=side == "right") and 0 in short
    assert batch.position_ids[0][batch.attention_mask[0].bool()].tolist() == list(range(sum(short)))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_special_tokens_are_added_to_text_and_known_as_such() -> None:
    tokenizer = tokenizer_of("wordpiece")
    prompt = encode(tokenizer, "*the* fox")
    assert prompt.input_ids[0].tolist() == tokenizer("the fox")["input_ids"]
    assert prompt.special[0].nonzero().flatten().tolist() == [0, prompt.input_ids.shape[1] - 1]
    assert not prompt.marked[prompt.special].any() and (prompt.message[prompt.special] == -1).all()


@pytest.mark.parametrize(("side", "kept"), [("right", "quick"), ("left", "dog")])
def test_a_cut_text_keeps_the_marks_that_remain_and_names_those_that_do_not(
    side: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of("unigram")
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    with pytest.warns(UserWarning, match=r"the mark on '(quick|dog)' was cut off or covers no token$") as caught:
        prompt = encode(tokenizer, "*quick* brown fox says hello to the lazy *dog*", max_length=9)
    assert prompt.input_ids.shape[1] == 9 and len(caught) == 1
    assert under_marks(tokenizer, prompt).strip() == kept and kept not in str(caught[0].message)


def test_a_mark_that_is_cut_in_two_keeps_its_rest_without_a_warning() -> None:
    tokenizer = tokenizer_of("bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = encode(tokenizer, "the quick *brown fox says hello*", max_length=6)
    assert prompt.input_ids.shape[1] == 6
    assert "brown fox says hello".startswith(under_marks(tokenizer, prompt).strip()) and prompt.marked.any()


def test_a_prompt_whose_every_mark_was_cut_off_warns_that_it_is_not_steered() -> None:
    with pytest.warns(UserWarning, match="the mark on 'dog' was cut off .*nothing else is marked: .* not steered"):
        prompt = encode(tokenizer_of("bytes"), "the quick brown fox and the *dog*", max_length=3)
    assert not prompt.marked.any() and not prompt.weights.any()


def test_text_longer_than_the_context_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("bytes")
    count = encode(tokenizer, TEXTS[0]).input_ids.shape[1]
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    with pytest.raises(ValueError, match=f"source has {count} tokens, more than the 8 .* set max_length=8"):
        encode(tokenizer, TEXTS[0])
    with pytest.warns(UserWarning, match="cut off"):
        assert encode(tokenizer, TEXTS[0] + " *end*", max_length=8).input_ids.shape[1] == 8


def test_literal_text_keeps_its_stars_and_has_no_marks() -> None:
    tokenizer = tokenizer_of("bytes")
    prompt = encode(tokenizer, "the *quick* (fox:2)", markup=False)
    assert prompt.texts == ("the *quick* (fox:2)",) and not prompt.marked.any()
    assert torch.equal(prompt.input_ids, encode(tokenizer, escape("the *quick* (fox:2)")).input_ids)


def test_spans_may_be_given_by_position() -> None:
    tokenizer = tokenizer_of("bytes")
    for markup in (True, False):
        prompt = encode(tokenizer, MarkedText("the *quick* fox", (Span(5, 10),)), markup=markup)
        assert under_marks(tokenizer, prompt) == "quick"


def test_the_prompt_remembers_its_texts_and_spans() -> None:
    prompt = encode(tokenizer_of("bytes"), ["a *b*", "c"])
    assert prompt.texts == ("a b", "c") and prompt.spans == ((Span(2, 3),), ())
    assert torch.equal(prompt.to("cpu").input_ids, prompt.input_ids)


# chats -------------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<answer>{% endif %}"
CHANGES = {
    "strip": "m.content | trim",
    "left": "m.content.lstrip()",
    "right": "m.content.rstrip()",
}
CHAT = [
    {"role": "system", "content": "the *quick* fox"},
    {"role": "user", "content": "  the lazy *dog* \n"},
]


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_marks_in_several_messages_are_found_even_if_the_template_strips(change: str | None) -> None:
    tokenizer = chat_tokenizer(PLAIN if change is None else PLAIN.replace("m.content", CHANGES[change]))
    prompt = encode(tokenizer, CHAT)
    words = [under_marks(tokenizer, prompt).split(), tokenizer.decode(prompt.input_ids[0][prompt.message[0] == 1])]
    assert words[0] == ["quick", "dog"] and words[1].strip() == "the lazy dog"
    messages = [{"role": m["role"], "content": m["content"].replace("*", "")} for m in CHAT]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt.input_ids[0].tolist() == expected
    assert prompt.texts[0].endswith("<answer>")
    assert [prompt.texts[0][s.start : s.end] for s in prompt.spans[0]] == ["quick", "dog"]


def test_a_chat_gets_no_special_tokens_but_those_of_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("wordpiece")
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }} [SEP] {% endfor %}")
    prompt = encode(tokenizer, [{"role": "user", "content": "the *quick* fox"}])
    assert "[CLS]" not in tokenizer.decode(prompt.input_ids[0]) and int(prompt.special.sum()) == 1
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "the quick fox"}], tokenize=True)
    assert prompt.input_ids[0].tolist() == expected["input_ids"]


def test_the_generation_prompt_can_be_left_out() -> None:
    prompt = encode(chat_tokenizer(PLAIN), CHAT, add_generation_prompt=False)
    assert not prompt.texts[0].endswith("<answer>")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_of_the_same_text_in_three_messages_the_right_one_is_marked(at: int) -> None:
    tokenizer = chat_tokenizer(PLAIN)
    contents = ["hello fox" if i != at else "*hello fox*" for i in range(3)]
    prompt = encode(tokenizer, [{"role": "user", "content": c} for c in contents])
    assert under_marks(tokenizer, prompt) == "hello fox"
    assert set(prompt.message[prompt.marked].tolist()) == {at}


def test_a_message_that_reads_like_the_template_is_not_confused_with_it() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    chat = [{"role": "user", "content": "<user>x</>"}, {"role": "user", "content": "*x*"}]
    prompt = encode(tokenizer, [{**m, "content": m["content"].replace("<", r"\<")} for m in chat])
    assert set(prompt.message[prompt.marked].tolist()) == {1}


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("m.content", "m.content | upper"),
        PLAIN.replace("m.content", "m.content | replace('quick', 'slow')"),
        PLAIN.replace("m.content", "m.content[:9]"),
        PLAIN.replace("messages", "messages[1:]"),
        PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
    ],
)
def test_a_template_that_changes_drops_or_repeats_a_message_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"chat template changes message 0 \('the quick fox'\), so its marks cannot"):
        encode(chat_tokenizer(template), CHAT)


def test_a_chat_may_hold_marked_text_by_position_and_be_literal() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    chat = [{"role": "user", "content": MarkedText("2*3 fox", (Span(4, 7),))}, {"role": "user", "content": "*a*"}]
    prompt = encode(tokenizer, chat, markup=False)
    assert under_marks(tokenizer, prompt).strip() == "fox" and "*a*" in prompt.texts[0]


def test_a_batch_may_mix_chats_strings_and_marked_text() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    sources = [CHAT, "a *fox* says", MarkedText("hello dog", (Span(0, 5),))]
    batch = encode(tokenizer, sources)
    for b, source in enumerate(sources):
        alone = encode(tokenizer, source)
        keep = batch.attention_mask[b].bool()
        assert torch.equal(batch.input_ids[b][keep], alone.input_ids[0])
        assert torch.equal(batch.marked[b][keep], alone.marked[0])


def test_the_embedded_models_template_gives_the_ids_of_transformers(smollm2) -> None:
    tokenizer = smollm2[1]
    for chat in (CHAT, CHAT[1:]):  # without a system message this template adds its own
        prompt = encode(tokenizer, chat)
        messages = [{**m, "content": m["content"].replace("*", "")} for m in chat]
        expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert prompt.input_ids[0].tolist() == expected
        assert under_marks(tokenizer, prompt).split() == [w for w in ("quick", "dog") if w in str(messages)]
        marks = prompt.special[0].nonzero().flatten()
        names = {tokenizer.convert_ids_to_tokens(int(prompt.input_ids[0, i])) for i in marks}
        assert names == {"<|im_start|>", "<|im_end|>"}


# errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"source=\[\] is an empty batch; give at least one text"),
        ("", "source='' has no text; give at least one word"),
        (["a", ""], "source='' has no text"),
        ([{"role": "user", "content": "hi"}], "source is a chat, but this tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_encoded_is_refused(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(tokenizer_of("bytes"), source)


@pytest.mark.parametrize("content", [None, 3, [{"type": "text", "text": "hi"}]])
def test_a_message_without_text_is_refused_by_its_number(content: object) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "user", "content": content}]
    with pytest.raises(ValueError, match="message 1 has content .*; give a string or MarkedText"):
        encode(chat_tokenizer(PLAIN), chat)


def test_broken_emphasis_is_refused_in_text_and_in_chats() -> None:
    for source in ("the *fox", [{"role": "user", "content": "the *fox"}]):
        with pytest.raises(MarkupError, match="never closes"):
            encode(chat_tokenizer(PLAIN), source)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer=ByT5Tokenizer gives no character offsets; load its fast version"):
        encode(ByT5Tokenizer(), "a *b*")


def test_an_unknown_padding_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"padding_side='up' is not known; use 'left' \(for generation\) or 'right'"):
        encode(tokenizer_of("bytes"), "a", padding_side="up")

"""TRL's preference format becomes tokens, and says which row is wrong."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from zq_lib.r3m import PreferenceCollator, encode, labels_of

WORDS = ["<pad>", "<end>", "the", "sky", "is", "blue.", "green.", "it", "user:", "assistant:", "what", "colour?"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '<end> ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


def _words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


ROW = {"prompt": "the sky is", "chosen": " blue.", "rejected": " green. it is"}


def test_a_text_row_is_prompt_and_completions_with_their_end(tokenizer) -> None:
    row = encode([ROW], tokenizer)[0]
    assert [_words(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        "the sky is", "blue. <end>", "green. it is <end>",
    ]  # fmt: skip
    assert row["example"] == 0


def test_a_prompt_at_the_beginning_of_both_sides_is_found(tokenizer) -> None:
    implicit = {"chosen": "the sky is blue.", "rejected": "the sky is green. it is"}
    assert encode([implicit], tokenizer) == encode([ROW], tokenizer)
    user = {"role": "user", "content": "what colour?"}
    answers = [[{"role": "assistant", "content": x}] for x in ("blue.", "green.")]
    sides = {"chosen": [user, *answers[0]], "rejected": [user, *answers[1]]}
    whole = {"prompt": [user], "chosen": answers[0], "rejected": answers[1]}
    assert encode([sides], tokenizer) == encode([whole], tokenizer)


def test_a_conversation_follows_its_template(tokenizer) -> None:
    row = {
        "prompt": [{"role": "user", "content": "what colour?"}],
        "chosen": [{"role": "assistant", "content": "blue."}],
        "rejected": [{"role": "assistant", "content": "green."}],
    }
    found = encode([row], tokenizer)[0]
    assert _words(found["prompt_ids"]) == "user: what colour? assistant:"
    assert _words(found["chosen_ids"]) == "blue. <end>"


def test_a_long_prompt_loses_its_beginning_and_then_a_completion_its_end(tokenizer) -> None:
    found = [encode([ROW], tokenizer, max_length=k)[0] for k in (6, 3)]
    assert [_words(r["prompt_ids"]) for r in found] == ["sky is", "is"]
    assert [_words(r["rejected_ids"]) for r in found] == ["green. it is <end>", "green. it"]
    assert _words(found[1]["chosen_ids"]) == "blue. <end>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "the", "chosen": "sky"}, "row 1 has no 'rejected'; a preference has 'prompt'"),
        (ROW | {"chosen": ""}, "row 1 has no 'chosen'"),
        (ROW | {"chosen": [{"role": "user", "content": "x"}]}, "row 1 mixes texts and messages"),
        (ROW | {"rejected": " blue."}, "row 1 has the same text as chosen and as rejected, which prefers nothing"),
        ({"chosen": "blue. sky", "rejected": "green."}, "row 1 has no 'prompt', and its sides do not begin alike"),
        (ROW | {"prompt": " "}, "row 1 has a prompt without tokens"),
    ],
)
def test_a_bad_row_is_named(row: dict, message: str, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        encode([ROW, row], tokenizer)


def test_a_completion_without_tokens_is_named(tokenizer) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0 has no completion tokens in 'chosen'; drop it"):
        encode([ROW | {"chosen": "  "}], tokenizer)


def test_sides_that_differ_beyond_the_cut_are_named(tokenizer) -> None:
    row = ROW | {"chosen": "it is blue.", "rejected": "it is green."}
    with pytest.raises(ValueError, match="row 0 has two sides that agree up to max_length=3 tokens"):
        encode([row], tokenizer, max_length=3)
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        encode([row], tokenizer, max_length=1)
    with pytest.raises(ValueError, match="rows is empty"):
        encode([], tokenizer)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    row = {
        "prompt": [{"role": "user", "content": "sky"}],
        "chosen": [{"role": "assistant", "content": "blue."}],
        "rejected": [{"role": "assistant", "content": "green."}],
    }
    with pytest.raises(
        ValueError, match="row 0: the chat template does not continue the prompt's tokens with those of"
    ):
        encode([row], tokenizer)


def test_ragged_rows_make_a_batch_with_the_chosen_first(tokenizer) -> None:
    rows = encode([ROW, {"prompt": "it", "chosen": "is blue. sky the sky", "rejected": "is"}], tokenizer)
    batch = PreferenceCollator(0)(rows)
    assert batch["input_ids"].shape == (4, 7) and batch["example"].tolist() == [0, 1]
    assert _words(batch["input_ids"][1][:7].tolist()) == "it is blue. sky the sky <end>"
    assert batch["attention_mask"].sum(1).tolist() == [5, 7, 7, 3]
    assert batch["completion_mask"].sum(1).tolist() == [2, 6, 4, 2]
    labels = labels_of(batch)
    assert _words(labels[0][labels[0] != -100].tolist()) == "blue. <end>"
    assert (labels[0] != -100).tolist() == [False, False, True, True, False, False, False], "one before each word"
    assert (labels != -100).sum(1).tolist() == [2, 6, 4, 2]
    with pytest.raises(ValueError, match="rows is empty; a batch needs at least one pair"):
        PreferenceCollator(0)([])
    assert "reference" not in batch
    joined = [row | {"reference": (float(i), float(-i))} for i, row in enumerate(rows)]
    assert torch.equal(PreferenceCollator(0)(joined)["reference"], torch.tensor([0.0, 1.0, -0.0, -1.0]))

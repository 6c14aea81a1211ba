"""Preferences in TRL's format as tokens, checked row by row, and batches of them.

A row has `prompt`, `chosen` and `rejected`, or only the last two with the prompt at the beginning of both; each is a
text, or a list of messages with `role` and `content`. Batches have TRL's layout too: 2B rows, the chosen first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zq_lib.r3m.logps import IGNORED

EXAMPLE = "example"  # a row's number in the data set, by which reports know it
REFERENCE = "reference"  # the reference's log-probabilities of a row's two completions
Text = str | list[dict[str, str]]
Row = dict[str, Any]


def encode(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = 1024
) -> list[Row]:
    """Tokens of each row: `prompt_ids`, `chosen_ids`, `rejected_ids` and `example`.

    A text's completion ends with the tokenizer's end of sequence; a conversation's as its template says. Beyond
    `max_length` tokens a prompt loses its beginning, then, when it is down to one token, a completion its end.

    Raises ValueError, naming the row, for missing columns, mixed forms, a side without tokens, and two equal sides.

    >>> encode([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}], tokenizer)
    """
    if not rows:
        raise ValueError("rows is empty; give at least one preference")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length!r} must be at least 2, a token of prompt and one of completion")
    return [_encoded(place, row, tokenizer, max_length) | {EXAMPLE: place} for place, row in enumerate(rows)]


def _encoded(place: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Row:
    prompt, chosen, rejected = _sides(place, row)
    if chosen == rejected:
        raise ValueError(f"row {place} has the same text as chosen and as rejected, which prefers nothing; drop it")
    first, sides = _tokens(place, prompt, (chosen, rejected), tokenizer)
    longest = max(map(len, sides))
    if limit is not None and len(first) + longest > limit:
        first = first[-max(1, limit - longest) :]
        sides = [side[: limit - len(first)] for side in sides]
        if sides[0] == sides[1]:
            raise ValueError(
                f"row {place} has two sides that agree up to max_length={limit} tokens, which prefers nothing; drop "
                "it, or raise max_length"
            )
    return {"prompt_ids": first, "chosen_ids": sides[0], "rejected_ids": sides[1]}


def _sides(place: int, row: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise ValueError(f"row {place} has no {name!r}; a preference has 'prompt', 'chosen' and 'rejected'")
    found = [row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None]
    if not (all(isinstance(x, str) for x in found) or all(isinstance(x, list | tuple) for x in found)):
        raise ValueError(f"row {place} mixes texts and messages; give all sides as texts, or all as lists of messages")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], chosen, rejected
    alike = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = alike.index(False) if False in alike else len(alike)
    if isinstance(chosen, str):
        shared = max(chosen[:shared].rfind(" "), 0)  # the space belongs to the completion, as in " blue."
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not (prompt and chosen and rejected):
        raise ValueError(
            f"row {place} has no 'prompt', and its sides do not begin alike and then differ; give a 'prompt'"
        )
    return prompt, chosen, rejected


def _tokens(
    place: int, prompt: Text, sides: tuple[Text, Text], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """The prompt's tokens and those of both completions."""
    if isinstance(prompt, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        first = tokenizer(prompt)["input_ids"]
        if end and first[-1:] == end:  # some tokenizers end every text
            first = first[:-1]
        done = [tokenizer(side, add_special_tokens=False)["input_ids"] + end for side in sides]
    else:
        first = _templated(tokenizer, list(prompt), True)
        done = []
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            whole = _templated(tokenizer, [*prompt, *side], False)
            if whole[: len(first)] != first:
                raise ValueError(
                    f"row {place}: the chat template does not continue the prompt's tokens with those of {name!r}; "
                    "give texts with the template applied"
                )
            done.append(whole[len(first) :])
    if not first:
        raise ValueError(f"row {place} has a prompt without tokens; the first word of a completion needs one before it")
    for name, side in zip(("chosen", "rejected"), done, strict=True):
        if not side:
            raise ValueError(f"row {place} has no completion tokens in {name!r}; drop it")
    return first, done


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"])


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of `encode` as a batch: `input_ids`, `attention_mask`, `completion_mask` [2B, T], padded on the right, and
    `example` [B], and of rows that `ReferenceCache.join` made `reference` [2B]. Lengths may differ by any amount."""

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of `rows`."""
        if not rows:
            raise ValueError("rows is empty; a batch needs at least one pair")
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        length = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.full((len(pairs), length), self.pad_token_id)
        mask, completed = torch.zeros_like(ids), torch.zeros_like(ids)
        for place, (prompt, completion) in enumerate(pairs):
            stop = len(prompt) + len(completion)
            ids[place, :stop] = torch.tensor(prompt + completion)
            mask[place, :stop] = 1
            completed[place, len(prompt) : stop] = 1
        example = torch.tensor([row[EXAMPLE] for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completed, EXAMPLE: example}
        if REFERENCE in rows[0]:
            batch[REFERENCE] = torch.tensor([row[REFERENCE] for row in rows]).T.reshape(-1)
        return batch


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The word that each position of a batch has to predict, [2B, T]; -100 on the prompt, padding and the last one."""
    ids, completed = batch["input_ids"], batch["completion_mask"].bool()
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:].masked_fill(~completed[:, 1:], IGNORED)
    return labels

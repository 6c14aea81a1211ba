"""TREC's questions as batches for a classifier, and batches cut to their longest row."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zq_lib.core import data

Batches = list[tuple[dict[str, Tensor], Tensor]]


def question_batches(
    tokenizer: PreTrainedTokenizerBase, train: int, test: int, batch: int, tokens: int, seed: int = 0
) -> tuple[Batches, Batches, list[str]]:
    """`train` and `test` questions drawn without overlap, in batches of (inputs, label), and the names of the classes.

    Each is cut to `tokens` tokens; a label is one of the six kinds of answer that a question asks for.
    """
    questions = data.trec()
    random.Random(seed).shuffle(questions)
    kinds = sorted({q.coarse for q in questions})
    parts = []
    for rows in (questions[:train], questions[train : train + test]):
        inputs = tokenizer(
            [q.text for q in rows], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
        )
        parts.append(cut_batches(dict(inputs), batch, torch.tensor([kinds.index(q.coarse) for q in rows])))
    return parts[0], parts[1], kinds


def cut_batches(inputs: Mapping[str, Tensor], size: int, target: Tensor) -> Batches:
    """Batches cut to their longest row, and `target` [rows] or [rows, T, C] with them; an incomplete one is dropped."""
    found = []
    for i in range(0, len(target) - size + 1, size):
        rows = {k: v[i : i + size] for k, v in inputs.items()}
        length = int(rows["attention_mask"].sum(1).max())
        y = target[i : i + size]
        found.append(({k: v[:, :length] for k, v in rows.items()}, y[:, :length] if y.dim() == 3 else y))
    return found

"""Tiny random models of one architecture, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from zq_lib.ted.layers import EXAMPLE

WORDS = 60
KINDS = {
    "sequence": AutoModelForSequenceClassification,
    "span": AutoModelForQuestionAnswering,
    "token": AutoModelForTokenClassification,
    "language": AutoModelForCausalLM,
}
ENCODERS = ("bert", "distilbert", "roberta", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "llama", "qwen2")


def _config(arch: str, depth: int, width: int, kind: str, **overrides: Any):
    if arch == "distilbert":
        sizes = {"dim": width, "n_layers": depth, "n_heads": 2, "hidden_dim": 2 * width}
    elif arch == "gpt2":
        sizes = {"n_embd": width, "n_layer": depth, "n_head": 2, "n_positions": 64}
    else:
        sizes = {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 2 * width,
            "max_position_embeddings": 64,
        }  # fmt: skip
    if arch in ("llama", "qwen2"):
        sizes["num_key_value_heads"] = 1
    common = {
        "vocab_size": WORDS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 2 if kind == "span" else 3,
    }
    return AutoConfig.for_model(arch, **common | sizes | {"initializer_range": 0.2} | overrides)


@pytest.fixture
def make() -> Callable[..., PreTrainedModel]:
    """`make(arch, depth, width, kind)`: a tiny random model in eval mode, the same for the same words."""

    def build(arch="bert", depth=4, width=16, kind="sequence", dtype=torch.float32, **overrides) -> PreTrainedModel:
        torch.manual_seed(depth * 100 + width)
        return KINDS[kind].from_config(_config(arch, depth, width, kind, **overrides)).to(dtype).eval()

    return build


@pytest.fixture
def batch_of() -> Callable[..., dict[str, Tensor]]:
    """`batch_of(kind, rows, side)`: token numbers, mask and labels, padded on one side. The first word is the label."""

    def build(kind="sequence", rows=4, length=9, side="right", seed=0, first=0) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, WORDS, (rows, length), generator=source)
        mask = torch.ones(rows, length, dtype=torch.long)
        for row in range(rows):
            drop = row % 4
            mask[row, length - drop :] = 0
        batch = {EXAMPLE: torch.arange(first, first + rows)}
        if kind == "sequence":
            batch["labels"] = ids[:, 0] % 3
        elif kind == "span":
            batch["start_positions"] = torch.arange(rows) % 3
            batch["end_positions"] = torch.arange(rows) % 3 + 1
        else:
            batch["labels"] = (ids % 3 if kind == "token" else ids).masked_fill(mask == 0, -100)
        batch |= {"input_ids": ids * mask, "attention_mask": mask}
        if side == "left":
            shift = [row % 4 for row in range(rows)]
            for key in ("input_ids", "attention_mask", *(["labels"] if kind in ("token", "language") else [])):
                batch[key] = torch.stack([torch.roll(x, s) for x, s in zip(batch[key], shift, strict=True)])
        return batch

    return build


@pytest.fixture
def pad() -> Callable[..., dict[str, Tensor]]:
    """`pad(batch, extra)`: the same rows with `extra` positions of padding on the right."""

    def longer(batch: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            k: torch.nn.functional.pad(v, (0, extra), value=fill[k]) if k in fill and v.dim() == 2 else v
            for k, v in batch.items()
        }

    return longer

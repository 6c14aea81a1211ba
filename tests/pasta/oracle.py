"""A steered model in double precision that shares nothing with the library but `reference.py`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from zq_lib.core.models import tiny
from zq_lib.pasta import Prompt
from zq_lib.pasta.reference import reweight

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma", "gemma3")
_STATE: dict = {}


def _post_softmax_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """The paper's own form: probabilities, scaled where not marked, renormalised."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        at = torch.arange(keys - queries, keys)
        attention_mask = (torch.arange(keys)[None] <= at[:, None])[None, None]
    probs = torch.softmax(scores.masked_fill(~attention_mask, -torch.inf), -1).nan_to_num(0.0)
    heads = _STATE["heads"].get(module.layer_idx, ())
    if heads:
        seen = _STATE["past"] + queries
        first = seen - keys
        pad = max(0, seen - _STATE["unmarked"].shape[1])
        unmarked = torch.nn.functional.pad(_STATE["unmarked"], (0, pad))[:, first:seen]
        marked = torch.nn.functional.pad(_STATE["marked"], (0, pad))[:, first:seen]
        rows = (attention_mask & marked[:, None, None]).any(-1)  # [B, 1, T]
        steered = reweight(probs, unmarked, _STATE["alpha"]).nan_to_num(0.0)
        for h in heads:
            probs[:, h] = torch.where(rows[:, 0, :, None], steered[:, h], probs[:, h])

    return (probs @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("post_softmax", _post_softmax_attention)
AttentionMaskInterface.register("post_softmax", sdpa_mask)


@contextlib.contextmanager
def paper_form(
    model: PreTrainedModel, prompt: Prompt, heads: dict[int, tuple[int, ...]], alpha: float
) -> Iterator[PreTrainedModel]:
    """A float64 copy of `model` that steers after the softmax."""
    double = copy.deepcopy(model).double()
    double.set_attn_implementation("post_softmax")

    def note_past(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        _STATE["past"] = 0 if cache is None else cache.get_seq_length()

    stack = double.model.decoder if hasattr(double.base_model, "decoder") else double.base_model
    hook = stack.register_forward_pre_hook(note_past, with_kwargs=True)
    valid = prompt.attention_mask.bool()
    marks = prompt.marked.any(-1, keepdim=True)
    _STATE.update(heads=heads, alpha=alpha, marked=prompt.marked, unmarked=valid & ~prompt.marked & marks)
    try:
        yield double
    finally:
        hook.remove()
        _STATE.clear()


def random_prompt(rows: int = 3, tokens: int = 14, padding: str | None = "left", seed: int = 0) -> Prompt:
    """Random ids in 3..127 with a different mark in every row; rows of unequal length unless `padding` is None."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    marked = torch.zeros_like(ids).bool()
    for b in range(rows):
        pad = 2 * b if padding else 0
        if padding == "left":
            mask[b, :pad] = 0
        elif padding == "right":
            mask[b, tokens - pad :] = 0
        start = (pad if padding == "left" else 0) + 2 + b
        marked[b, start : start + 2] = True
    ids[mask == 0] = 0
    zeros = torch.zeros_like(ids)
    return Prompt(ids, mask, marked.float(), marked, zeros.bool(), zeros, ("",) * rows, ((),) * rows)


def row(prompt: Prompt, b: int) -> Prompt:
    """One row of a batch without its padding."""
    keep = prompt.attention_mask[b].bool()
    fields = ("input_ids", "attention_mask", "weights", "marked", "special", "message")
    return Prompt(*(getattr(prompt, f)[b, keep][None] for f in fields), ("",), ((),))


def run(model: PreTrainedModel, prompt: Prompt, **options: object) -> Tensor:
    """Logits of a plain forward, with positions that do not count padding where the model takes them."""
    import inspect

    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = prompt.position_ids
    with torch.no_grad():
        return model(**prompt.inputs, **options).logits


def some_heads(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """One head of the first layer, all of the second, two of the last."""
    layers = model.config.num_hidden_layers
    heads = {0: (1,), 1: (0, 1, 2, 3)}
    return heads if layers == 2 else {**heads, layers - 1: (0, 3)}


__all__ = ["ARCHITECTURES", "paper_form", "random_prompt", "row", "run", "some_heads", "tiny"]

"""Attention straight on the packed form: keys and values are restored one tile at a time and never as a whole.

Tiles of keys meet the queries in an online softmax. Where Triton runs on a GPU, `kernels.py` does the same in one
launch and restores nothing but registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zq_lib.core import backend
from zq_lib.core.attach import (
    KeyBias,
    active_bias,
    dense_attention,
    register,
    restore_implementation,
    rows_that_see,
    use_implementation,
)
from zq_lib.gear.cache import GearCache
from zq_lib.gear.outliers import PAGE
from zq_lib.gear.packed import Block, Packed
from zq_lib.gear.view import NAME, View, view_of

TILE = 1024  # tokens restored at a time; measured: shorter tiles cost more calls, longer ones more memory
SHORT = 2 * TILE  # a cache of up to this many tokens is one tile, and then the model's own attention is faster
WAITING = 2**18  # scores (a megabyte) that may wait for one step of the softmax


def gear_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function transformers calls: shapes and arguments as its AttentionInterface defines them.

    query [B, H, T, D]; key, value [B, G, S, D] or a view's stand-ins; returns [B, T, H, D] contiguous and no weights.
    """
    view = view_of(key)
    if view is None and key.shape[2] > 1 and not any(key.stride()):
        raise ValueError(
            f"model={type(module).__name__} changes the keys between cache and attention, so it cannot read the packed "
            "form; leave its attention at 'sdpa', and GearCache restores the keys for it"
        )
    bias = active_bias(module)
    special = bias is not None and (bias.share is not None or bias.record is not None)
    short = view is not None and view.length <= SHORT and _path(view.backend, query, view, None) == "torch"
    if (
        view is None
        or special
        or short
        or dropout
        or any(kwargs.get(k) is not None for k in ("position_bias", "softcap", "s_aux"))
    ):
        if view is not None:
            key, value = view.dense()
        return dense_attention(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(query, view, scale=scale, mask=attention_mask, bias=bias, module=module)
    return out.transpose(1, 2).contiguous(), None


def packed_attention(
    query: Tensor,
    view: View,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: KeyBias | None = None,
    module: nn.Module | None = None,
    path: str | None = None,
) -> Tensor:
    """softmax(scale q K^T + mask + bias) V on a view, [B, H, T, D] in the query's dtype.

    Args: `query` [B, H, T, D], the newest T positions; `mask` bool or float [B or 1, 1, T, S] in text order or None for
    causal; `bias` the active KeyBias of `module`; `path` "auto", "torch" or "triton", by default the view's backend.
    """
    b, h, t, d = query.shape
    if mask is None and t > 1:
        position = torch.arange(view.length - t, view.length, device=query.device)
        mask = (torch.arange(view.length, device=query.device) <= position[:, None])[None, None]
    beta = gate = rows = None
    if bias is not None and module in bias.gates:
        beta, favoured = bias.keys(b, t, view.length)
        rows = rows_that_see(favoured, t, mask, causal=False)  # [B, T]
        gate = bias.gates[module].strength.expand(b, h)
        beta = view.in_stored_order(beta)
        layer = bias.layers[module]
        bias.calls[layer] = bias.calls.get(layer, 0) + 1
    if mask is not None:
        mask = view.in_stored_order(mask)
    if _path(path or view.backend, query, view, mask) == "triton":
        from zq_lib.gear.kernels import decode

        keep = None if mask is None else mask[:, 0, 0].expand(b, -1)
        gates = None if gate is None else gate * rows
        out = decode(query, view, scale=scale, mask=keep, bias=beta, gate=gates)  # [B, H, D]
        return out[:, :, None].to(query.dtype)
    groups = view.exact_keys.shape[1]
    q = (query.float() * scale).reshape(b, groups, -1, d)  # [B, G, M, D], M = H/G * T rows per key head
    total = _Softmax()

    def extra(scores: Tensor, start: int) -> Tensor:
        """Mask and bias of the stored columns from `start` on. `scores` [B, G, M, n]"""
        if beta is None and mask is None:
            return scores
        end = start + scores.shape[3]
        scores = scores.reshape(b, h, t, end - start)
        if beta is not None:
            scores = scores + (gate[:, :, None] * rows[:, None])[..., None] * beta[:, None, None, start:end]
        if mask is not None:
            part = mask[..., start:end]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        return scores.reshape(*q.shape[:3], end - start)

    keys, values, sinks = view.exact_keys.float(), view.exact_values.float(), view.sinks
    if sinks:
        total.add(extra(q @ keys[:, :, :sinks].mT, 0), values[:, :, :sinks])
    column = sinks
    for block in view.blocks:
        for packed_keys, packed_values, length in tiles(block):
            scores = q @ packed_keys.dequantize()[:, :, :length].mT
            total.add(extra(scores, column), packed_values)
            column += length
    total.add(extra(q @ keys[:, :, sinks:].mT, column), values[:, :, sinks:])
    return total.result().view(b, h, t, -1).to(query.dtype)


class _Softmax:
    """Softmax over tiles, online: weights are relative to the largest score so far, and shrink when that grows.

    Tiles are collected until their scores are worth a step, so that one query takes one step whatever the length.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Packed | Tensor]] = []
        self.largest: Tensor | None = None

    def add(self, scores: Tensor, values: Packed | Tensor) -> None:
        """Scores [B, G, M, n] of the next tile and its values, [B, G, n, D] or packed."""
        if scores.shape[-1] == 0:  # an empty buffer
            return
        self.waiting.append((scores, values))
        if sum(x.numel() for x, _ in self.waiting) > WAITING:
            self._step()

    def _step(self) -> None:
        sizes = [x.shape[-1] for x, _ in self.waiting]
        scores = torch.cat([x for x, _ in self.waiting], -1)
        largest = scores.amax(-1, keepdim=True)
        if self.largest is not None:
            largest = torch.maximum(largest, self.largest)
        finite = largest.clamp(min=torch.finfo(scores.dtype).min)  # for a row that sees nothing yet
        p = (scores - finite).exp_()
        weight, mixed = p.sum(-1, keepdim=True), None
        for part, (_, values) in zip(p.split(sizes, -1), self.waiting, strict=True):
            if isinstance(values, Packed):
                values = values.dequantize()[:, :, : part.shape[-1]]
            one = part @ values
            mixed = one if mixed is None else mixed + one
        if self.largest is None:
            self.out, self.weight = mixed, weight
        else:
            shrink = (self.largest - finite).exp_()
            self.out, self.weight = self.out * shrink + mixed, self.weight * shrink + weight
        self.largest, self.waiting = largest, []

    def result(self) -> Tensor:
        """The attention; 0 for a row that sees nothing."""
        if self.waiting:
            self._step()
        return self.out / self.weight.clamp(min=torch.finfo(self.out.dtype).tiny)


def tiles(block: Block) -> Iterator[tuple[Packed, Packed, int]]:
    """Parts of a block of about TILE tokens, with how many of their tokens count: several segments, or part of one."""
    n, left = block.keys.tokens, block.length
    step = math.lcm(block.keys.group if block.keys.per_channel and block.keys.group < n else 1, PAGE)
    step *= max(1, TILE // step)
    together = max(1, TILE // n) if n <= TILE else 1
    for first in range(0, block.keys.count, together):
        keys, values = (x.segments(first, first + together) for x in (block.keys, block.values))
        if n <= step:
            size = min(left, keys.count * n)
            yield keys, values, size
            left -= size
            continue
        for start in range(0, n, step):
            stop = min(n, start + step)
            size = min(left, stop - start)
            if size > 0:
                yield keys.tokens_between(start, stop), values.tokens_between(start, stop), size
            left -= size


def _path(wanted: str, query: Tensor, view: View, mask: Tensor | None) -> str:
    able, why = True, ""
    if mask is not None and mask.dtype != torch.bool:
        able, why = False, "a float attention mask is not in the kernel; give a boolean one"
    elif query.is_cuda or backend.requested(wanted) == "triton":
        from zq_lib.gear.kernels import supported

        able, why = supported(view, query)
    return backend.choose(wanted, query.device, able, why)


@contextmanager
def attend_packed(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let `model` read GearCache in its packed form inside a `with` block; other caches work as before.

    Padding is then found in the attention mask that the model is given. Composes with PASTA in any order. Without this,
    GearCache works with any attention and restores keys and values for it, layer by layer.
    """
    use_implementation(model, NAME)
    hook = model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()
        restore_implementation(model, NAME)


def _note_padding(model: nn.Module, args: tuple, kwargs: dict) -> None:
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if isinstance(cache, GearCache) and isinstance(mask, Tensor) and mask.dim() == 2:
        cache.set_padding(mask)


register(NAME, gear_attention_forward, rank=1)

"""Attention straight on the packed form: no key or value is ever restored as a whole.

With x = code * scale + zero + A B^T + delta, a dot product splits into

    q . k_t = (q * scale) . code_t + q . zero + (q B) . A_t + sum over outliers of q_c delta
    sum_t p_t v_t = (p * scale) code + p zero + (p A) B^T + sum over outliers of p_t delta

so codes enter as small whole numbers and scales meet the query or the probabilities. Keys are taken tile by tile with
an online softmax; the working set is one tile. Where Triton runs on a GPU, `kernels.py` does the same in one launch.
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
from zq_lib.gear.packing import unpack
from zq_lib.gear.view import NAME, View, view_of

TILE = 1024  # tokens restored at a time; measured: shorter tiles cost more calls, longer ones more memory
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
    if (
        view is None
        or special
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
            total.add(extra(key_scores(q, packed_keys)[..., :length], column), packed_values)
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
            one = part @ values if isinstance(values, Tensor) else mix_values(part, values)
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


def key_scores(q: Tensor, keys: Packed) -> Tensor:
    """q K^T on packed keys: q [B, G, M, D] float32, already scaled -> [B, G, M, m n]."""
    b, heads, rows, d = q.shape
    m, n = keys.count, keys.tokens
    scale, zero, one = keys.scale.float(), keys.zero.float(), q[:, None]  # [B, 1, G, M, D]
    codes = unpack(keys.codes, keys.bits).float()  # [B, m, G, n, D]
    if keys.per_channel:  # the scale meets the query, once per group
        met = one.unsqueeze(3) * scale.unsqueeze(4)  # [B, m, G, n/g, M, D]
        scores = (met @ codes.unflatten(3, (-1, keys.group)).mT).transpose(3, 4)  # [B, m, G, M, n/g, g]
        scores = (scores + (one @ zero.mT).unsqueeze(5)).flatten(4)  # [B, m, G, M, n]
    else:  # the scale meets the product, per channel group
        split = one.unflatten(4, (scale.shape[-1], -1))  # [B, 1, G, M, C, w]
        scores = split.transpose(3, 4) @ codes.unflatten(4, (scale.shape[-1], -1)).permute(0, 1, 2, 4, 5, 3)
        scores = (scores * scale.mT.unsqueeze(4)).sum(3) + split.sum(-1) @ zero.mT  # [B, m, G, C, M, n], summed over C
    if (found := keys.factors()) is not None:
        scores = scores + (one @ found[1]) @ found[0].mT
    if keys.out_delta is not None:
        token, channel, size = _entries(keys)
        met = one.expand(b, m, heads, rows, d).mT.reshape(-1, rows).index_select(0, channel)  # [B m N, M]
        sparse = q.new_zeros(size, rows).index_add_(0, token, met * keys.out_delta.reshape(-1, 1))
        scores = scores + sparse.view(b, m, heads, -1, rows)[:, :, :, :n].mT
    return scores.permute(0, 2, 3, 1, 4).reshape(b, heads, rows, m * n)


def mix_values(p: Tensor, values: Packed) -> Tensor:
    """P V on packed values: p [B, G, M, up to m n] float32 -> [B, G, M, D]."""
    b, heads, rows, d = *p.shape[:3], values.width
    m, n = values.count, values.tokens
    if p.shape[-1] < m * n:  # hidden tokens weigh nothing
        p = torch.nn.functional.pad(p, (0, m * n - p.shape[-1]))
    split = p.unflatten(3, (m, n)).permute(0, 3, 1, 2, 4)  # [B, m, G, M, n]
    scale, zero = values.scale.float(), values.zero.float()  # [B, m, G or 1, n, C]
    parts = scale.shape[-1]
    met = split.unsqueeze(3) * scale.mT.unsqueeze(4)  # [B, m, G, C, M, n]
    codes = unpack(values.codes, values.bits).float()  # [B, m, G, n, D]
    mixed = met @ codes.unflatten(4, (parts, -1)).transpose(3, 4) + (split @ zero).mT.unsqueeze(5)
    out = mixed.transpose(3, 4).flatten(4)  # [B, m, G, C, M, w] -> [B, m, G, M, D]
    if (found := values.factors()) is not None:
        out = out + (split @ found[0]) @ found[1].mT
    if values.out_delta is not None:
        token, channel, size = _entries(values)
        padded = torch.nn.functional.pad(split, (0, size // (b * m * heads) - n)).mT.reshape(-1, rows)
        met = padded.index_select(0, token) * values.out_delta.reshape(-1, 1)  # [B m N, M]
        sparse = p.new_zeros(b * m * heads * d, rows).index_add_(0, channel, met)
        out = out + sparse.view(b, m, heads, d, rows).mT
    return out.sum(1) if m > 1 else out[:, 0]


def _entries(packed: Packed) -> tuple[Tensor, Tensor, int]:
    """Of every outlier: where its token is among [B, m, G, pages * PAGE] and its channel among [B, m, G, D], as
    [B m N] int64 each; and how many tokens those are."""
    pages = -(-packed.tokens // PAGE)
    counts = packed.out_start.diff(dim=-1).flatten()  # entries of every page, in the order of the lists
    page = torch.repeat_interleave(counts, output_size=packed.out_delta.numel()).long()
    return (
        page * PAGE + packed.out_token.flatten(),
        page // pages * packed.width + packed.out_channel.flatten(),
        len(counts) * PAGE,
    )


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

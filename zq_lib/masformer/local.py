"""Local attention with real savings: O(T w) work and memory in torch, the banded kernels on a GPU.

A mask saves nothing: with one, full attention does all its work and more. So the torch path cuts the queries into
chunks of C and lets each see one overlapping slice of the keys. The slices are a strided view, the mask inside them is
the same for all chunks, and each chunk is one row of a single batched call:

    queries   .......[  C  ][  C  ][  C  ]          rows before the first chunk and after the last are dense
    keys      [ back |  C  ]                        back = w - 1 for a window, 0 for blocks, b for two blocks
                     [ back |  C  ]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.backend import Launch, choose, record
from zq_lib.masformer.layout import Layout, Rule, Text, read_layout
from zq_lib.masformer.reference import sees, visible
from zq_lib.masformer.spans import KINDS, Span, checked

WIDEST_HEAD = 256  # of the kernels
LEAST_CHUNK, MOST_CHUNK = 64, 256  # half a window between these was fastest for windows of 64 to 1024


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    span: Span,
    kind: str = "window",
    sinks: int = 0,
    position: Tensor | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of a layer with this span (`spans`): exact inside it, nothing computed outside. Differentiable.

    Args: `query` [B, H, T, D]; `key`, `value` [B, G, S, D] with H a multiple of G; queries are the last T of the S
    places. `span` is None (full), a window or block size, or one per query head.
    `padding` [B, S] bool takes what is False out of the text: it is neither seen nor counted, and its queries give 0.
    `position` [S] or [B, S] is needed when a cache has dropped keys: where each key stands in the text. The first
    `sinks` keys must be the text's first, the others consecutive; if it lives on the CPU, a GPU need not wait for it.
    `softcap` c bends a score s to c tanh(s / c).

    Returns [B, H, T, D] in the query's type. Raises ValueError for shapes and positions that do not fit.

    >>> local_attention(q, k, v, span=256, sinks=4)
    """
    span = checked(span)
    _check(query, key, value, span, kind, sinks)
    heads = span if isinstance(span, tuple) else (span,)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    rules = {one: Rule(one, kind, sinks, scale, softcap) for one in dict.fromkeys(heads)}
    layout = read_layout(query.shape, key.shape[2], rules.values(), position, padding)
    supported, why = _kernel_supports(query, key, value, layout, softcap)
    if choose(backend, query.device, supported, why) == "triton":
        from zq_lib.masformer.kernels import banded_attention

        return banded_attention(query, key, value, heads, kind, sinks, layout.texts, scale)
    record(Launch("masformer.local", "torch"))
    if len(rules) == 1:
        return _batch(query, key, value, layout, rules[heads[0]])
    return _per_head(query, key, value, heads, layout, rules)


def _kernel_supports(query: Tensor, key: Tensor, value: Tensor, layout: Layout, softcap: float | None) -> tuple:
    """Whether the Triton kernels can do this call, and if not, why. Does not import them."""
    if softcap is not None:
        return False, "the kernels have no softcap"
    if any(text.real is not None for text in layout.texts):
        return False, "padding stands between real tokens"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not key.dtype == value.dtype == query.dtype:
        return False, f"q, k, v are {query.dtype}, {key.dtype}, {value.dtype}, not all float32, float16 or bfloat16"
    if query.shape[-1] > WIDEST_HEAD:
        return False, f"the head width {query.shape[-1]} is above {WIDEST_HEAD}"
    return True, ""


def _batch(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """All rows of a batch. [B, H, T, D]"""
    if len(layout.texts) == 1:
        return _text(query, key, value, layout.texts[0], rule)
    T, S = query.shape[2], key.shape[2]
    if T * S <= (2 * MOST_CHUNK) ** 2 and T <= LEAST_CHUNK:  # decoding: one masked call beats one call per row
        return _masked(query, key, value, layout, rule)
    rows = [_text(query[b : b + 1], key[b : b + 1], value[b : b + 1], t, rule) for b, t in enumerate(layout.texts)]
    return torch.cat(rows)


def _masked(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Few queries of padded texts under one dense mask."""
    T, S = query.shape[2], key.shape[2]
    mask = visible(
        T, S, rule.span, rule.kind, rule.sinks, position=layout.position, padding=layout.padding, device=query.device
    )
    alive = mask.any(-1, keepdim=True)  # [B, 1, T, 1]
    out = _attend(query, *_repeated(query, key, value), mask | ~alive, False, rule)
    return torch.where(alive, out, 0.0)


def _text(query: Tensor, key: Tensor, value: Tensor, text: Text, rule: Rule) -> Tensor:
    """Rows that share a layout: take the padding out, attend, put zeros where it was."""
    T, S = query.shape[2], key.shape[2]
    if text.real is not None:
        rows = text.real[text.real >= S - T] - (S - T)
        key, value = key[:, :, text.real], value[:, :, text.real]
        out = torch.zeros_like(query)
        return out.index_copy(2, rows, _spans(query[:, :, rows], key, value, text.gap, rule)) if len(rows) else out
    start, stop = max(0, text.first - (S - T)), max(0, text.last - (S - T))  # the real queries
    if start >= stop:
        return torch.zeros_like(query)
    key, value = key[:, :, text.first : text.last], value[:, :, text.first : text.last]
    out = _spans(query[:, :, start:stop], key, value, text.gap, rule)
    return out if stop - start == T else F.pad(out, (0, 0, start, T - stop))


def _spans(query: Tensor, key: Tensor, value: Tensor, gap: int, rule: Rule) -> Tensor:
    """Unpadded rows: dense until the chunks' slices leave the start and the sinks behind, chunks, the dense rest."""
    T, S = query.shape[2], key.shape[2]
    if rule.span is None or (not gap and rule.span >= S):
        mask = None
        if 1 < T < S:
            mask = visible(T, S, None, device=query.device)
        return _attend(query, *_repeated(query, key, value), mask, T == S, rule)
    past = S - T  # keys before the first query
    head = max(0, rule.back + rule.sinks - past)
    if rule.kind == "window":
        chunk = min(MOST_CHUNK, max(LEAST_CHUNK, rule.span // 2))
        count = max(0, T - head) // chunk
        head = T - count * chunk
    else:
        chunk = rule.span * max(1, LEAST_CHUNK // rule.span)
        head += -(past + gap + head) % rule.span
        count = max(0, T - head) // chunk
    if not count:
        return _dense(query, key, value, 0, T, gap, rule)
    stop = head + count * chunk
    parts = [_chunks(query[:, :, head:stop], key, value, past + head, chunk, rule)]
    if head:
        parts.insert(0, _dense(query, key, value, 0, head, gap, rule))
    if stop < T:
        parts.append(_dense(query, key, value, stop, T, gap, rule))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _dense(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, gap: int, rule: Rule) -> Tensor:
    """Queries [start, stop) against the keys that any of them sees, in one call."""
    past = key.shape[2] - query.shape[2]
    first = rule.earliest(past + start + gap) - gap  # index of the first key besides sinks
    stop_key = past + stop
    place = torch.arange(max(first, 0), stop_key, device=query.device)
    if first > rule.sinks:
        place = torch.cat([torch.arange(rule.sinks, device=query.device), place])
        key, value = (torch.cat([x[:, :, : rule.sinks], x[:, :, first:stop_key]], 2) for x in (key, value))
    else:
        place = torch.arange(stop_key, device=query.device)
        key, value = key[:, :, :stop_key], value[:, :, :stop_key]
    place = torch.where(place < rule.sinks, place, place + gap)
    mask = None
    if stop - start > 1:
        mask = sees(place[start - stop :, None], place[None, :], rule.span, rule.kind, rule.sinks)
    return _attend(query[:, :, start:stop], *_repeated(query, key, value), mask, False, rule)


def _chunks(query: Tensor, key: Tensor, value: Tensor, first: int, chunk: int, rule: Rule) -> Tensor:
    """Whole chunks of queries, the first at key `first`, past the sinks. One batched call with one mask for all."""
    B, H, T, D = query.shape
    back, width = rule.back, rule.back + chunk

    def slices(x: Tensor) -> Tensor:
        (near,) = _repeated(query, x[:, :, first - back : first + T])
        near = near.reshape(B * H, back + T, D).unfold(1, width, chunk).mT  # [B H, n, K, D]
        if not rule.sinks:
            return near
        (far,) = _repeated(query, x[:, :, : rule.sinks])
        return torch.cat([far.reshape(B * H, 1, rule.sinks, D).expand(-1, T // chunk, -1, -1), near], 2)

    causal = rule.kind == "block" and chunk == rule.span and not rule.sinks
    mask = None
    if not causal:
        place = torch.arange(width, device=query.device)
        mask = F.pad(sees(place[back:, None], place[None, :], rule.span, rule.kind, 0), (rule.sinks, 0), value=True)
    rows = query.reshape(B * H, T // chunk, chunk, D)
    return _attend(rows, slices(key), slices(value), mask, causal, rule).reshape(B, H, T, D)


def _repeated(query: Tensor, *keys: Tensor) -> list[Tensor]:
    """Keys or values with as many heads as the query: after they are cut, so that only what is seen is copied."""
    group = query.shape[1] // keys[0].shape[1]
    return [x if group == 1 else x.repeat_interleave(group, 1) for x in keys]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, rule: Rule) -> Tensor:
    """Dense attention of one batched call."""
    if rule.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=rule.scale)
    scores = rule.softcap * torch.tanh(query @ key.mT * (rule.scale / rule.softcap))
    if causal:
        mask = visible(query.shape[-2], key.shape[-2], None, device=query.device)[0, 0]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def _per_head(query: Tensor, key: Tensor, value: Tensor, span: tuple, layout: Layout, rules: dict) -> Tensor:
    """Heads of one span at a time. [B, H, T, D]"""
    out, group = [None] * len(span), query.shape[1] // key.shape[1]
    for one, rule in rules.items():
        heads = [h for h, s in enumerate(span) if s == one]
        owners = [h // group for h in heads]
        found = _batch(query[:, heads], key[:, owners], value[:, owners], layout, rule)
        for i, h in enumerate(heads):
            out[h] = found[:, i]
    return torch.stack(out, 1)


def _check(query: Tensor, key: Tensor, value: Tensor, span: Span, kind: str, sinks: int) -> None:
    """Raise ValueError naming the first argument that does not fit."""
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} must be [B, H, T, D] and "
            "twice [B, G, S, D]"
        )
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != D or not G or H % G or not 0 < T <= S:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}: batch and width must agree, H be a "
            "multiple of G, and the queries be the last T of the S keys"
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}")
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks={sinks!r} must be a whole number of at least 0, for example 4")
    if isinstance(span, tuple) and len(span) != H:
        raise ValueError(f"span names {len(span)} heads but the query has {H}; give one number, or one per query head")

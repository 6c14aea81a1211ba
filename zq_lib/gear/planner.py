"""Which layer gets which bytes: settings per layer for a budget, from measured errors of the attention's output.

One forward run over a calibration text gives queries, keys and values of every layer. Every candidate compresses the
text's start, and the last queries attend to it: their error, relative to exact attention, is what a candidate costs in
quality. Choosing one candidate per layer with the least sum of squared errors within the budget is a multiple-choice
knapsack. The paper names such an allocation as open work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from zq_lib.core.lab import Row
from zq_lib.gear.cache import GearCache
from zq_lib.gear.config import Codec, GearConfig
from zq_lib.gear.outliers import PAGE, per_side
from zq_lib.gear.packed import compress
from zq_lib.gear.packing import row_bytes
from zq_lib.gear.quantize import group_view

QUERIES = 64  # of the text's end that judge a candidate
STATES = 4096  # of the knapsack that are kept after each layer
_CAPTURE = "zq_gear_capture"


@dataclass(frozen=True)
class Plan:
    """One setting per layer: `GearCache(model.config, plan.configs)`.

    nbytes   that such a cache holds after one prompt of `tokens` tokens, to the byte.
    bits     per compressed element there.
    error    root mean square over layers of the attention output's relative error on the calibration text.
    tried    how many candidates each layer was offered.
    rows     one per layer: setting, bytes, error, and why.
    """

    configs: tuple[GearConfig, ...]
    tokens: int
    nbytes: int
    bits: float
    error: float
    tried: int
    rows: tuple[Row, ...]


def default_candidates() -> tuple[GearConfig, ...]:
    """2, 3, 4 and 8 bits for keys and for values; at 2 and 3 bits also with clipped ranges and outliers, or with low
    rank; never fewer bits for keys than for values. All keep four sinks and gather 64 tokens."""
    keys = [(b, 0.0, 0) for b in (2, 3, 4, 8)] + [(2, 0.015, 0), (3, 0.015, 0), (2, 0.0, 2), (3, 0.0, 2)]
    values = [(b, 0.0, 0) for b in (2, 3, 4, 8)] + [(2, 0.01, 0), (3, 0.01, 0)]
    return tuple(
        GearConfig(
            bits=(k[0], v[0]), outliers=(k[1], v[1]), clip=(k[1] > 0, v[1] > 0), rank=(k[2], v[2]),
            rank_decode=(k[2], v[2]), factor_bits=8,
        )
        for k in keys
        for v in values
        if k[0] >= v[0]
    )  # fmt: skip


def plan(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    tokens: int = 1024,
    candidates: Sequence[GearConfig] | None = None,
) -> Plan:
    """Choose a setting for every layer of `model`.

    Args: `ids` [1, S] calibration text, S at least a buffer and 64 more (512 do); the budget, either `bits` per
    compressed element or `nbytes` of the whole cache, both for one prompt of `tokens` tokens; `candidates` to choose
    from, with the same sinks, recent and buffer, by default `default_candidates()`. Raises ValueError when the budget
    is below the cheapest choice, and for a model with layers that GearCache does not compress.
    """
    if (bits is None) == (nbytes is None):
        raise ValueError(f"bits={bits!r} and nbytes={nbytes!r}: give exactly one of the two budgets")
    candidates = tuple(default_candidates() if candidates is None else candidates)
    _check(model, candidates, tokens)
    captured = capture(model, ids)
    size = captured[0].keys.element_size()
    shapes = [(c.keys.shape[1], c.keys.shape[3]) for c in captured]
    n = compressed_tokens(candidates[0], tokens)
    elements = sum(2 * heads * n * width for heads, width in shapes)
    exact = sum(2 * heads * (tokens - n) * width * size for heads, width in shapes)
    costs = [[layer_nbytes(c, tokens, *shape, size) for c in candidates] for shape in shapes]
    budget = nbytes if bits is None else int(bits * elements / 8) + exact
    if budget < (least := sum(map(min, costs))):
        asked = f"nbytes={nbytes}" if bits is None else f"bits={bits}"
        would = least if bits is None else f"{math.ceil(8000 * (least - exact) / elements) / 1000}"
        raise ValueError(
            f"{asked} is below the cheapest choice for {tokens} tokens; give at least {would}, or cheaper candidates"
        )
    errors = [candidate_errors(c, candidates) for c in captured]
    chosen = knapsack(costs, [[e * e for e in row] for row in errors], budget)
    spent = sum(row[j] for row, j in zip(costs, chosen, strict=True))
    return Plan(
        configs=tuple(candidates[j] for j in chosen),
        tokens=tokens,
        nbytes=spent,
        bits=8 * (spent - exact) / elements,
        error=float(np.sqrt(np.mean([row[j] ** 2 for row, j in zip(errors, chosen, strict=True)]))),
        tried=len(candidates),
        rows=tuple(_row(i, j, candidates, costs[i], errors[i]) for i, j in enumerate(chosen)),
    )


def _check(model: PreTrainedModel, candidates: tuple[GearConfig, ...], tokens: int) -> None:
    if not candidates:
        raise ValueError("candidates=() leaves nothing to choose from; give at least one GearConfig")
    for name in ("sinks", "recent", "buffer"):
        if len(found := sorted({getattr(c, name) for c in candidates})) > 1:
            raise ValueError(f"candidates differ in {name} ({found}); a plan needs the same in all, use one of them")
    if compressed_tokens(candidates[0], tokens) == 0:
        raise ValueError(
            f"tokens={tokens} is too short a prompt for anything to be compressed; plan for at least "
            f"{candidates[0].sinks + candidates[0].recent + candidates[0].buffer}"
        )
    cache = GearCache(model.config, candidates[0])
    if len(cache.gear_layers()) != len(cache.layers):
        raise ValueError(
            f"model={type(model).__name__} has layers that GearCache does not compress; choose settings for it by hand"
        )


def _row(layer: int, j: int, candidates: Sequence[GearConfig], costs: list[int], errors: list[float]) -> Row:
    """The choice of one layer, and the nearest ones it was preferred to."""
    front = [i for i in range(len(costs)) if not any(_better(costs, errors, k, i) for k in range(len(costs)))]
    cheaper = max((i for i in front if costs[i] < costs[j]), key=lambda i: costs[i], default=None)
    dearer = min((i for i in front if costs[i] > costs[j]), key=lambda i: costs[i], default=None)
    parts = []
    if cheaper is not None:
        gap = costs[j] - costs[cheaper]
        parts.append(f"{describe(candidates[cheaper])} would save {gap} bytes for an error of {errors[cheaper]:.3f}")
    if dearer is not None:
        gap = costs[dearer] - costs[j]
        parts.append(f"{describe(candidates[dearer])} would cost {gap} bytes more for {errors[dearer]:.3f}")
    chosen = candidates[j]
    return {
        "layer": layer, "setting": describe(chosen), "bits_k": chosen.keys.bits, "bits_v": chosen.values.bits,
        "rank_k": chosen.keys.rank, "rank_v": chosen.values.rank, "outliers_k": chosen.keys.outliers,
        "outliers_v": chosen.values.outliers, "clip_k": chosen.keys.clip, "clip_v": chosen.values.clip,
        "bytes": costs[j], "error": errors[j],
        "why": f"error {errors[j]:.3f}; " + ", ".join(parts or ["there was no other choice"]),
    }  # fmt: skip


def _better(costs: list[int], errors: list[float], a: int, b: int) -> bool:
    """Whether a is no worse than b in both respects and better in one."""
    return (
        costs[a] <= costs[b]
        and errors[a] <= errors[b]
        and (costs[a], errors[a], a) != (costs[b], errors[b], b)
        and (costs[a] < costs[b] or errors[a] < errors[b] or a < b)
    )


def describe(config: GearConfig) -> str:
    """A setting in a few words: "keys 3 bits rank 2, values 2 bits outliers clip"."""

    def side(codec: Codec) -> str:
        extras = [f"rank {codec.rank}"] * (codec.rank > 0) + ["outliers"] * (codec.outliers > 0) + ["clip"] * codec.clip
        return " ".join([f"{codec.bits} bits", *extras])

    return f"keys {side(config.keys)}, values {side(config.values)}"


def knapsack(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Which option of every item, so that the losses' sum is least and the costs' sum is at most `budget`.

    Exact as long as the Pareto front of partial sums has at most `STATES` entries; beyond that the front is thinned to
    the best state in each of `STATES` steps of the budget, which always leaves a choice within the budget. Raises
    ValueError when none exists.
    """
    rest = np.cumsum([0, *(min(c) for c in reversed(costs))])[::-1]  # the least that items from i on cost
    cost, loss, history = np.zeros(1, np.int64), np.zeros(1), []
    for i, (c, e) in enumerate(zip(costs, losses, strict=True)):
        total = (cost[:, None] + np.asarray(c, np.int64)).ravel()
        summed = (loss[:, None] + np.asarray(e, float)).ravel()
        order = np.lexsort((summed, total))
        order = order[total[order] + rest[i + 1] <= budget]
        if not len(order):
            raise ValueError(f"budget={budget} is below the cheapest choice; give at least {rest[0]}")
        best = np.minimum.accumulate(summed[order])
        order = order[np.concatenate([[True], best[1:] < best[:-1]])]  # the Pareto front, cheapest first
        if len(order) > STATES:
            span = total[order] - total[order[0]]
            step = span * (STATES - 1) // max(1, span[-1])
            last = np.append(step[1:] != step[:-1], True)  # the least loss of each step
            last[0] = True
            order = order[last]
        history.append((order // len(c), order % len(c)))
        cost, loss = total[order], summed[order]
    state, chosen = len(loss) - 1, []  # the dearest state of the front has the least loss
    for parent, option in reversed(history):
        chosen.append(int(option[state]))
        state = int(parent[state])
    return chosen[::-1]


@dataclass(frozen=True, eq=False)
class Captured:
    """One layer's attention in a full-precision run: the last queries [1, H, T, D], keys and values [1, G, S, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        """What these queries get from other keys and values, [1, H, T, D] float32; exact causal attention."""
        rep = self.queries.shape[1] // keys.shape[1]
        t, s = self.queries.shape[2], keys.shape[2]
        seen = torch.ones(t, s, dtype=torch.bool, device=keys.device).tril(s - t)
        scores = self.scale * self.queries.float() @ keys.float().repeat_interleave(rep, 1).mT
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.float().repeat_interleave(rep, 1)


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor, queries: int = QUERIES) -> list[Captured]:
    """Queries (the last `queries`), keys and values of every layer in one run over `ids` [1, S]."""
    found: dict[int, Captured] = {}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object):  # noqa: ANN202
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        found[module.layer_idx] = Captured(query[:, :, -queries:].clone(), key, value, scale)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    with _attention(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)
    return [found[layer] for layer in sorted(found)]


@contextlib.contextmanager
def _attention(model: PreTrainedModel, function: object) -> Iterator[None]:
    """`function` as the model's attention, inside a `with` block."""
    before = model.config._attn_implementation
    AttentionInterface.register(_CAPTURE, function)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
    try:
        model.set_attn_implementation(_CAPTURE)
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def candidate_errors(captured: Captured, candidates: Sequence[GearConfig]) -> list[float]:
    """Relative error of the attention's output under each candidate, over all heads and the captured queries.

    As in `measure.teacher_forced`, the captured queries' own tokens are exact and those before them are compressed.
    Raises ValueError when the text is too short for anything to be.
    """
    exact = captured.attend(captured.keys, captured.values)
    prompt = captured.keys.shape[2] - captured.queries.shape[2]
    restored: dict[tuple, Tensor] = {}  # many candidates share a side

    def side(x: Tensor, codec: Codec, config: GearConfig) -> Tensor:
        n = compressed_tokens(config, prompt)
        if n == 0:
            raise ValueError(
                f"ids hold {captured.keys.shape[2]} tokens, too few to compress any with buffer={config.buffer}; give "
                f"at least {captured.queries.shape[2] + config.sinks + config.recent + config.buffer}"
            )
        name = (codec, config.sinks, n)
        if name not in restored:
            start, stop = config.sinks, config.sinks + n
            packed = compress(x[:, :, start:stop], codec, prompt=n >= config.long_segment(), seed=start)
            restored[name] = torch.cat([x[:, :, :start].float(), packed.dequantize(), x[:, :, stop:].float()], 2)
        return restored[name]

    found = []
    for config in candidates:
        keys = side(captured.keys, config.keys, config)
        values = side(captured.values, config.values, config)
        found.append(float((captured.attend(keys, values) - exact).norm() / exact.norm()))
    return found


def compressed_tokens(config: GearConfig, tokens: int) -> int:
    """How many of a prompt's tokens are compressed at once: whole buffers, without sinks and recent ones."""
    return max(0, tokens - config.sinks - config.recent) // config.buffer * config.buffer


def layer_nbytes(config: GearConfig, tokens: int, heads: int, width: int, itemsize: int = 4) -> int:
    """Bytes of one layer's cache, one row, after a prompt of `tokens`; without running anything.

    `heads` and `width` of keys and values, `itemsize` of the model's dtype.
    """
    n = compressed_tokens(config, tokens)
    exact = 2 * heads * (tokens - n) * width * itemsize
    if n == 0:
        return exact
    sides = (config.keys, config.values)
    return exact + sum(segment_nbytes(c, n, heads, width, prompt=n >= config.long_segment()) for c in sides)


def segment_nbytes(codec: Codec, n: int, heads: int, width: int, *, prompt: bool = True) -> int:
    """Bytes of one side of a segment of `n` tokens (the method's size formula, with one-byte positions)."""
    size = heads * n * row_bytes(width, codec.bits)
    groups = int(np.prod(group_view(codec, (1, 1, heads, n, width)).stored))
    size += 2 * groups * (4 if codec.meta_dtype == "float32" else 2)
    if rank := min(codec.rank if prompt else codec.rank_decode, n, width):
        size += heads * rank * ((n + width) * codec.factor_bits // 8 + (4 if codec.factor_bits == 8 else 0))
    if codec.outlier_scope == "head":
        entries = 2 * per_side(codec, n * width) * heads
    elif codec.kind == "key":
        entries = 2 * per_side(codec, n) * width * heads
    else:
        entries = 2 * per_side(codec, heads * width) * n
    if entries:
        size += entries * (1 + (1 if width <= 256 else 2) + 2) + 4 * (heads * -(-n // PAGE) + 1)
    return size

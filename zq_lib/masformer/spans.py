"""Which keys each layer may see, as data: one plan drives attention, cache, cost estimate and pictures.

Positions count from the first real token. Query i sees key j <= i if

    full        always                             i + 1 keys
    window w    i - w < j                          min(i + 1, w) keys, its own among them
    block b     floor(j / b) = floor(i / b)        (i mod b) + 1 keys
    two_block b floor(i / b) - floor(j / b) <= 1   between b and 2 b keys, fewer in the first block
    sinks s     or j < s                           (section 3 of the paper has none)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from zq_lib.core.lab import Row

Span = None | int | tuple[int | None, ...]  # full | one window or block size | one per query head

KINDS = ("window", "block", "two_block")
PLACEMENTS = ("bottom", "top", "middle", "even", "alternate:n")


@dataclass(frozen=True)
class Cost:
    """Score entries (pairs of a query and a key it sees) of a text, per query head: by layer, and if all were full."""

    length: int
    layers: tuple[float, ...]
    full: int

    @property
    def total(self) -> float:
        """Score entries of all layers."""
        return sum(self.layers)

    @property
    def share(self) -> float:
        """What is left of full attention's work, between 0 and 1."""
        return self.total / self.full


@dataclass(frozen=True)
class Speedup:
    """How much faster a forward pass can become if time followed the FLOP (Amdahl's law)."""

    attention_share: float  # of the full model's FLOP
    attention: float  # gain of the attention alone
    end_to_end: float  # gain of the whole model


@dataclass(frozen=True)
class SpanPlan:
    """The span of every layer. `kind` says what a number means, `sinks` how many first tokens stay visible everywhere.

    >>> SpanPlan.mixed(30, full=(8, 17, 18, 20, 21, 22, 23, 27), span=64, sinks=4).cost(1024).share
    """

    layers: tuple[Span, ...]
    kind: str = "window"
    sinks: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ValueError(f"layers={self.layers!r} is no plan; give a span for each layer, None where it is full")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks={self.sinks!r} must be a whole number of at least 0, for example 4")
        object.__setattr__(self, "layers", tuple(checked(span, f"layers[{i}]") for i, span in enumerate(self.layers)))

    @classmethod
    def mixed(cls, layers: int, *, full: Iterable[int], span: Span, kind: str = "window", sinks: int = 0) -> Self:
        """Layers in `full` see everything, all others have `span`. Raises ValueError for a layer that is not there."""
        full = tuple(full)
        for layer in full:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
                raise ValueError(f"full names layer {layer!r}, but the model has layers 0 to {layers - 1}")
        return cls(tuple(None if layer in full else span for layer in range(layers)), kind, sinks)

    @property
    def full(self) -> tuple[int, ...]:
        """Layers in which every head sees the whole text."""
        return tuple(i for i in range(len(self.layers)) if self.spans(i) == (None,))

    def spans(self, layer: int) -> tuple[int | None, ...]:
        """The different spans of a layer's heads; (None,) for a full layer."""
        span = self.layers[layer]
        return tuple(dict.fromkeys(span)) if isinstance(span, tuple) else (span,)

    def reach(self, layer: int) -> int | None:
        """How many last keys, its own included, a query of this layer may need besides sinks; None for all of them.

        A cache must keep `reach - 1` keys (and the sinks) to be ready for the next query.
        """
        spans = self.spans(layer)
        if None in spans:
            return None
        return max(spans) * (2 if self.kind == "two_block" else 1)

    def kept(self, layer: int, length: int) -> int:
        """The most keys that a cache holds in this layer for a text of `length` tokens."""
        reach = self.reach(layer)
        return length if reach is None else min(length, self.sinks + reach - 1)

    def cost(self, length: int) -> Cost:
        """Exact score entries for a text of `length` tokens; heads with different spans are averaged."""
        layers = []
        for span in self.layers:
            heads = span if isinstance(span, tuple) else (span,)
            found = [entries(length, head, self.kind, self.sinks) for head in heads]
            layers.append(found[0] if len(set(found)) == 1 else sum(found) / len(found))
        return Cost(length, tuple(layers), len(layers) * entries(length, None))

    def flops(self, length: int, heads: int, width: int) -> float:
        """FLOP of the two products of attention, forward: 4 per score entry, head and channel. Backward: 2.5 times."""
        return 4 * heads * width * self.cost(length).total

    def kv_bytes(self, length: int, heads: int, width: int, itemsize: int) -> int:
        """Bytes of keys and values of one text of `length` tokens; `heads` are key/value heads."""
        held = sum(self.kept(layer, length) for layer in range(len(self.layers)))
        return 2 * held * heads * width * itemsize

    def speedup(self, length: int, width: int, vocabulary: int, dense: int | None = None) -> Speedup:
        """Gains by count of FLOP for a model of `width` channels, forward on `length` tokens.

        `dense` is the number of weights of a layer's matrices, 12 width^2 in the usual decoder.
        """
        dense = 12 * width * width if dense is None else dense
        cost = self.cost(length)
        attention = 4 * width * cost.full
        rest = 2 * length * (len(self.layers) * dense + vocabulary * width)
        share = attention / (attention + rest)
        return Speedup(share, 1 / cost.share, 1 / (1 - share + share * cost.share))

    def describe(self, length: int) -> list[Row]:
        """One row per run of equal layers: which, what they see, and their part of full attention's work."""
        cost, rows, start = self.cost(length), [], 0
        one = entries(length, None)
        for stop in range(1, len(self.layers) + 1):
            if stop < len(self.layers) and self.layers[stop] == self.layers[start]:
                continue
            rows.append(
                {
                    "layers": str(start) if stop - start == 1 else f"{start} to {stop - 1}",
                    "sees": self._words(self.layers[start]),
                    "score entries": (stop - start) * cost.layers[start],
                    "share of full": cost.layers[start] / one,
                    "keys kept": self.kept(start, length),
                }
            )
            start = stop
        return rows

    def _words(self, span: Span) -> str:
        if span is None:
            return "everything"
        sinks = f" and {self.sinks} sinks" if self.sinks else ""
        numbers = "/".join("all" if s is None else str(s) for s in span) if isinstance(span, tuple) else str(span)
        return f"{self.kind.replace('_', ' ')} {numbers}{sinks}"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it; `from_dict` reads it back."""
        layers = [list(span) if isinstance(span, tuple) else span for span in self.layers]
        return {"layers": layers, "kind": self.kind, "sinks": self.sinks}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises ValueError naming the first key that is missing or unknown."""
        wanted = {"layers", "kind", "sinks"}
        for key in sorted(wanted ^ set(found)):
            raise ValueError(f"{key!r} is {'missing from' if key in wanted else 'no part of'} a plan: {dict(found)!r}")
        layers = [tuple(span) if isinstance(span, list) else span for span in found["layers"]]
        return cls(tuple(layers), found["kind"], found["sinks"])

    def to_layer_types(self) -> dict[str, Any]:
        """The settings that give a transformers model with `layer_types` this plan: update its config with them.

        Raises ValueError for a plan that these settings cannot say: blocks, sinks, or more than one window.
        """
        spans = {span for span in self.layers if span is not None}
        if self.kind != "window" or self.sinks or len(spans) > 1 or any(isinstance(s, tuple) for s in spans):
            raise ValueError(
                f"kind={self.kind!r}, sinks={self.sinks} and spans {sorted(map(str, spans))} cannot be written as "
                "layer_types, which know one window and no sinks; attach the plan instead"
            )
        kinds = ["full_attention" if span is None else "sliding_attention" for span in self.layers]
        return {"layer_types": kinds, "sliding_window": spans.pop() if spans else None}


def checked(span: Span, name: str = "span") -> Span:
    """A span as the library keeps it. Raises ValueError when it is none."""
    if isinstance(span, list | tuple):
        if not span:
            raise ValueError(f"{name}={span!r} has no head; give one number per query head")
        return tuple(_size(head, f"{name}[{i}]") for i, head in enumerate(span))
    return _size(span, name)


def _size(size: Any, name: str) -> int | None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"{name}={size!r} must be None (full) or a whole number of at least 1, for example 64")
    return size


def entries(length: int, span: int | None, kind: str = "window", sinks: int = 0) -> int:
    """Pairs (i, j) that one head of one layer computes for a text of `length` tokens. Exact."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a whole number of tokens of at least 1")
    if span is None:
        return length * (length + 1) // 2
    if kind == "window":
        return _clipped(length, span) + _clipped(length - span, sinks)
    blocks, rest = divmod(length, span)
    count = blocks * span * (span + 1) // 2 + rest * (rest + 1) // 2
    lag = 0
    if kind == "two_block":
        count += max(0, length - span) * span
        lag = 1
    # A row of block n sees from token (n - lag) span on, and the sinks before that.
    short = min(blocks + 1, lag + sinks // span + 1)  # blocks that start before all sinks are out of their span
    for n in range(lag + 1, short):
        count += min(span, length - n * span) * (n - lag) * span
    return count + max(0, length - max(short, lag + 1) * span) * sinks


def _clipped(rows: int, most: int) -> int:
    """min(1, most) + ... + min(rows, most); 0 without rows."""
    most = max(0, min(rows, most))
    return max(0, rows) * most - most * (most - 1) // 2


def placement(name: str, layers: int, count: int) -> tuple[int, ...]:
    """The `count` layers of a fixed schedule that stay full.

    "bottom" (as in `MASFormerConfig.paper`), "top", "middle", "even", or "alternate:n": every n-th layer, whatever
    `count` is.
    """
    kind, _, every = name.partition(":")
    if kind == "alternate" and every.isdecimal() and int(every) >= 1:
        return tuple(range(int(every) - 1, layers, int(every)))
    if name not in PLACEMENTS[:-1]:
        raise ValueError(f"placement {name!r} is not known; choose one of {', '.join(PLACEMENTS)}, or list the layers")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= layers:
        raise ValueError(f"count={count!r} full layers are not possible in a model of {layers}; use 0 to {layers}")
    if kind == "even":
        return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))
    start = {"bottom": 0, "top": layers - count, "middle": (layers - count) // 2}[kind]
    return tuple(range(start, start + count))


def receptive_field(plan: SpanPlan, length: int, token: int | None = None) -> np.ndarray:
    """The influence cone of a token (the last one if None) in a text of `length` tokens, [L + 1, length] bool.

    Row m: which positions at the input of layer m can change the token's final state; the last row is the token alone.
    """
    token = length - 1 if token is None else token
    if not 0 <= token < length:
        raise ValueError(f"token={token} is outside the text; use 0 to {length - 1}")
    reached = np.zeros((len(plan.layers) + 1, length), dtype=bool)
    reached[-1, token] = True
    for layer in reversed(range(len(plan.layers))):
        above = reached[layer + 1]
        for span in plan.spans(layer):
            reached[layer] |= _seen(above, span, plan.kind, plan.sinks)
    return reached


def _seen(rows: np.ndarray, span: int | None, kind: str, sinks: int) -> np.ndarray:
    """Which keys at least one of the marked queries sees. [length] bool each."""
    length = len(rows)
    before = np.concatenate([[0], np.cumsum(rows)])  # marked queries below a position
    key = np.arange(length)
    if span is None:
        last = np.full(length, length)
    elif kind == "window":
        last = np.minimum(key + span, length)
    else:
        last = np.minimum((key // span + (2 if kind == "two_block" else 1)) * span, length)
    last[:sinks] = length
    return before[last] > before[key]

"""GEAR's settings. Each one checks itself and says what would do."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

BITS = (2, 3, 4, 8)
SCHEMES = ("kivi", "kcvt", "per_token")
PAIRED = ("bits", "outliers", "rank", "rank_decode", "clip", "factor_bits")  # may differ between keys and values
MAX_RANK = 64


@dataclass(frozen=True)
class Codec:
    """How one side, keys or values, is stored: what `GearConfig.keys` and `GearConfig.values` give."""

    kind: str  # "key" or "value"
    bits: int
    scheme: str
    group: int
    outliers: float
    outlier_scope: str
    outlier_round: str
    outlier_mode: str
    rank: int
    rank_decode: int
    clip: bool
    factor_bits: int
    value_vector: str
    meta_dtype: str
    solver: str
    iterations: int
    seed: int
    backend: str

    def per_channel(self) -> bool:
        """Whether a group runs along tokens within one channel (keys of KIVI and KCVT), not along channels."""
        return self.kind == "key" and self.scheme != "per_token"


@dataclass(frozen=True)
class GearConfig:
    """How a cache is compressed: X ~ codes + low rank + outliers (paper, section 3).

    A setting marked * takes one value, or a pair (keys, values).

    bits*          of a code: 2, 3, 4 or 8.
    scheme         which elements share a scale and a zero. "kivi": keys per channel over `group` tokens, values per
                   token over `group` channels. "kcvt": keys per channel over the segment, values per token.
                   "per_token": both like KIVI's values.
    group          elements per group, for "kivi" and "per_token"; values take at most the head width.
    outliers*      share of every vector kept exactly, half of it the largest and half the smallest (paper: 0.02).
    rank*          rank of the residual's factors in a prompt segment (paper: 4); 0 for none.
    rank_decode*   the same in a segment of one buffer (paper: 2).
    clip*          search for the range with the least squared error. Use it with outliers: alone it hurts.
    factor_bits*   16, or 8 for factors in int8 with a scale per column.
    sinks          first tokens of the text that stay exact; 0 is the paper's.
    buffer         newest tokens gather exactly until there are this many, then become a segment (paper: 20 or 64).
    recent         at least this many newest tokens always stay exact.
    prompt_segment a segment of at least this many tokens gets `rank`, a shorter one `rank_decode`; None is 4 buffers.
    outlier_scope  "vector" (paper): the same count in every key channel and value token; "head": over a head's slab.
    outlier_round  "nearest", "floor" or "ceil": how a share of a vector becomes a count.
    outlier_mode   "exact": an outlier is restored exactly; "paper": plus the low-rank part there, as published.
    value_vector   KCVT values: one range per token and "head", or over "all" heads as published.
    meta_dtype     of scale and zero: "float16" or "float32" (8 bits on keys with a large offset).
    solver         "power" (subspace iteration, orthonormalised every time) or "svd" (exact, slow).
    iterations     of the power solver.
    seed           of its starting vectors.
    backend        "auto", "torch" or "triton".
    """

    bits: int | tuple[int, int] = 2
    scheme: str = "kivi"
    group: int = 64
    outliers: float | tuple[float, float] = 0.02
    rank: int | tuple[int, int] = 4
    rank_decode: int | tuple[int, int] = 2
    clip: bool | tuple[bool, bool] = False
    factor_bits: int | tuple[int, int] = 16
    sinks: int = 4
    buffer: int = 64
    recent: int = 0
    prompt_segment: int | None = None
    outlier_scope: str = "vector"
    outlier_round: str = "nearest"
    outlier_mode: str = "exact"
    value_vector: str = "head"
    meta_dtype: str = "float16"
    solver: str = "power"
    iterations: int = 3
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in PAIRED:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(f"{name}={value!r} must be one value or a pair (keys, values)")
        for name, allowed in (
            ("scheme", SCHEMES),
            ("outlier_scope", ("vector", "head")),
            ("outlier_round", ("nearest", "floor", "ceil")),
            ("outlier_mode", ("exact", "paper")),
            ("value_vector", ("head", "all")),
            ("meta_dtype", ("float16", "float32")),
            ("solver", ("power", "svd")),
            ("backend", ("auto", "torch", "triton")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        for name, allowed in (("bits", BITS), ("factor_bits", (8, 16)), ("clip", (False, True))):
            for value in self.pair(name):
                if isinstance(value, bool) != (name == "clip") or value not in allowed:
                    raise ValueError(f"{name}={value!r} is not possible; use {_choice(allowed)}")
        for name in ("rank", "rank_decode"):
            for value in self.pair(name):
                _whole(name, value, 0, MAX_RANK)
        for name, low in (("group", 2), ("buffer", 1), ("sinks", 0), ("recent", 0), ("iterations", 1), ("seed", 0)):
            _whole(name, getattr(self, name), low)
        if self.prompt_segment is not None:
            _whole("prompt_segment", self.prompt_segment, 1)
        for value in self.pair("outliers"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(
                    f"outliers={value!r} must be a share of at least 0 and below 1, with at least one element of every "
                    "vector left to quantise; the paper uses 0.02"
                )
        if self.scheme == "kivi" and self.buffer % self.group:
            nearest = max(1, round(self.buffer / self.group)) * self.group
            raise ValueError(
                f"buffer={self.buffer} is not a multiple of group={self.group}, so key groups would not divide a "
                f"segment; use buffer={nearest}"
            )

    def pair(self, name: str) -> tuple[Any, Any]:
        """A setting for keys and for values."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value, value)

    @property
    def keys(self) -> Codec:
        """How keys are stored."""
        return self._codec("key", 0)

    @property
    def values(self) -> Codec:
        """How values are stored."""
        return self._codec("value", 1)

    def _codec(self, kind: str, side: int) -> Codec:
        chosen = {f.name: getattr(self, f.name) for f in fields(Codec) if f.name != "kind"}
        return Codec(kind=kind, **chosen | {name: self.pair(name)[side] for name in PAIRED})

    def long_segment(self) -> int:
        """From how many tokens on a segment gets the prompt's rank."""
        return 4 * self.buffer if self.prompt_segment is None else self.prompt_segment

    def but(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return replace(self, **changes)

    # Presets, named by what they cost and give. Bits per element are those of a long prompt at head width 64.

    @classmethod
    def quick(cls) -> Self:
        """The notebook's setting: the paper's 2-bit recipe."""
        return cls.paper()

    @classmethod
    def paper(cls, bits: int = 2) -> Self:
        """The paper's recipes: KIVI backbone at 2 bits, KCVT at 4 bits; outliers 2 %, rank 4 and 2, no sinks."""
        if bits == 4:
            return cls(bits=4, scheme="kcvt", buffer=20, sinks=0)
        if bits == 2:
            return cls(bits=2, scheme="kivi", buffer=64, sinks=0)
        raise ValueError(f"bits={bits!r} has no recipe in the paper; use 2 or 4")

    @classmethod
    def lite(cls) -> Self:
        """GEAR-L of the paper, 2 bits and low rank without outliers: 3.6 bits."""
        return cls.paper().but(outliers=0.0)

    @classmethod
    def plain(cls, bits: int | tuple[int, int] = 2, **changes: Any) -> Self:
        """Quantisation only (KIVI), as published: the baseline."""
        return cls(**{"bits": bits, "outliers": 0.0, "rank": 0, "rank_decode": 0, "sinks": 0} | changes)

    @classmethod
    def small(cls) -> Self:
        """The fewest bytes, 2.9 bits: 2 bits, clipped ranges, few outliers, 4 sinks. Not the paper's recipe."""
        return cls.plain(2, clip=True, outliers=(0.015, 0.01), sinks=4)

    @classmethod
    def balanced(cls) -> Self:
        """3.5 bits: plain 3 bits and 4 sinks. Not the paper's recipe; better than it at equal bytes on our model."""
        return cls.plain(3, sinks=4)

    @classmethod
    def near_lossless(cls) -> Self:
        """4.5 bits: plain 4 bits and 4 sinks. Not the paper's recipe."""
        return cls.plain(4, sinks=4)


PRESETS = {
    "paper_2bit": GearConfig.paper,
    "paper_4bit": lambda: GearConfig.paper(4),
    "lite": GearConfig.lite,
    "small": GearConfig.small,
    "balanced": GearConfig.balanced,
    "near_lossless": GearConfig.near_lossless,
}


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name}={value!r} must be a whole number {limit}")


def _choice(allowed: tuple) -> str:
    return ", ".join(map(str, allowed[:-1])) + f" or {allowed[-1]}"

"""MASFormer's settings. Each one checks itself and says what would do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from zq_lib.core.backend import BACKENDS
from zq_lib.masformer.spans import PLACEMENTS, Span, SpanPlan, checked, placement


@dataclass(frozen=True)
class MASFormerConfig:
    """Which layers keep full attention, and what the others see.

    full     a schedule ("bottom", "top", "middle", "even", "alternate:n") or the layers themselves, for example those
             that profiling found.
    count    how many layers stay full under a schedule; "alternate:n" and a list of layers ignore it.
    window   what a local layer sees: keys of a window, the query's own included, or of a block; or one number per head.
    kind     "window" (sliding), "block" (block-local) or "two_block" (own and previous block).
    sinks    first tokens that every query sees. A model trained with full attention needs some; 0 is the paper's.
    backend  "auto", "torch" or "triton".
    """

    full: str | tuple[int, ...] = "even"
    count: int = 8
    window: Span = 64
    kind: str = "window"
    sinks: int = 4
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.full, str):
            placement(self.full, max(self.count, 1) if isinstance(self.count, int) else 1, self.count)
        elif isinstance(self.full, Iterable):
            object.__setattr__(self, "full", tuple(self.full))
        else:
            raise ValueError(f"full={self.full!r} must be one of {', '.join(PLACEMENTS)}, or list the layers")
        object.__setattr__(self, "window", checked(self.window, "window"))
        if self.window is None:
            raise ValueError("window=None would leave no local layer; give its size, for example 64")
        SpanPlan((self.window,), self.kind, self.sinks)  # checks both
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is not known; choose one of {', '.join(BACKENDS)}")

    def plan(self, layers: int) -> SpanPlan:
        """The plan for a model of `layers` layers. Raises ValueError for layers that it does not have."""
        full = placement(self.full, layers, self.count) if isinstance(self.full, str) else self.full
        return SpanPlan.mixed(layers, full=full, span=self.window, kind=self.kind, sinks=self.sinks)

    @classmethod
    def quick(cls) -> Self:
        """The notebook's setting for the embedded model: 8 of its 30 layers full, a window of 64, four sinks."""
        return cls()

    @classmethod
    def paper(cls, count: int = 6, block: int = 1024) -> Self:
        """The paper's form: full attention at the bottom, block-local above, no sinks.

        The paper trains on after the change. Count and block are ours: with a quarter of its 24 layers full, three
        quarters is what the saving tends to on long texts, and "up to 75 %" is what the paper states.
        """
        return cls(full="bottom", count=count, window=block, kind="block", sinks=0)

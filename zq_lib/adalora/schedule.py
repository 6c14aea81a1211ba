"""The budget over time: how many ranks (or parameters) all adapters together may have at each step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The paper's cubic schedule (section 3.3, equation 12), from `start` to `target`.

    Steps count optimiser steps from 0. `warmup` is ti, `final` is the length tf of the last phase, `interval` delta T.
    The appendix of the paper prints another numerator, which overshoots `start` and never reaches `target`.
    Raises ValueError when no step is left between warm-up and final phase.
    """

    total: int
    warmup: int
    final: int
    interval: int
    start: int
    target: int

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total - self.final or self.final < 0:
            raise ValueError(
                f"warmup={self.warmup} and final={self.final} leave no step of total_steps={self.total} to share out "
                "ranks; shorten them so that warmup < total_steps - final"
            )

    @property
    def prunes(self) -> bool:
        """Whether there is anything to share out; if not, the adapters are a LoRA in SVD form."""
        return self.target < self.start

    @property
    def last(self) -> int:
        """The step after which the ranks are final: T - tf, or the last step of a schedule without final phase."""
        return min(self.total - self.final, self.total - 1)

    def budget(self, step: int) -> int:
        """b(t). The golden case:

        >>> s = Schedule(40, 4, 10, 1, 72, 36)
        >>> [s.budget(t) for t in (4, 5, 6, 17, 29, 30, 39)]
        [72, 68, 64, 40, 36, 36, 36]
        """
        if self.prunes and step >= self.last:
            return self.target
        if step <= self.warmup or not self.prunes:
            return self.start
        left = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        return int((self.start - self.target) * left**3 + self.target)

    def allocates(self, step: int) -> bool:
        """Whether the triplets are ranked anew at this step: every `interval` steps, and once at `last`."""
        regular = self.warmup < step < self.last and step % self.interval == 0
        return self.prunes and (regular or step == self.last)

    def allocation_steps(self) -> list[int]:
        """Every step at which `allocates` holds."""
        return [t for t in range(self.last + 1) if self.allocates(t)]

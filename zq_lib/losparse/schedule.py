"""How much of S may survive at each step: the cubic schedule, and the steps at which rows are masked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The paper's cubic schedule (section 4.2, equation 8), from 1 to `target`.

    Steps count optimiser steps from 0. `warmup` is ti, `final` is the length tf of the last phase, `interval` delta T.
    Raises ValueError when no step is left between warm-up and final phase.
    """

    total: int
    warmup: int
    final: int
    interval: int
    target: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total - self.final or self.final < 0:
            raise ValueError(
                f"warmup={self.warmup} and final={self.final} leave no step of total_steps={self.total} to drop rows "
                "in; shorten them so that warmup < total_steps - final"
            )

    @property
    def last(self) -> int:
        """The first step at the target: T - tf + 1, or the last step of a schedule without so long a final phase.

        With tf = 0 the formula alone would never get there.
        """
        return min(self.total - self.final + 1, self.total - 1)

    def share(self, step: int) -> float:
        """p(t). The golden case:

        >>> s = Schedule(total=100, warmup=20, final=30, interval=10, target=0.2)
        >>> [round(s.share(t), 3) for t in (0, 20, 21, 45, 70, 71, 99)]
        [1.0, 1.0, 0.953, 0.3, 0.2, 0.2, 0.2]
        """
        if step >= self.last:
            return self.target
        if step <= self.warmup:
            return 1.0
        left = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        return self.target + (1 - self.target) * left**3

    def masks(self, step: int) -> bool:
        """Whether rows are masked at this step: every `interval` steps after warm-up, and every step from `last` on."""
        return step >= self.last or (step > self.warmup and step % self.interval == 0)

    def mask_steps(self) -> list[int]:
        """Every step of the training at which `masks` holds."""
        return [t for t in range(self.total) if self.masks(t)]

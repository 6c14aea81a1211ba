"""LoSparse's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from zq_lib.losparse.schedule import Schedule

INITS = ("svd", "activation")
FORMS = ("window", "ema")
SCORES = ("sensitivity", "magnitude", "random")
BACKENDS = ("auto", "torch", "triton")


class PaperTask(NamedTuple):
    """One sample command of the authors' scripts."""

    low_rank: float
    remaining: float
    learning_rate: float
    epochs: int
    warmup: int
    final: int
    interval: int


PAPER_TASKS: dict[str, PaperTask] = {
    "MNLI": PaperTask(0.05, 0.15, 9e-5, 8, 675, 5 * 675, 10),
    "SQuADv1.1": PaperTask(0.05, 0.45, 5e-5, 10, 5400, 5 * 5400, 10),
    "CNN/DM": PaperTask(0.35, 0.05, 6e-5, 12, 2 * 6400, 8 * 6400, 100),
}


@dataclass(frozen=True)
class LoSparseConfig:
    """How every weight W [N, K] becomes U V + S, and how the rows of S are dropped.

    low_rank       share of a matrix's parameters that its low-rank part has: r = ceil(low_rank N K / (N + K)). 0 is
                   pruning alone.
    remaining      share of all entries of S that stay at the end, over the whole model. 0 is low rank alone. Together
                   at most 1: their sum is the share of the replaced weights that remains.
    init           "svd", or "activation": factors that see the layer's inputs, which `calibrate` makes.
    targets        "all-linear": every linear layer of the blocks; or patterns of module names such as "query".
    skip           patterns of layers that stay dense although `targets` names them.
    total_steps    T, the optimiser steps of the whole training. None for calibration alone, and where
                   `LoSparseCallback` can ask the Trainer.
    warmup, final  steps before rows are dropped and steps after; a float below one is a share of T (ti, tf).
    interval       steps between two masks (delta T).
    beta           smoothing of the rows' importance.
    form           "window" smooths the mean over the steps since the last mask, as the published code does; "ema"
                   smooths every step, as the paper prints.
    score          "sensitivity" (mean |S dL/dS| of the row), or the baselines "magnitude" and "random".
    shrink         in the final phase the kept rows are fixed and the others cut out of parameters and optimiser.
                   False masks at every step of it, as published.
    exact          keep at most the budget, and of equal rows the earlier; False is the published rule, by which the
                   row at the threshold and all that tie with it stay.
    round_to       the rows that a matrix keeps when it is cut are a multiple of this, the nearest one.
    min_rows       least number, and largest share, of rows that a matrix keeps: a number for all, or {name pattern:
    max_share      number}. They need exact=True.
    auto_dense     `finish` turns layers back into dense ones where these are cheaper.
    backend        "auto", "torch" or "triton".
    """

    low_rank: float = 0.05
    remaining: float = 0.15
    init: str = "svd"
    targets: str | tuple[str, ...] = "all-linear"
    skip: tuple[str, ...] = ()
    total_steps: int | None = None
    warmup: int | float = 0.05
    final: int | float = 0.25
    interval: int = 10
    beta: float = 0.85
    form: str = "window"
    score: str = "sensitivity"
    shrink: bool = True
    exact: bool = False
    round_to: int = 1
    min_rows: int | Mapping[str, int] = 0
    max_share: float | Mapping[str, float] = 1.0
    auto_dense: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("targets", "skip"):
            if isinstance(getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (("init", INITS), ("form", FORMS), ("score", SCORES), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        for name in ("low_rank", "remaining"):
            if not _number(value := getattr(self, name)) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a share from 0 to 1")
        if self.low_rank + self.remaining > 1 + 1e-12:
            raise ValueError(
                f"low_rank={self.low_rank} and remaining={self.remaining} sum to {self.low_rank + self.remaining:g}, "
                f"more than the weights have; lower remaining to {1 - self.low_rank:g}"
            )
        if self.low_rank + self.remaining == 0:
            raise ValueError("low_rank=0 and remaining=0 leave nothing of the weights; raise one, for example to 0.15")
        for name in ("interval", "round_to", *(["total_steps"] if self.total_steps is not None else [])):
            if not _whole(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("warmup", "final"):
            value = getattr(self, name)
            if not (isinstance(value, float) and 0 <= value < 1) and (not _whole(value) or value < 0):
                raise ValueError(f"{name}={value!r} must be a number of steps, or a share of them from 0 to below 1")
        if not _number(self.beta) or not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta!r} must be at least 0 and below 1")
        if not self.targets or not isinstance(self.targets, str | tuple):
            raise ValueError(f"targets={self.targets!r} names nothing; give 'all-linear' or patterns such as 'query'")
        if not isinstance(self.skip, tuple):
            raise ValueError(f'skip={self.skip!r} must be a tuple of name patterns, for example ("attention.*",)')
        self._check_bounds()
        if self.total_steps is not None:
            self.schedule(self.total_steps)

    def _check_bounds(self) -> None:
        for name, fits, meaning in (
            ("min_rows", lambda v: _whole(v) and v >= 0, "whole numbers of at least 0"),
            ("max_share", lambda v: _number(v) and 0 <= v <= 1, "shares from 0 to 1"),
        ):
            value = getattr(self, name)
            if not all(fits(v) for v in (value.values() if isinstance(value, Mapping) else [value])):
                raise ValueError(f"{name}={value!r} must hold {meaning}")
        if self.bounded and not self.exact:
            raise ValueError(
                f"min_rows={self.min_rows!r} and max_share={self.max_share!r} are bounds, which the published rule "
                "does not know; set exact=True with them"
            )

    @property
    def bounded(self) -> bool:
        """Whether a matrix has a least or a largest number of rows."""
        return self.min_rows != 0 or self.max_share != 1.0

    def rank(self, outputs: int, inputs: int) -> int:
        """r of an N x K matrix (section 4.1), at most the smaller side.

        >>> LoSparseConfig(low_rank=0.05).rank(384, 1536)
        16
        """
        exact = self.low_rank * outputs * inputs / (outputs + inputs)
        return min(math.ceil(exact - 1e-9), outputs, inputs)  # a whole number must not go up by its rounding error

    def schedule(self, total_steps: int | None = None) -> Schedule:
        """The share of S that may survive, over time.

        Raises ValueError when T is not known and when warm-up and final phase leave no step.
        """
        total = self.total_steps if total_steps is None else total_steps
        if total is None:
            raise ValueError("total_steps=None: give the number of optimiser steps that the training will take")
        steps = [value if isinstance(value, int) else int(value * total) for value in (self.warmup, self.final)]
        return Schedule(total, *steps, self.interval, float(self.remaining))

    def to_json(self) -> str:
        """All settings as JSON; `from_json` reads them back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for a setting that does not exist."""
        found: dict[str, Any] = json.loads(text)
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ValueError(f"{unknown[0]!r} is no setting of LoSparseConfig; remove it")
        return cls(**found)

    @classmethod
    def quick(cls, total_steps: int = 60) -> Self:
        """The lab's setting: 15 % of the replaced weights remain, 5 of them low rank."""
        return cls(low_rank=0.05, remaining=0.10, total_steps=total_steps, warmup=0.125, final=1 / 3, interval=5)

    @classmethod
    def paper(cls, task: str = "MNLI", total_steps: int | None = None) -> Self:
        """The authors' sample command for a task of `PAPER_TASKS`; masks go on in the final phase, as published."""
        if task not in PAPER_TASKS:
            raise ValueError(f"task={task!r} has no sample command; choose one of {', '.join(PAPER_TASKS)}")
        row = PAPER_TASKS[task]
        return cls(
            low_rank=row.low_rank, remaining=row.remaining, total_steps=total_steps, warmup=row.warmup,
            final=row.final, interval=row.interval, shrink=False,
        )  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

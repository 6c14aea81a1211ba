"""AdaLoRA's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from zq_lib.adalora.schedule import Schedule

SCORES = ("adalora", "smoothed", "sensitivity", "magnitude")
ALL_LINEAR = "all-linear"
Ranks = int | Mapping[str, int]


class PaperTask(NamedTuple):
    """One row of the paper's tables 8, 10 and 13."""

    learning_rate: float
    epochs: int
    orthogonality: float
    warmup: int
    interval: int
    final: int


PAPER_TASKS: dict[str, PaperTask] = {
    "MNLI": PaperTask(5e-4, 7, 0.1, 8000, 100, 50000),
    "RTE": PaperTask(1.2e-3, 50, 0.3, 600, 1, 1800),
    "QNLI": PaperTask(1.2e-3, 5, 0.1, 2000, 100, 8000),
    "MRPC": PaperTask(1e-3, 30, 0.1, 600, 1, 1800),
    "QQP": PaperTask(5e-4, 5, 0.1, 8000, 100, 25000),
    "SST-2": PaperTask(8e-4, 24, 0.1, 6000, 100, 22000),
    "CoLA": PaperTask(5e-4, 25, 0.5, 800, 10, 3500),
    "STS-B": PaperTask(2.2e-3, 25, 0.1, 800, 10, 2000),
    "SQuADv1.1": PaperTask(1e-3, 10, 0.1, 5000, 100, 25000),
    "SQuADv2.0": PaperTask(1e-3, 12, 0.1, 5000, 100, 50000),
    "XSum": PaperTask(5e-4, 25, 0.1, 6000, 100, 50000),
    "CNN/DM": PaperTask(5e-4, 15, 0.1, 5000, 100, 85000),
}


@dataclass(frozen=True)
class AdaLoraConfig:
    """How to adapt, and how the ranks are shared out.

    init_rank      rank of every adapter at the start, and the most that one can ever have (paper: 1.5 times target).
    target_rank    mean rank at the end. Not below `init_rank`, nothing is pruned: adapters in SVD form, all equal.
    budget         the final total itself, instead of `target_rank`; in `budget_unit`.
    budget_unit    "ranks", or "parameters": a triplet of an N x K matrix then costs N + K, and scores are per cost.
    min_rank       least and most final rank of a matrix: a number for all, or {name pattern: number}.
    max_rank
    total_steps    T, the optimiser steps of the whole training. None only where `AdaLoraCallback` can ask the Trainer.
    warmup, final  steps before the budget shrinks and steps after; a float below one is a share of T (ti, tf).
    interval       steps between two allocations (delta T); by default T / 100.
    beta1, beta2   smoothing of sensitivity and of uncertainty.
    orthogonality  weight gamma of the penalty that keeps P and Q orthogonal.
    penalty        "norm" is what every published run used, "squared" is what the paper prints.
    penalty_at     "step" adds the penalty's gradient at the optimiser step, after clipping, so the loss stays the
                   task's alone; "loss" leaves it to you to add `handle.penalty()` to the loss.
    alpha          the update is scaled by alpha / init_rank for ever; None is 2 init_rank, a scale of 2.
    dropout        on the adapters' input.
    init_std       of P and Q.
    targets        "all-linear": every linear layer of the blocks; or patterns of module names such as "query" or
                   "layer.*.output.dense".
    train_also     patterns of modules that are trained in full, for example "classifier".
    score          "adalora" (smoothed sensitivity times uncertainty), "smoothed", "sensitivity" or "magnitude" (|l|).
    sensitivity_at "post_step" pairs the new weights with the gradient, as all published code does; "pre_step" is the
                   paper's algorithm.
    ties           "exact" keeps exactly the budget; "threshold" drops all that tie, as published code does.
    shrink         cut the dropped triplets out of parameters and optimiser when the final ranks are known.
    backend        "auto", "torch" or "triton".
    """

    init_rank: int = 12
    target_rank: float = 8
    budget: int | None = None
    budget_unit: str = "ranks"
    min_rank: Ranks = 0
    max_rank: Ranks | None = None
    total_steps: int | None = None
    warmup: int | float = 0.1
    final: int | float = 0.3
    interval: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    penalty: str = "norm"
    penalty_at: str = "step"
    alpha: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    targets: str | tuple[str, ...] = ALL_LINEAR
    train_also: tuple[str, ...] = ()
    score: str = "adalora"
    sensitivity_at: str = "post_step"
    ties: str = "exact"
    shrink: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("targets", "train_also"):
            if isinstance(getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (
            ("budget_unit", ("ranks", "parameters")),
            ("penalty", ("norm", "squared")),
            ("penalty_at", ("step", "loss")),
            ("score", SCORES),
            ("sensitivity_at", ("post_step", "pre_step")),
            ("ties", ("exact", "threshold")),
            ("backend", ("auto", "torch", "triton")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        self._whole("init_rank", 1)
        for name in ("budget", "total_steps", "interval"):
            if getattr(self, name) is not None:
                self._whole(name, 0 if name == "budget" else 1)
        for name in ("warmup", "final"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 <= value < 1
            if not share and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}={value!r} must be a number of steps, or a share of them from 0 to below 1")
        self._between("beta1", 0, 1)
        self._between("beta2", 0, 1)
        for name, low, high in (
            ("target_rank", 0, math.inf),
            ("orthogonality", 0, math.inf),
            ("dropout", 0, 1),
            ("init_std", 0, math.inf),
        ):
            self._between(name, low, high, low_included=True)
        if self.alpha is not None:
            self._between("alpha", 0, math.inf)
        if self.ties == "threshold" and (self.budget_unit, self.min_rank, self.max_rank) != ("ranks", 0, None):
            raise ValueError("ties='threshold' knows no bounds and counts in ranks; use ties='exact' with them")
        if not self.targets or not isinstance(self.targets, str | tuple):
            raise ValueError(f"targets={self.targets!r} names nothing; give 'all-linear' or patterns such as 'query'")
        self._check_bounds()
        if self.total_steps is not None:
            self.schedule(1000, self.total_steps)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")

    def _between(self, name: str, low: float, high: float, low_included: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (low <= value < high if low_included else low < value < high):
            edge = "at least" if low_included else "above"
            above = f" and below {high}" if high != math.inf else " and finite"
            raise ValueError(f"{name}={value!r} must be {edge} {low}{above}")

    def _check_bounds(self) -> None:
        for name in ("min_rank", "max_rank"):
            value = getattr(self, name)
            numbers = list(value.values()) if isinstance(value, Mapping) else [] if value is None else [value]
            for rank in numbers:
                if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= self.init_rank:
                    raise ValueError(f"{name}={value!r} must lie between 0 and init_rank={self.init_rank}")
        if isinstance(self.min_rank, int) and isinstance(self.max_rank, int) and self.min_rank > self.max_rank:
            raise ValueError(f"min_rank={self.min_rank} is above max_rank={self.max_rank}; exchange them")

    @property
    def scale(self) -> float:
        """The factor s in W = W0 + s P diag(l) Q. Fixed from the initial rank; it never follows the current rank."""
        return (2.0 * self.init_rank if self.alpha is None else self.alpha) / (self.init_rank + 1e-5)

    def schedule(self, cost: int, total_steps: int | None = None) -> Schedule:
        """The budget over time when one rank of every matrix together costs `cost` (in ranks: the matrices).

        Raises ValueError when T is not known, the final budget is nothing, or warm-up and final phase leave no step.
        """
        total = self.total_steps if total_steps is None else total_steps
        if total is None:
            raise ValueError("total_steps=None: give the number of optimiser steps that the training will take")
        start = cost * self.init_rank
        target = int(cost * self.target_rank) if self.budget is None else self.budget
        if target < 1:
            raise ValueError(f"the final budget is {target} {self.budget_unit}; raise target_rank or budget")
        steps = [value if isinstance(value, int) else int(value * total) for value in (self.warmup, self.final)]
        return Schedule(total, *steps, self.interval or max(1, total // 100), start, target)

    def to_json(self) -> str:
        """All settings as JSON; `from_json` reads them back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for a setting that does not exist."""
        found: dict[str, Any] = json.loads(text)
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ValueError(f"{unknown[0]!r} is no setting of AdaLoraConfig; remove it")
        return cls(**found)

    @classmethod
    def quick(cls, total_steps: int = 400) -> Self:
        """The planted experiment's setting: rank 8 at the start, 2 on average at the end, scale 4."""
        return cls(
            init_rank=8, target_rank=2, alpha=32, total_steps=total_steps, warmup=0.125, final=1 / 3, interval=10,
            orthogonality=0.01,
        )  # fmt: skip

    @classmethod
    def paper(cls, task: str = "MNLI", total_steps: int | None = None) -> Self:
        """The paper's setting for a task of `PAPER_TASKS`: ranks 12 to 8, the squared penalty as printed."""
        if task not in PAPER_TASKS:
            raise ValueError(f"task={task!r} is not in the paper's tables; choose one of {', '.join(PAPER_TASKS)}")
        row = PAPER_TASKS[task]
        return cls(
            init_rank=12, target_rank=8, alpha=32, total_steps=total_steps, warmup=row.warmup, final=row.final,
            interval=row.interval, orthogonality=row.orthogonality, penalty="squared", sensitivity_at="pre_step",
        )  # fmt: skip

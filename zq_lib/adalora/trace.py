"""The rank trace: what happened at every allocation, small enough to keep and to animate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor


@dataclass
class RankTrace:
    """One entry per allocation. `names` are the n matrices; arrays are float32 or bool, R is the initial rank.

    `scores` S, `values` l just before the cut, `keep` what stayed: [n, R] each. `threshold` is the smallest score kept.
    `regrown` counts the triplets that had been cut before and were not zero any more.
    """

    names: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    regrown: list[int] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    keep: list[np.ndarray] = field(default_factory=list)

    def add(self, step: int, budget: int, scores: Tensor, values: Tensor, keep: Tensor) -> None:
        """Record one allocation."""
        score, value, kept = scores.cpu().numpy(), values.cpu().numpy(), keep.cpu().numpy()
        before = self.keep[-1] if self.keep else np.ones_like(kept)
        self.steps.append(step)
        self.budgets.append(budget)
        self.thresholds.append(float(score[kept].min()) if kept.any() else float("nan"))
        self.regrown.append(int((~before & (value != 0)).sum()))
        self.scores.append(score.astype(np.float32))
        self.values.append(value.astype(np.float32))
        self.keep.append(kept.copy())

    def __len__(self) -> int:
        return len(self.steps)

    def ranks(self) -> np.ndarray:
        """Rank of every matrix after every allocation, [events, n] int64."""
        if not self.keep:
            return np.zeros((0, len(self.names)), np.int64)
        return np.stack(self.keep).sum(2)

    def revived(self) -> int:
        """How many times a triplet that had been cut was kept at a later allocation."""
        if len(self) < 2:
            return 0
        keep = np.stack(self.keep)
        return int((~keep[:-1] & keep[1:]).sum())

    def save(self, path: str | Path) -> None:
        """Write everything as one compressed .npz file."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ("steps", "budgets", "thresholds", "regrown")} | {
            name: np.stack(getattr(self, name)) for name in ("scores", "values", "keep") if len(self)
        }
        np.savez_compressed(path, names=np.array(json.dumps(self.names)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> RankTrace:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            trace = cls(tuple(json.loads(str(file["names"]))))
            for name in ("steps", "budgets", "thresholds", "regrown"):
                setattr(trace, name, file[name].tolist())
            for name in ("scores", "values", "keep"):
                if name in file:
                    setattr(trace, name, list(file[name]))
        return trace

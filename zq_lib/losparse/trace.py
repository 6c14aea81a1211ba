"""The density trace: how many rows every matrix kept at every mask, small enough to keep and to animate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class DensityTrace:
    """One entry per mask. `names` are the n matrices, `outputs` and `inputs` their N and K.

    `shares` are p(t), `rows` the rows kept of each matrix [n], `returned` how many kept rows the mask before had
    dropped.
    """

    names: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    steps: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)

    def add(self, step: int, share: float, rows: list[int], returned: int) -> None:
        """Record one mask."""
        self.steps.append(step)
        self.shares.append(share)
        self.rows.append(rows)
        self.returned.append(returned)

    def __len__(self) -> int:
        return len(self.steps)

    def densities(self) -> np.ndarray:
        """Share of its rows that every matrix kept, [masks, n]."""
        return np.array(self.rows, float).reshape(-1, len(self.names)) / np.array(self.outputs)

    def kept(self) -> np.ndarray:
        """Share of all entries of S that were kept, [masks]: at least p(t), by less than the rows at the threshold."""
        inputs, outputs = np.array(self.inputs), np.array(self.outputs)
        return np.array(self.rows).reshape(-1, len(self.names)) @ inputs / (inputs * outputs).sum()

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(vars(self)))

    @classmethod
    def load(cls, path: str | Path) -> DensityTrace:
        """Read what `save` wrote."""
        found = json.loads(Path(path).read_text())
        return cls(**found | {name: tuple(found[name]) for name in ("names", "outputs", "inputs")})

"""What an experiment returns: claims with their evidence, and tables that are written and drawn from one place."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any

Row = dict[str, Any]
QUICK, FULL = "quick", "full"


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, what our run measured, and whether it holds here."""

    statement: str
    expected: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class LabResult:
    """An experiment's outcome. `tables` maps a name to rows, each a dict with the same keys."""

    slug: str
    budget: str
    seed: int
    claims: tuple[Claim, ...]
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def find(self, table: str, **where: Any) -> Row:
        """The one row of a table with these values. Raises LookupError when there is none or more than one."""
        rows = [r for r in self.tables[table] if all(r[k] == v for k, v in where.items())]
        if len(rows) != 1:
            raise LookupError(f"table {table!r} has {len(rows)} rows with {where}, not one")
        return rows[0]


def check_budget(budget: str) -> None:
    """Raise ValueError unless `budget` is one of the two that every lab offers."""
    if budget not in (QUICK, FULL):
        raise ValueError(f"budget={budget!r} is not known; use 'quick' (a notebook's minute) or 'full' (the tables)")


def proportion(hits: Sequence[bool], level: float = 0.95) -> tuple[float, float, float]:
    """Share of hits with Wilson's score interval."""
    n = len(hits)
    if not n:
        raise ValueError("hits=[] has no share; give at least one")
    z, p = NormalDist().inv_cdf((1 + level) / 2), sum(map(bool, hits)) / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


# Student's t for 2, 3, ... values, two-sided 95 %
_T95 = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip
T95 = dict(enumerate(_T95, 2))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of two to twenty values with Student's 95 % interval: mean, low, high."""
    if len(values) not in T95:
        raise ValueError(f"values holds {len(values)} numbers; an interval needs 2 to {max(T95)}, one for each seed")
    centre, half = mean(values), T95[len(values)] * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV: floats to five significant digits, the keys of the first row as header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path: str | Path) -> list[Row]:
    """Read such a CSV back; numbers and truth values become what they were."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

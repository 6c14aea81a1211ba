"""Run a method's benchmarks and keep what they measured: one CSV each, with device, versions and date.

A method's `benchmark.py` exports BENCHMARKS: name -> function(say) -> rows, or a dict of several tables. `zq bench
SLUG` runs them all, `zq bench SLUG NAME` one.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from zq_lib.core.lab import Row, read_rows, write_rows
from zq_lib.registry import METHODS

RESULTS = Path(__file__).parent / "results"
Say = Callable[[str], None]


def environment() -> Row:
    """Device, versions and date of a measurement."""
    return {
        "device": processor(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, 1 thread"


def results(name: str) -> list[Row]:
    """The committed rows of `results/<name>.csv`. Raises FileNotFoundError that names the command which makes them."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"no results named {name!r}; make them with: zq bench {name.split('_')[0]}")
    return read_rows(path)


def run(slug: str, names: Sequence[str] = (), say: Say = print, folder: Path = RESULTS) -> list[Path]:
    """Run a method's benchmarks and write their CSV files. Raises ValueError for a name that does not exist."""
    if slug not in METHODS or not METHODS[slug].built:
        raise ValueError(
            f"{slug!r} has no benchmark; choose one of {', '.join(m for m in METHODS if METHODS[m].built)}"
        )
    import torch

    torch.set_num_threads(1)
    known = METHODS[slug].load("benchmark").BENCHMARKS
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"{slug} has no benchmark {unknown[0]!r}; choose from {', '.join(known)}")
    written = []
    for name in names or known:
        found = known[name](say)
        for table, rows in (found if isinstance(found, dict) else {name: found}).items():
            path = folder / f"{slug}_{table}.csv"
            write_rows(path, [{**row, **environment()} for row in rows])
            say(f"wrote {path.name}: {len(rows)} rows")
            written.append(path)
    return written

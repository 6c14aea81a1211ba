"""Benchmarks on a real GPU: `python -m zq_lib.bench.gpu` appends to results/<device>.csv.

Every case is checked against the reference first; a case that fails writes no row and the command fails. Times are
medians of triton's `do_bench`. Needs torch, triton and transformers, and no notebook or demo packages.
"""

from __future__ import annotations

import csv
import datetime
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from zq_lib.core.kernels import GpuCase, milliseconds
from zq_lib.registry import built

RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]
Timer = Callable[[Callable[[], object]], float]  # a call -> milliseconds
COLUMNS = (
    "method", "case", "size", "implementation", "ms", "tflops", "gbytes_per_s", "error", "allowed",
    "device", "copy_gbytes_per_s", "torch", "triton", "date",
)  # fmt: skip


def rows_of(method: str, case: GpuCase, timer: Timer, say: Callable[[str], None]) -> list[Row]:
    """Check one case, then time its implementations. Returns no row if the check fails, NaN included."""
    error, allowed = case.parity()
    label = f"{method} {case.name} {_words(case.size)}"
    if not error <= allowed:
        say(f"{label}: REFUSED, error {error:.2g} is above {allowed:.2g}")
        return []
    rows = []
    for implementation, call in case.runs.items():
        try:
            taken = timer(call)
        except (RuntimeError, ImportError) as failure:  # a peer that this device or version does not have, or memory
            say(f"{label}: {implementation} did not run: {str(failure).splitlines()[0][:100]}")
            continue
        say(f"{label}: {implementation} {taken:.3f} ms")
        rows.append({
            "method": method, "case": case.name, "size": _words(case.size), "implementation": implementation,
            "ms": f"{taken:.5g}",
            "tflops": f"{case.flops / taken / 1e9:.4g}",
            "gbytes_per_s": f"{case.moved / taken / 1e6:.4g}",
            "error": f"{error:.3g}", "allowed": f"{allowed:.3g}",
        })  # fmt: skip
    return rows


def _words(size: object) -> str:
    return " ".join(f"{name}={value}" for name, value in dict(size).items())


def environment(timer: Timer, device: str) -> Row:
    """What a row needs to be understood later: device, its measured copy bandwidth, versions, date."""
    source = torch.empty(2**28 if device == "cuda" else 2**10, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = timer(lambda: target.copy_(source))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "copy_gbytes_per_s": f"{2 * source.numel() / taken / 1e6:.4g}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.date.today().isoformat(),
    }


def cases(device: str) -> Iterator[tuple[str, GpuCase]]:
    """The cases of every built method that has a `kernels_bench` module, with the method's slug."""
    for method in built():
        for case in import_module(f"{method.kernels}_bench").cases(device):
            yield method.slug, case


def append(rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Append rows of one device to its CSV file; the header is written once."""
    path = folder / (re.sub(r"[^a-z0-9]+", "_", str(rows[0]["device"]).lower()).strip("_") + ".csv")
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            table.writeheader()
        table.writerows(rows)
    return path


def measure(
    found: Iterable[tuple[str, GpuCase]], timer: Timer, device: str, say: Callable[[str], None], folder: Path = RESULTS
) -> int:
    """Check and time all cases and append what passed. Returns how many cases were refused."""
    machine, refused = environment(timer, device), 0
    for method, case in found:
        rows = rows_of(method, case, timer, say)
        refused += not rows
        if rows:
            append([{**row, **machine} for row in rows], folder)
    return refused


def main() -> int:
    """Command line."""
    if not torch.cuda.is_available():
        print("No GPU is visible to torch, so there is nothing to time; results/*.csv hold what others measured.")
        return 1
    return int(measure(cases("cuda"), milliseconds, "cuda", print) > 0)


if __name__ == "__main__":
    sys.exit(main())

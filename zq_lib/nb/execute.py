"""Execute notebooks so that the same content gives the same bytes.

Run and save, or run and compare with what is saved:

    python -m zq_lib.nb.execute notebooks/01_pasta.ipynb
    python -m zq_lib.nb.execute notebooks/01_pasta.ipynb --check
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from zq_lib.nb.canonical import canonical, dumps
from zq_lib.nb.measure import Meter

CELL_TIMEOUT = 120  # seconds, the same as in validation


class NotebookError(Exception):
    """A cell failed; the message names notebook, cell and error."""


@dataclass(frozen=True)
class Run:
    """What an execution gave: the canonical file, the wall seconds and the peak memory of the kernel."""

    content: bytes
    seconds: float
    peak_bytes: int


def environment() -> dict[str, str]:
    """The environment of the kernel: committed outputs come from one thread on a CPU, wherever the author works."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def execute(path: Path) -> Run:
    """Run a notebook in its own folder with the kernel `python3`; the file is not touched.

    A cell may raise only if it has the tag `raises-exception`. Raises NotebookError naming the first that does.
    """
    nb = nbformat.read(path, as_version=4)
    started: list[int] = []
    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # the kernel's own remarks are not the notebook's
        coalesce_streams=True,  # how many pieces a stream arrives in is a matter of timing
        on_cell_execute=lambda cell, cell_index: started.append(cell_index),
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    with Meter() as meter:
        try:
            client.execute(env=environment())
        except (CellControlSignal, DeadKernelError) as error:
            raise NotebookError(f"{path}: cell {started[-1]} failed, nothing was written\n{error}") from error
    return Run(dumps(canonical(nb, path.name)), meter.seconds, meter.peak_bytes)


def first_difference(saved: Any, new: Any, where: str = "") -> str | None:
    """Where two notebooks part, as a path and the two values; None if they are equal."""
    if isinstance(saved, dict) and isinstance(new, dict):
        # A notebook's cells come before its metadata: the reader wants the cause, not the widget state.
        for key in sorted(saved.keys() | new.keys(), key=lambda k: (k != "cells", k)):
            if found := first_difference(saved.get(key), new.get(key), f"{where}.{key}" if where else key):
                return found
        return None
    if isinstance(saved, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(saved, new, strict=False)):
            if found := first_difference(a, b, f"{where}[{i}]"):
                return found
        return None if len(saved) == len(new) else f"{where}: {len(saved)} items became {len(new)}"
    if saved == new:
        return None
    if isinstance(saved, str) and isinstance(new, str) and "\n" in saved + new:
        a, b = saved.split("\n"), new.split("\n")
        line = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        return first_difference(a[line : line + 1], b[line : line + 1], f"{where} line {line + 1}")
    return f"{where}: {_short(saved)} became {_short(new)}"


def compare(path: Path, content: bytes) -> str | None:
    """The first difference between the saved file and `content`; None if the bytes are equal."""
    saved = path.read_bytes()
    if saved == content:
        return None
    found = first_difference(nbformat.reads(saved.decode(), 4), nbformat.reads(content.decode(), 4))
    return found or "only the layout of the file differs"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zq_lib.nb.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--check", action="store_true", help="compare with the saved file instead of saving")
    arguments = parser.parse_args(argv)
    failed = False
    for path in arguments.notebooks:
        try:
            run = execute(path)
        except (NotebookError, OSError, nbformat.reader.NotJSONError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        found = compare(path, run.content)
        if arguments.check:
            outcome = "as saved" if found is None else f"differs: {found}"
            failed |= found is not None
        else:
            outcome = "unchanged" if found is None else "written"
            if found is not None:
                _write(path, run.content)
        print(f"{path}: {run.seconds:.1f} s, {run.peak_bytes / 1e6:.0f} MB, {outcome}")
    return int(failed)


def _write(path: Path, content: bytes) -> None:
    """Replace the file in one step: an interrupt leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


if __name__ == "__main__":
    sys.exit(main())

"""Seconds, processor time and peak memory of a process and everything it starts."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import TracebackType

import psutil  # ipykernel needs it, so it is there wherever a notebook runs

INTERVAL = 0.1  # seconds between two looks; a notebook's memory changes over longer times


class Meter:
    """Watches a process tree while a `with` block runs.

    `pid` is the root of the tree; None watches the descendants of this process, without itself.
    After the block `seconds` is the wall time, `cpu_seconds` the processor time, which other work on the machine hardly
    changes, and `peak_bytes` the largest sum of resident memory seen.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.seconds, self.peak_bytes = 0.0, 0
        self._used: dict[int, float] = {}  # by process, which may have ended since
        self._root = psutil.Process(pid or os.getpid())
        self._own = pid is not None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float:
        return sum(self._used.values())

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak_bytes = max(self.peak_bytes, self._resident())

    def _resident(self) -> int:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*([self._root] if self._own else []), *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_info().rss
                    times = process.cpu_times()
                    self._used[process.pid] = times.user + times.system
        return total

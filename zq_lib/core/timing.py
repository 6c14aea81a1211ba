"""Fair timing on a machine that does other things as well."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from zq_lib.core.lab import Row


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor time of one call: on a busy machine it is fairer than the clock."""
    start = time.process_time()
    call()
    return time.process_time() - start


def paired_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int = 7) -> Row:
    """CPU seconds of both, run in turns after one warm-up each, and the median of second / first over the pairs."""
    first(), second()
    a, b = [], []
    for i in range(repeats):
        order = ((first, a), (second, b)) if i % 2 == 0 else ((second, b), (first, a))
        for call, times in order:
            times.append(cpu_seconds(call))
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    return {
        "first_s": statistics.median(a),
        "second_s": statistics.median(b),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "pairs": repeats,
    }

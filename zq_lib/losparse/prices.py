"""What a layer costs, dense and shrunk: counted in multiply-adds, or timed on this machine.

Counting is not enough. A small square layer with few tokens loses more to the extra calls than it saves in arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.core.lab import Row
from zq_lib.core.timing import paired_ratio
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Say
from zq_lib.losparse.layer import size_of
from zq_lib.losparse.linear import low_rank_sparse_linear

KNOTS = (0.0, 0.1, 0.25, 0.5, 1.0)  # shares of rows at which a shape is timed; between them time is a straight line
Shape = tuple[int, int]  # N, K


@torch.no_grad()
def time_layer(
    outputs: int, inputs: int, rank: int, rows: int, tokens: int, *, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", repeats: int = 9,
) -> Row:  # fmt: skip
    """Seconds of a dense layer and of a shrunk one, in turns, and the median of dense / shrunk over the pairs.

    Processor seconds on a CPU; on a GPU the clock, with the queue waited for.
    """
    new = {"dtype": dtype, "device": device}
    x, weight = torch.randn(tokens, inputs, **new), torch.randn(outputs, inputs, **new)
    left, right, sparse = (torch.randn(*s, **new) for s in ((outputs, rank), (rank, inputs), (rows, inputs)))
    index = torch.arange(outputs, device=device)[:rows]
    calls = min(max(1, round(2e7 / (tokens * inputs * outputs))), 64)  # a turn of a millisecond, for the clock's sake

    def repeat(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                call()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()

        return run

    found = paired_ratio(
        repeat(lambda: low_rank_sparse_linear(x, left, right, sparse, index)),
        repeat(lambda: F.linear(x, weight)),
        repeats,
    )
    return {
        "outputs": outputs, "inputs": inputs, "tokens": tokens, "rank": rank, "rows": rows,
        "shrunk_s": found["first_s"] / calls, "dense_s": found["second_s"] / calls, "gain": found["ratio"],
        "gain_low": found["ratio_low"], "gain_high": found["ratio_high"],
    }  # fmt: skip


@dataclass(frozen=True)
class Price:
    """What a layer of one shape and rank costs, dense and with some numbers of rows, in seconds or multiply-adds."""

    inputs: int  # K
    dense: float
    most: int  # rows with which there are still fewer multiply-adds than in a dense layer
    rows: tuple[int, ...]  # ascending, from 0 to N
    shrunk: tuple[float, ...]  # never falling

    def at(self, rows: int) -> float:
        """The cost with so many rows, on the straight line between the measured neighbours."""
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (a, b), (x, y) = self.rows[i - 1 : i + 1], self.shrunk[i - 1 : i + 1]
        return x + (y - x) * (rows - a) / (b - a)

    def pays(self, rows: int) -> bool:
        """Whether the shrunk layer is cheaper, in multiply-adds as well."""
        return rows <= self.most and self.at(rows) < self.dense

    def best(self, rows: int) -> float:
        """The cost of the cheaper of the two."""
        return self.at(rows) if self.pays(rows) else self.dense

    def reason(self, rows: int) -> str:
        """Why a layer with so many rows stays dense."""
        if rows > self.most:
            return f"{rows} rows are worth keeping, and with more than {self.most} it has more multiply-adds than dense"
        return f"with {rows} rows it would take {self.at(rows) / self.dense:.2f} times as long"


def price(
    shape: Shape, rank: int, by: str, tokens: int, table: list[Row], say: Say, device: torch.device, dtype: torch.dtype
) -> Price:
    """The price of one shape: counted for "flops"; timed for "latency", the timings being added to `table`."""
    n, k = shape
    rows = tuple(sorted({round(share * n) for share in KNOTS}))
    most = max(0, -(-(n * k - rank * (n + k)) // k) - 1)
    if by == "flops":
        return Price(k, tokens * n * k, most, rows, tuple(tokens * (rank * (n + k) + count * k) for count in rows))
    say(f"timing {k} -> {n} at rank {rank}")
    found = [time_layer(n, k, rank, count, tokens, device=device, dtype=dtype) for count in rows]
    table += found
    shrunk = accumulate((r["shrunk_s"] for r in found), max)
    return Price(k, median(r["dense_s"] for r in found), most, rows, tuple(shrunk))


def prices_of(
    layers: Mapping[str, nn.Module], config: LoSparseConfig, by: str, tokens: int, table: list[Row], say: Say
) -> dict[str, Price]:
    """The price of every layer; equal shapes are priced once."""
    known: dict[Shape, Price] = {}
    for layer in layers.values():
        shape = size_of(layer)
        if shape not in known:
            weight = layer.weight
            known[shape] = price(shape, config.rank(*shape), by, tokens, table, say, weight.device, weight.dtype)
    return {name: known[size_of(layer)] for name, layer in layers.items()}

"""How small, and which layers: settings that meet a time or a number of multiply-adds, from timings on this machine.

What a shrunk layer costs is measured, for every shape that the model has, and layers that would lose stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zq_lib.core.lab import Row
from zq_lib.losparse.calibration import Calibration, Loss, masked, mean_loss, row_scores
from zq_lib.losparse.compression import Compression, attach
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Batch, Say, cut, find_factors
from zq_lib.losparse.prices import Price, prices_of
from zq_lib.losparse.targets import find_layers

SHARES = (0.0, 0.05, 0.2, 0.4)  # rho_L to try; the best one grows as the total shrinks


@dataclass(frozen=True)
class Plan:
    """Settings that meet a target, and why.

    `config` and `calibration` go to `compress`. `cost` and `dense_cost` are those of the layers, in seconds or
    multiply-adds for `tokens` tokens. `rows` has one row per candidate rho_L: what it costs, the score it gives up, its
    loss on the batches; `timings` what was measured; `stay_dense` the layers that stay dense, each with the reason.
    """

    config: LoSparseConfig
    calibration: Calibration
    by: str
    tokens: int
    target: float
    cost: float
    dense_cost: float
    rows: tuple[Row, ...]
    timings: tuple[Row, ...]
    stay_dense: dict[str, str]

    @property
    def share(self) -> float:
        """Predicted cost as a share of the dense layers'."""
        return self.cost / self.dense_cost

    def compress(self, model: nn.Module) -> Compression:
        """Carry it out on `model`, the one that it was made for."""
        handle = attach(model, self.config, factors=self.calibration.factors)
        handle.shrink(self.calibration.scores)
        handle.finish()
        return handle

    def __str__(self) -> str:
        what = "multiply-adds" if self.by == "flops" else "seconds"
        lines = [
            f"low_rank={self.config.low_rank:g}, remaining={self.config.remaining:.3f}: {self.share:.0%} of the dense "
            f"{what} for {self.tokens} tokens, {self.target:.0%} allowed",
            *(
                f"rho_L {r['low_rank']:g}: " + (f"loss {r['loss']:.3f}" if r["meets"] else "cannot meet the target")
                for r in self.rows
            ),
            *(f"{name} stays dense: {reason}" for name, reason in self.stay_dense.items()),
        ]
        return "\n".join(lines)


def plan(
    model: nn.Module, batches: Sequence[Batch], target: float, *, by: str = "latency", tokens: int = 256,
    shares: Sequence[float] = SHARES, config: LoSparseConfig | None = None, inputs: Sequence[Batch] | None = None,
    loss: Loss | None = None, say: Say = lambda _: None,
) -> Plan:  # fmt: skip
    """The settings without training that bring the layers of `model` to `target` of their cost at the least loss.

    Args: `target`, a share of the dense layers' cost, "latency" measured here for `tokens` tokens a call, or "flops";
    `shares`, the rho_L to try, each at the largest share of rows that meets the target; of those the one with the least
    loss on `batches` is taken. `config` gives the rest (init="activation" if None); `batches`, `inputs` and `loss` are
    those of `calibrate`. The model is as before afterwards. Raises ValueError for a target that nothing meets.

    >>> made = plan(model, batches, 0.6)
    >>> handle = made.compress(model)
    """
    _check(target, by, tokens, shares)
    config = replace(config or LoSparseConfig(init="activation"), exact=True)
    layers, _ = find_layers(model, config.targets, config.skip)
    table: list[Row] = []
    tried: list[Candidate] = []
    was = model.training
    model.eval()
    try:
        largest = replace(config, low_rank=max(shares), remaining=0 if max(shares) else 1)
        factors = find_factors(model, layers, largest, batches if inputs is None else inputs, say)
        for share in shares:
            say(f"rho_L {share:g}")
            part = replace(config, low_rank=share, remaining=1 - share)
            own = cut(factors, part)
            scores = row_scores(model, layers, own, batches, loss, say)
            fit = _fit(prices_of(layers, part, by, tokens, table, say), scores, target)
            found = float("inf")
            if fit is not None:
                with masked(layers, own, fit.keep):
                    found = mean_loss(model, batches, loss)
            tried.append(Candidate(share, Calibration(own, scores), fit, found))
    finally:
        model.train(was)
    best = min(tried, key=lambda c: c.loss)
    if (fit := best.fit) is None:
        asked = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"target={target} of the dense layers' {by} is met by none of rho_L = {asked}, even with no row left; "
            "raise target, or give shares below it"
        )
    chosen = replace(config, low_rank=best.low_rank, remaining=fit.remaining, skip=(*config.skip, *fit.dense))
    rows = tuple(c.row() for c in tried)
    return Plan(chosen, best.calibration, by, tokens, target, fit.cost, fit.whole, rows, tuple(table), fit.dense)


@dataclass(frozen=True)
class Fit:
    """Rows for one rho_L: `keep` [N] bool by layer, all rows of a layer that stays `dense` (name -> reason)."""

    keep: dict[str, Tensor]
    dense: dict[str, str]
    remaining: float  # share of the entries of S that stay, of the layers that do not stay dense
    cost: float
    whole: float  # cost of the dense layers
    lost: float  # score of the dropped rows, summed over their entries


@dataclass(frozen=True)
class Candidate:
    """One rho_L with its best rows: no fit, and an infinite loss, where nothing meets the target.

    The loss is measured. The score that is given up does not rank candidates: it sums errors as if none cancelled.
    """

    low_rank: float
    calibration: Calibration
    fit: Fit | None
    loss: float

    def row(self) -> Row:
        """Its row in `Plan.rows`."""
        if self.fit is None:
            return {"low_rank": self.low_rank, "meets": False, "loss": "", "score_lost": "", "cost": ""}
        return {
            "low_rank": self.low_rank, "meets": True, "loss": self.loss, "score_lost": self.fit.lost,
            "cost": self.fit.cost / self.fit.whole,
        }  # fmt: skip


def _fit(prices: Mapping[str, Price], scores: Mapping[str, Tensor], target: float) -> Fit | None:
    """The most rows in order of score that meet the target, or None. The cost grows with the rows, so halve."""
    whole = sum(p.dense for p in prices.values())
    flat = torch.cat(list(scores.values()))
    layer = torch.arange(len(scores)).repeat_interleave(torch.tensor([len(s) for s in scores.values()]))
    order = layer[flat.sort(descending=True, stable=True).indices.cpu()]

    def counts(kept: int) -> list[int]:
        return order[:kept].bincount(minlength=len(prices)).tolist()

    def cost(kept: int) -> float:
        return sum(p.best(n) for p, n in zip(prices.values(), counts(kept), strict=True))

    if cost(0) > target * whole:
        return None
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= target * whole else (low, middle - 1)
    rows = dict(zip(prices, counts(low), strict=True))
    dense = {name: prices[name].reason(n) for name, n in rows.items() if not prices[name].pays(n)}
    keep, lost, kept, entries = {}, 0.0, 0, 0
    for name, own in scores.items():
        best = own.sort(descending=True, stable=True).indices[: rows[name]]
        keep[name] = torch.full((len(own),), name in dense)
        keep[name][best.cpu()] = True
        if name not in dense:
            lost += float(own.cpu()[~keep[name]].sum()) * prices[name].inputs
            kept, entries = kept + rows[name] * prices[name].inputs, entries + len(own) * prices[name].inputs
    return Fit(keep, dense, kept / entries, cost(low), whole, lost)


def _check(target: float, by: str, tokens: int, shares: Sequence[float]) -> None:
    if not 0 < target < 1:
        raise ValueError(f"target={target} must be a share of the dense layers' cost between 0 and 1, for example 0.6")
    if by not in ("latency", "flops"):
        raise ValueError(f"by={by!r} is not known; choose latency or flops")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1: how many tokens a call of the model has")
    if not shares or not all(0 <= s < 1 for s in shares):
        raise ValueError(f"shares={tuple(shares)} must be shares rho_L from 0 to below 1, for example {SHARES}")

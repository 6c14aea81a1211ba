"""What the AdaShift page's three parts compute, step by step so that Stop is heard. Library calls only."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from apps.adashift_settings import IDENTITY, RATE, Hand, Training, Walk, uncounted
from zq_lib.adashift import AdaShift, net_update_factors, simulate
from zq_lib.adashift.counterexamples import ADASHIFT, AMSGRAD, RULES, SGD, first_moments, step_sizes
from zq_lib.adashift.factors import compare
from zq_lib.adashift.training import BATCH, CONTENDERS, Digits, load_digits, mlp
from zq_lib.core.lab import Row
from zq_lib.core.seeding import seed_everything
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "adashift.json"
POINTS = 80  # of a line


class _Stored:
    """A result whose data are JSON types, floats to four digits; its `settings` are of the class `kind`."""

    kind: type

    def to_data(self) -> dict[str, Any]:
        return rounded(asdict(self))

    @classmethod
    def from_data(cls, found: dict[str, Any]) -> Self:
        """What `to_data` gave."""
        return cls(**{**found, "settings": cls.kind(**found["settings"])})


@dataclass
class Moment:
    """How far a run is, and its result as far as it came."""

    said: str
    done: float
    result: Result


# --- a walk -----------------------------------------------------------------------------------------------------------
@dataclass
class WalkResult(_Stored):
    """By rule: `paths` has the mean, lowest and highest theta of all runs after the steps `at`; `ends` the same after
    the last one, and how many runs ended below zero; `factors` the mean net update factors of the gradients above and
    below zero in units of lr, their ratio and the drift per step."""

    settings: Walk
    runs: int
    at: list[int]
    paths: dict[str, dict[str, list[float]]]
    ends: dict[str, Row]
    factors: dict[str, Row]
    kind = Walk


def walk(settings: Walk) -> WalkResult:
    """All rules on the same gradients."""
    s, gradients = settings, settings.draw()
    kept = np.unique(np.linspace(0, s.steps - 1, POINTS).astype(int))
    found = WalkResult(s, gradients.shape[1], (kept + 1).tolist(), {}, {}, {})
    for name in RULES:
        rule, rate = s.rule(name), 1 / np.sqrt((gradients**2).mean()) if name == SGD else 1.0
        theta = simulate(rule, gradients, RATE * rate)
        some, last = theta[kept], theta[-1]
        found.paths[name] = {"mean": some.mean(1).tolist(), "low": some.min(1).tolist(), "high": some.max(1).tolist()}
        found.ends[name] = {
            "mean": float(last.mean()), "low": float(last.min()), "high": float(last.max()),
            "right": int((last < 0).sum()),
        }  # fmt: skip
        found.factors[name] = vars(compare(rule, gradients, rate, *uncounted(s.steps)))
    return found


# --- by hand ----------------------------------------------------------------------------------------------------------
@dataclass
class HandResult(_Stored):
    """A row per step t: the gradient `g`, the one that enters v (`seen`, None while AdaShift only remembers), `v`, its
    corrected value, `m`, the size `r` that multiplies m, the `step`, `theta` after it, and `k`, the net update factor
    so far of every gradient (0 for those to come)."""

    settings: Hand
    rows: list[Row]
    kind = Hand


def by_hand(settings: Hand) -> HandResult:
    """The sequence step by step, lr = 1."""
    s, rule = settings, settings.made
    gradients = np.array(s.gradients)[:, None]  # [T, 1]
    m, sizes = first_moments(rule, gradients)[:, 0], step_sizes(rule, gradients, 1.0)[:, 0]
    theta = simulate(rule, gradients, 1.0)[:, 0]
    shift = s.n if s.rule == ADASHIFT else 0
    average = v = 0.0
    age, rows = 0, []
    for t in range(1, len(gradients) + 1):
        seen = s.gradients[t - 1 - shift] if t > shift else None
        if seen is not None:
            average = s.beta2 * average + (1 - s.beta2) * seen**2
            v = max(v, average) if s.rule == AMSGRAD else average
            age += s.rule != ADASHIFT or v > 0
        k = np.zeros(len(gradients))
        if t > shift:
            k[:t] = net_update_factors(rule, gradients[:t], 1.0)[:, 0]
        rows.append({
            "t": t, "g": s.gradients[t - 1], "seen": seen, "v": v, "age": age,
            "corrected": v / (1 - s.beta2**age) if age else 0.0, "m": float(m[t - 1]), "r": float(sizes[t - 1]),
            "step": float(-sizes[t - 1] * m[t - 1]), "theta": float(theta[t - 1]), "k": k.tolist(),
        })  # fmt: skip
    return HandResult(s, rows)


# --- the digits -------------------------------------------------------------------------------------------------------
@dataclass
class TrainingResult(_Stored):
    """It grows by a row per epoch and optimiser: mean loss of the epoch's batches (None once it is not finite) and
    accuracy on the test digits. `peaks` are the largest losses of a batch, `rates` the learning rates."""

    settings: Training
    rates: dict[str, float] = field(default_factory=dict)
    curves: list[Row] = field(default_factory=list)
    peaks: dict[str, float | None] = field(default_factory=dict)
    kind = Training

    def end(self, name: str) -> Row | None:
        """An optimiser's last epoch so far."""
        return next((r for r in reversed(self.curves) if r["optimizer"] == name), None)


_digits = lru_cache(maxsize=2)(load_digits)
_KNOWN = {c.name: c for c in CONTENDERS}


def maker(settings: Training, name: str) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """What makes an optimiser of parameters."""
    s, contender = settings, _KNOWN[name]
    if name == IDENTITY:
        return lambda params: AdaShift(params, lr=s.rate or contender.lr, phi="none", eps=s.eps)
    return lambda params: contender(params, s.rate)


def watch_training(settings: Training) -> Iterator[Moment]:
    """Train all optimisers from the same start on the same batches, epoch by epoch, each until its loss is not finite.

    It is the library's `train`, with all optimisers abreast.
    """
    s, digits = settings, _digits(settings.seed)
    seed_everything(s.seed)
    start = mlp()
    orders = [torch.randperm(len(digits.labels)) for _ in range(s.epochs)]
    models = {name: copy.deepcopy(start) for name in s.optimizers}
    optimizers = {name: maker(s, name)(model.parameters()) for name, model in models.items()}
    result = TrainingResult(s, {name: o.param_groups[0]["lr"] for name, o in optimizers.items()})
    yield Moment("Beginning", 0.0, result)
    for epoch, order in enumerate(orders, 1):
        for i, name in enumerate(s.optimizers, 1):
            before = result.end(name)
            if before and before["loss"] is None:
                continue
            losses = _epoch(digits, models[name], optimizers[name], order)
            finite = all(map(math.isfinite, losses))
            accuracy = _accuracy(digits, models[name]) if finite else 0.0
            loss = float(np.mean(losses)) if finite else None
            result.curves.append({"optimizer": name, "epoch": epoch, "loss": loss, "accuracy": accuracy})
            peak = max(losses) if finite else None
            known = result.peaks.get(name, 0.0)
            result.peaks[name] = None if peak is None or known is None else max(peak, known)
            done = (epoch - 1 + i / len(s.optimizers)) / s.epochs
            yield Moment(f"{name}: epoch {epoch} of {s.epochs}", 0.99 * done, result)
    yield Moment("Done", 1.0, result)


def _epoch(digits: Digits, model: nn.Module, optimiser: Optimizer, order: torch.Tensor) -> list[float]:
    losses = []
    for batch in order.split(BATCH):
        loss = F.cross_entropy(model(digits.images[batch]), digits.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _accuracy(digits: Digits, model: nn.Module) -> float:
    return float((model(digits.test_images).argmax(-1) == digits.test_labels).double().mean())


# --- all --------------------------------------------------------------------------------------------------------------
Result = WalkResult | HandResult | TrainingResult
RESULTS: dict[str, type] = {"walk": WalkResult, "hand": HandResult, "digits": TrainingResult}
PARTS = {made.kind: part for part, made in RESULTS.items()}


def finish(settings: Walk | Hand | Training) -> Result:
    """The result of whichever part these are settings of."""
    if isinstance(settings, Training):
        *_, last = watch_training(settings)
        return last.result
    return walk(settings) if isinstance(settings, Walk) else by_hand(settings)


def warm() -> None:
    """Read the digits."""
    _digits(0)


@lru_cache(maxsize=1)
def stored() -> dict[str, Result]:
    """The examples' results: `python -m apps.adashift --write-first-view`."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    return {name: RESULTS[d.pop("part")].from_data(d) for name, d in found.items()}


def store(results: dict[str, Result]) -> None:
    """Write them, one part per line."""
    write(STORED, {name: {"part": PARTS[type(r.settings)], **r.to_data()} for name, r in results.items()})
    stored.cache_clear()

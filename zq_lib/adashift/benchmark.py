"""AdaShift's benchmarks: the lab over seeds, the published counter-examples at full length, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from zq_lib.adashift import lab
from zq_lib.adashift.config import AdaShiftConfig
from zq_lib.adashift.counterexamples import ADAM, ADASHIFT, AMSGRAD, Rule, Sequential, Stochastic, simulate
from zq_lib.adashift.lab import FAST, FAST_BETA2, ends, label, rules
from zq_lib.adashift.optimizer import AdaShift
from zq_lib.adashift.reference import trajectory
from zq_lib.adashift.training import CONTENDERS, load_digits, train
from zq_lib.core.lab import FULL, Row
from zq_lib.core.timing import cpu_seconds

Say = Callable[[str], None]
SEEDS = (0, 1, 2, 3, 4)
SPLIT = 9  # a seed used for nothing but the choice of the learning rates
PAPER = Stochastic(101, 0.02)  # 10,000 steps to fill the moments, then 10^7, at lr = 1e-3 and beta2 = 0.999
PAPER_LANES, PAPER_FILL, PAPER_STEPS = 250, 10_000, 40_000
IDENTITY_EPS = (1e-10, 1e-8, 1e-5, 1e-4, 1e-2)
ROUNDS = 15


def walk(say: Say) -> dict[str, list[Row]]:
    """The two fast problems over twenty seeds, their factors, the closed form of a period, and what is claimed."""
    found = lab.run(only=("walk", "factors", "sequential"), say=say)
    claims = [
        {"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in found.claims
    ]
    return {**found.tables, "claims": claims}


def paper(say: Say) -> list[Row]:
    """The paper's problem: the way of 10^7 steps, five seeds.

    Losses are linear and the moments forget, so a chain of 10^7 steps is walked as 250 lanes of 40,000 side by
    side, each after 10^4 steps that fill its moments; a run is the sum over its lanes. AMSGrad is left out: its
    maximum never forgets, so that lanes would flatter it.
    """
    found: dict[Rule, list[float]] = {}
    for seed in SEEDS:
        say(f"seed {seed}")
        gradients = PAPER.gradients(PAPER_FILL + PAPER_STEPS, PAPER_LANES, seed)
        for rule in (rule for rule in rules(0.999) if rule.name != AMSGRAD):
            theta = simulate(rule, gradients)
            found.setdefault(rule, []).append(float((theta[-1] - theta[PAPER_FILL - 1]).sum()))
    about = {"C": PAPER.C, "delta": PAPER.delta, "beta2": 0.999, "steps": PAPER_LANES * PAPER_STEPS}
    return [ends(rule, np.array(ended), **about) for rule, ended in found.items()]


def projected(say: Say) -> list[Row]:
    """Walks kept in [-1, 1]: the fast problem at a constant rate, and both sequential ones with a falling one."""
    rows = []
    gradients = np.hstack([FAST[0].gradients(lab.FAST_STEPS, 1, seed) for seed in range(lab.SEEDS)])
    for rule in rules(FAST_BETA2):
        theta = simulate(rule, gradients, 0.01, bounds=(-1, 1))
        rows.append({"problem": "C 101, delta 1", "rule": label(rule), "theta": float(theta[-5000:].mean())})
    say("10^6 steps")
    long, rates = Sequential(1010, 101, 10).gradients(1_000_000), 1 / np.sqrt(np.arange(1, 1_000_001))
    for rule in (Rule(ADAM, 0.0, 0.99), Rule(ADAM, 0.9, 0.99), Rule(AMSGRAD, 0.9, 0.99), *rules(0.99)[3:]):
        theta = simulate(rule, long, rates, bounds=(-1, 1))
        rows.append({"problem": "C 1010 and 10, period 101", "rule": label(rule), "theta": float(theta[-1, 0])})
    short, rates = Sequential(3, 3).gradients(10_000), 0.1 / np.sqrt(np.arange(1, 10_001))
    for rule in (Rule(ADAM, 0, 0.1), Rule(AMSGRAD, 0, 0.1), *(Rule(ADASHIFT, 0, 0.1, n) for n in (1, 2, 3))):
        theta = simulate(rule, short, rates, bounds=(-1, 1))
        rows.append({"problem": "C 3, period 3", "rule": label(rule), "theta": float(theta[-1, 0])})
    return rows


def rates(say: Say) -> list[Row]:
    """Every contender at a third and three times its rate, on a split of its own: what their rates rest on."""
    data, rows = load_digits(SPLIT), []
    for contender in CONTENDERS:
        for factor in (1 / 3, 1.0, 3.0):
            say(f"{contender.name}, {factor:.2g} x {contender.lr:g}")
            row, _ = train(data, lambda p, c=contender, f=factor: c(p, c.lr * f), SPLIT, lab.EPOCHS[FULL])
            rows.append({"optimizer": contender.name, "lr": contender.lr * factor, **row})
    return rows


def digits(say: Say) -> dict[str, list[Row]]:
    """The digits over five seeds: every run, the mean of each optimiser, and the curves of the first seed."""
    tables: dict[str, list[Row]] = {"digits": [], "digits_means": [], "curves": []}
    for seed in SEEDS:
        say(f"seed {seed}")
        rows, curves = lab.digits(AdaShiftConfig.quick(), seed, lab.EPOCHS[FULL], say, CONTENDERS)
        tables["digits"] += [{"seed": seed, **row} for row in rows]
        tables["curves"] = tables["curves"] or curves
    for contender in CONTENDERS:
        own = [r for r in tables["digits"] if r["optimizer"] == contender.name]
        accuracy, loss = (np.array([r[key] for r in own]) for key in ("accuracy", "loss"))
        tables["digits_means"].append({
            "optimizer": contender.name, "lr": contender.lr, "seeds": len(own), "loss": float(loss.mean()),
            "loss_low": float(loss.min()), "loss_high": float(loss.max()), "accuracy": float(accuracy.mean()),
            "accuracy_sd": float(accuracy.std(ddof=1)), "accuracy_low": float(accuracy.min()),
        })  # fmt: skip
    return tables


def identity(say: Say) -> list[Row]:
    """phi = none at several eps: runs of three that stay finite and learn, with and without an activation."""
    rows = []
    for eps in IDENTITY_EPS:
        for linear in (False, True):
            for n, beta1 in ((10, 0.9), (1, 0.0)):
                say(f"eps {eps:g}, n {n}, {'linear' if linear else 'ReLU'}")
                settings = {"lr": 1e-3, "phi": "none", "eps": eps, "n": n, "betas": (beta1, 0.999)}
                runs = [
                    train(load_digits(s), lambda p, s=settings: AdaShift(p, **s), s, 15, linear)[0] for s in SEEDS[:3]
                ]
                learned = [r["accuracy"] for r in runs if r["accuracy"] > 0.9]
                rows.append({
                    "eps": eps, "network": "linear" if linear else "ReLU", "n": n, "beta1": beta1,
                    "learned": len(learned), "runs": len(runs),
                    "accuracy": float(np.mean(learned)) if learned else float("nan"),
                })  # fmt: skip
    return rows


SPATIAL: dict[str, dict[str, Any]] = {
    "max": {"phi": "max"}, "mean": {"phi": "mean"}, "l2": {"phi": "l2"}, "none": {"phi": "none", "eps": 1e-5},
    "max by rows": {"block": "row"}, "mean by rows": {"phi": "mean", "block": "row"},
    "l2 by rows": {"phi": "l2", "block": "row"},
}  # fmt: skip


def parity(say: Say) -> list[Row]:
    """Largest difference to the reference after a thousand steps in double precision, and the walk of a plain mean."""
    start = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1001, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = []
    for n in (1, 2, 3, 10):
        for beta1 in (0.0, 0.5, 0.9, 1.0):
            say(f"n {n}, beta1 {beta1:g}")
            for name, settings in SPATIAL.items():
                given = {"lr": 1e-2, "betas": (beta1, 0.999), "n": n, **settings}
                param = nn.Parameter(start.clone())
                optimizer = AdaShift([param], **given)
                for t in range(1, 1001):
                    param.grad = _noisy(param.detach(), noise, t)
                    optimizer.step()
                *_, expected = trajectory(start, lambda x, t: _noisy(x, noise, t), 1000, **given)
                rows.append({
                    "n": n, "beta1": beta1, "phi": name, "steps": 1000, "largest_entry": float(expected.abs().max()),
                    "difference": float((param.detach() - expected).abs().max()),
                })  # fmt: skip
    return rows


def _noisy(theta: Tensor, noise: Tensor, t: int) -> Tensor:
    return 0.3 * theta + noise[t]


def drift(say: Say) -> list[Row]:
    """beta1 = 1 over 100,000 steps in single precision: the moment against the exact mean of its window."""
    rows = []
    for n in (2, 10):
        say(f"n {n}")
        noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        param = nn.Parameter(torch.zeros(16))
        optimizer = AdaShift([param], betas=(1.0, 0.999), n=n)
        param.grad, worst = torch.empty(16), 0.0
        for t in range(100_000):
            param.grad.copy_(noise[t * t % 64])
            optimizer.step()
            if t % 1_000 == 997:  # shortly before the moment is made anew
                state = optimizer.state[param]
                worst = max(worst, float((state["exp_avg"] - state["ring"].double().mean(0)).abs().max()))
        rows.append({"n": n, "steps": 100_000, "largest_error": worst, "largest_gradient": float(noise.abs().max())})
    return rows


def transformer() -> Iterator[tuple[int, ...]]:
    """Shapes of a transformer's eight blocks of width 512: 25.2 million entries in 96 tensors."""
    for _ in range(8):
        for outputs, inputs in ((1536, 512), (512, 512), (2048, 512), (512, 2048)):
            yield from ((outputs, inputs), (outputs,))
        yield from [(512,)] * 4


MODELS: dict[str, Callable[[], Iterable[tuple[int, ...]]]] = {
    "transformer": transformer,
    "5 M in 50 tensors": lambda: [(100_000,)] * 50,
    "1,000 small tensors": lambda: [(1_000,)] * 1_000,
}
STEPPERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam foreach": lambda p: Adam(p, foreach=True),
    "Adam fused": lambda p: Adam(p, fused=True),
    "AdaShift max": lambda p: AdaShift(p, phi="max"),
    "AdaShift mean": lambda p: AdaShift(p, phi="mean"),
    "AdaShift max, bf16 ring": lambda p: AdaShift(p, phi="max", ring_dtype=torch.bfloat16),
    "AdaShift max, beta1 0": lambda p: AdaShift(p, phi="max", betas=(0.0, 0.999)),
    "AdaShift none": lambda p: AdaShift(p, phi="none"),
}


def step(say: Say) -> list[Row]:
    """Processor time of a step, all in turns in one process on one thread, and bytes of state for each parameter."""
    rows = []
    for name, shapes in MODELS.items():
        params = [nn.Parameter(0.1 * torch.randn(s, generator=torch.Generator().manual_seed(0))) for s in shapes()]
        for param in params:
            param.grad = 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
        numel = sum(p.numel() for p in params)
        optimizers = {key: make(params) for key, make in STEPPERS.items()}
        for key, optimizer in optimizers.items():
            say(f"{name}, {key}")
            for _ in range(12):  # beyond the first n, in which nothing moves
                optimizer.step()
        times: dict[str, list[float]] = {key: [] for key in optimizers}
        for _ in range(ROUNDS):
            for key, optimizer in optimizers.items():
                times[key].append(cpu_seconds(optimizer.step))
        for key, optimizer in optimizers.items():
            state = sum(x.nbytes for s in optimizer.state.values() for x in s.values())
            rows.append({
                "model": name, "parameters": numel, "tensors": len(params), "optimizer": key,
                "ms": 1e3 * median(times[key]), **_ratios(times, key, "Adam foreach", "foreach"),
                **_ratios(times, key, "Adam fused", "fused"), "state_bytes": state, "bytes_each": state / numel,
                "rounds": ROUNDS,
            })  # fmt: skip
    return rows


def _ratios(times: dict[str, list[float]], key: str, peer: str, word: str) -> Row:
    """Median, smallest and largest ratio to a peer over the rounds."""
    found = sorted(a / b for a, b in zip(times[key], times[peer], strict=True))
    return {f"of_{word}": median(found), f"of_{word}_low": found[0], f"of_{word}_high": found[-1]}


BENCHMARKS = {
    "walk": walk, "paper": paper, "projected": projected, "rates": rates, "digits": digits, "identity": identity,
    "parity": parity, "drift": drift, "step": step,
}  # fmt: skip

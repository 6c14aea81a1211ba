"""AdaShift's experiments: which way everybody walks, why, and what it means for a real network (section 7).

`run(budget="quick")` is the notebook's minute. The full budget trains longer and all optimisers; `zq bench adashift`
repeats it over seeds and writes `bench/results/adashift_*.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from zq_lib.adashift.config import AdaShiftConfig
from zq_lib.adashift.counterexamples import (
    ADAM,
    ADASHIFT,
    AMSGRAD,
    Array,
    Rule,
    Sequential,
    Stochastic,
    critical_delta,
    simulate,
)  # fmt: skip
from zq_lib.adashift.factors import compare
from zq_lib.adashift.optimizer import AdaShift
from zq_lib.adashift.training import CONTENDERS, Contender, load_digits, train
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget

FAST = (Stochastic(101, 1.0), Stochastic(21, 0.5))
UNEVEN = Stochastic(101, 0.3)  # where factors differ most: Adam wrong by far
FAST_BETA2, FAST_STEPS, SEEDS = 0.9, 20_000, 20
PERIODS = ((Sequential(3, 3), 0.1), (Sequential(50, 40), 0.9))
SHIFTS = (0, 1, 2, 3, 10, 40)
EPOCHS = {"quick": 8, FULL: 30}
LEARNED = 0.955  # what every optimiser reaches on every seed after thirty epochs
QUICK_CONTENDERS = ("Adam", "AMSGrad", "AdaShift mean", "AdaShift max")
TABLES = ("walk", "factors", "sequential", "digits")


def rules(beta2: float) -> tuple[Rule, ...]:
    """The five that section 7.1 compares."""
    return (
        Rule(ADAM, 0.0, beta2), Rule(ADAM, 0.9, beta2), Rule(AMSGRAD, 0.0, beta2),
        Rule(ADASHIFT, 0.0, beta2, 1), Rule(ADASHIFT, 0.9, beta2, 10),
    )  # fmt: skip


def label(rule: Rule) -> str:
    """A rule's name with what matters of its settings."""
    shift = f"n {rule.n}, " if rule.name == ADASHIFT else ""
    return f"{rule.name}, {shift}beta1 {rule.beta1:g}"


def ends(rule: Rule, ended: Array, **about: float) -> Row:
    """A row on where the lanes of one rule ended; right is to the left."""
    return {
        **about, "rule": label(rule), "mean": float(ended.mean()), "sd": float(ended.std(ddof=1)),
        "low": float(ended.min()), "high": float(ended.max()), "right_way": int((ended < 0).sum()), "runs": len(ended),
    }  # fmt: skip


def walk(seed: int = 0) -> list[Row]:
    """The two fast stochastic problems: final theta over twenty seeds, lr = 1e-3."""
    rows = []
    for problem in FAST:
        gradients = np.hstack([problem.gradients(FAST_STEPS, 1, SEEDS * seed + i) for i in range(SEEDS)])
        for rule in rules(FAST_BETA2):
            ended = simulate(rule, gradients)[-1]
            rows.append(ends(rule, ended, C=problem.C, delta=problem.delta, beta2=FAST_BETA2))
    return rows


def factors(seed: int = 0, problem: Stochastic = UNEVEN, lanes: int = 512) -> list[Row]:
    """Net update factors of the large and of the small gradient, lr = 1."""
    gradients = problem.gradients(4_200, lanes, seed)
    rows = []
    for rule in rules(FAST_BETA2):
        found = compare(rule, gradients, skip=2_000 if rule.name == AMSGRAD else 400)  # its maximum takes long
        rows.append({
            "C": problem.C, "delta": problem.delta, "critical": critical_delta(problem.C, FAST_BETA2),
            "rule": label(rule), **vars(found),
        })  # fmt: skip
    return rows


def sequential() -> list[Row]:
    """Closed form and walk of a period for every shift; n = 0 is Adam. Where n is a multiple of d, they are equal."""
    rows = []
    for problem, beta2 in PERIODS:
        gradients = problem.gradients(80 * problem.d)
        for n in SHIFTS:
            theta = simulate(Rule(ADASHIFT, 0.0, beta2, n) if n else Rule(ADAM, 0.0, beta2), gradients, 1.0)[:, 0]
            rows.append({
                "C": problem.C, "d": problem.d, "beta2": beta2, "n": n, "closed_form": problem.displacement(beta2, n),
                "walked": float(theta[-1] - theta[-1 - problem.d]),
            })  # fmt: skip
    return rows


def digits(
    config: AdaShiftConfig, seed: int, epochs: int, say: Callable[[str], None], contenders: Sequence[Contender]
) -> tuple[list[Row], list[Row]]:
    """Every contender from the same start: final loss and accuracy, and a curve. `config` changes "AdaShift mean"."""
    data, rows, curves = load_digits(seed), [], []
    for contender in contenders:
        say(contender.name)
        if contender.name == "AdaShift mean":
            contender = Contender(contender.name, config.lr, _made(config))
        row, losses = train(data, contender, seed, epochs)
        rows.append({"optimizer": contender.name, "lr": contender.lr, "epochs": epochs, **row})
        every = max(1, len(losses) // 60)
        curves += [
            {"optimizer": contender.name, "step": i, "loss": float(np.mean(losses[i : i + every]))}
            for i in range(0, len(losses) - every + 1, every)
        ]
    return rows, curves


def _made(config: AdaShiftConfig) -> Callable:
    return lambda params, lr: AdaShift(params, **{**vars(config), "lr": lr})


def run(
    config: AdaShiftConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """The walks, their explanation, and the digits. `config` is that of AdaShift on the digits.

    Raises ValueError for an unknown budget or table.
    """
    check_budget(budget)
    if unknown := [name for name in only if name not in TABLES]:
        raise ValueError(f"only={unknown[0]!r} is not a table; choose from {', '.join(TABLES)}")
    names, tables = only or TABLES, {}
    if "walk" in names:
        tables["walk"] = walk(seed)
    if "factors" in names:
        tables["factors"] = factors(seed)
    if "sequential" in names:
        tables["sequential"] = sequential()
    if "digits" in names:
        chosen = [c for c in CONTENDERS if budget == FULL or c.name in QUICK_CONTENDERS]
        rows, curves = digits(config or AdaShiftConfig.quick(), seed, EPOCHS[budget], say, chosen)
        tables |= {"digits": rows, "curves": curves}
    return LabResult("adashift", budget, seed, claims(tables), tables)


def claims(tables: Mapping[str, list[Row]]) -> tuple[Claim, ...]:
    """What the tables say about the paper's statements."""
    found: list[Claim] = []
    for row in tables.get("walk", ()):
        wrong = row["rule"].startswith(ADAM)
        right, runs = row["right_way"], row["runs"]
        found.append(Claim(
            f"{row['rule']} walks the {'wrong' if wrong else 'right'} way (C {row['C']:g}, delta {row['delta']:g})",
            f"{runs} of {runs} runs", f"{runs - right if wrong else right} of {runs}", right == (0 if wrong else runs),
        ))  # fmt: skip
    for row in tables.get("factors", ()):
        if row["rule"].startswith(ADAM):
            expected, holds = "below 0.1", row["ratio"] < 0.1
        else:
            expected, holds = "from 0.98 to 1.02", 0.98 < row["ratio"] < 1.02
        if row["rule"] in ("Adam, beta1 0", "AdaShift, n 1, beta1 0", "AMSGrad, beta1 0"):
            found.append(Claim(f"{row['rule']}: factor of C over that of -1", expected, f"{row['ratio']:.3f}", holds))
    if rows := tables.get("sequential"):
        gap = max(abs(r["walked"] / r["closed_form"] - 1) for r in rows)
        found.append(Claim("The closed form of a period is what is walked", "within 1e-4", f"{gap:.1e}", gap < 1e-4))
    if rows := tables.get("digits"):
        lowest = min(rows, key=lambda r: r["accuracy"])
        bar = LEARNED if rows[0]["epochs"] >= EPOCHS[FULL] else 0.9
        found.append(Claim(
            "Every optimiser learns the digits at its own rate", f"at least {bar}",
            f"{lowest['accuracy']:.3f} ({lowest['optimizer']})", lowest["accuracy"] >= bar,
        ))  # fmt: skip
    return tuple(found)

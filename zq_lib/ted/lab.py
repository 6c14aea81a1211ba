"""TED's experiments: what a filter keeps of two digits (7.1), and a fair comparison on real text (7.2).

`run(budget="quick")` is the notebook's minute: a teacher that knows both digits, probes of its filtered states, and
students that learn from it. `run(budget="full")` is the full size and adds real text; `zq bench ted` repeats both over
seeds, adds the decoder of `lens`, and writes `bench/results/ted_*.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget, mean_interval
from zq_lib.ted import arms, digits, text
from zq_lib.ted.arms import START, Arm, Moment, Problem
from zq_lib.ted.cache import look
from zq_lib.ted.config import TedConfig
from zq_lib.ted.filters import TaskFilters

TABLES = ("selectivity", "digits", "text")
Say = Callable[[str], None]


def run(
    config: TedConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    only: Sequence[str] = (),
    say: Say = lambda _: None,
) -> LabResult:
    """Train a teacher on two digits, probe what filters keep of them, and distil it in several ways.

    `config` sets the width of the narrow filter on digits and both weights; the other arms keep theirs. `only` names
    some of the tables "selectivity", "digits" and "text". Raises ValueError for an unknown budget or table.
    """
    check_budget(budget)
    if unknown := [name for name in only if name not in TABLES]:
        raise ValueError(f"only={unknown[0]!r} is not a table; choose from {', '.join(TABLES)}")
    names = only or (TABLES if budget == FULL else TABLES[:2])
    config = config or TedConfig.quick(8)
    tables: dict[str, list[Row]] = {}
    if "selectivity" in names or "digits" in names:
        found = digits.digits(digits.SIZES[budget], seed, say)
        if "selectivity" in names:
            say("probes")
            tables["selectivity"] = digits.selectivity(found)
        if "digits" in names:
            say("students")
            problem = replace(found.problem(), kd_weight=config.kd_weight)
            tables["digits"] = arms.compare(problem, digit_arms(config), seed)
    if "text" in names:
        tables["text"] = text_rows(text.setting(text.SIZES[budget], say=say), seed, text.ARMS)
    return LabResult("ted", budget, seed, claims(tables), tables)


def digit_arms(config: TedConfig) -> dict[Arm, float]:
    """Labels alone, KD, layer-wise distillation, and TED as `config` has it, all at its weight of filtered states."""
    own = digits.TED if config.filter_dim in (None, digits.TED.dim) else narrow(config.filter_dim)
    return {arm: config.layer_weight or 1.0 for arm in (digits.PLAIN, digits.KD, digits.LWD, own)}


def narrow(dim: int) -> Arm:
    """TED with filters of one width."""
    return Arm(f"TED {dim}", "trained", dim)


def text_rows(setting: text.Setting, seed: int, chosen: Sequence[Arm]) -> list[Row]:
    """The arms on real text from the start of a seed, each with the weight that was chosen for it."""
    return arms.compare(setting.problem(seed), {arm: text.WEIGHTS[arm] for arm in chosen}, seed)


def live(problem: Problem, config: TedConfig, seed: int = 0, every: int = 1) -> Iterator[tuple[Row, Moment]]:
    """TED with any widths and weights, step by step: the terms of the loss as they enter it, already weighted.

    The last row also has the accuracy and loss of the student on the test.
    """
    arm = narrow(config.filter_dim or problem.teacher.config.hidden_size)
    if not config.layer_weight:
        arm = text.KD if config.kd_weight else digits.PLAIN
    settings = replace(problem, kd_weight=config.kd_weight)
    for moment in arms.watch(settings, {arm: config.layer_weight}, seed):
        row = term_row(moment, config)
        if moment.row is not None:
            yield {**row, **moment.row}, moment
        elif moment.step % every == 0:
            yield row, moment


def term_row(moment: Moment, config: TedConfig) -> Row:
    """The loss of a step and its three terms, as they enter it."""
    terms = moment.terms
    return {
        "step": moment.step, "total": float(terms.total), "task": float(terms.task),
        "kd": config.kd_weight * float(terms.kd), "layer": config.layer_weight * float(terms.layer),
    }  # fmt: skip


@torch.no_grad()
def answers(models: Mapping[str, nn.Module], found: text.Questions, question: str) -> list[Row]:
    """What each model says to a question: a row per model and kind of answer, with its probability."""
    batch, rows = found.encode([question]), []
    for name, model in models.items():
        model.eval()
        shares = model(**batch).logits.softmax(-1)[0].tolist()
        rows += [{"model": name, "kind": k, "probability": p} for k, p in zip(found.kinds, shares, strict=True)]
    return rows


@torch.no_grad()
def layer_answers(filters: TaskFilters, found: text.Questions, question: str) -> list[Row]:
    """What the first stage's heads say behind each layer: a row per layer and kind of answer, with its probability."""
    filters.eval()
    batch, rows = found.encode([question]), []
    seen = look(filters.model, batch, filters.layers)
    for place, (layer, states) in enumerate(zip(filters.layers, seen.states, strict=True)):
        shares = filters.logits(place, states, batch["attention_mask"].bool()).softmax(-1)[0].tolist()
        rows += [{"layer": layer, "kind": k, "probability": p} for k, p in zip(found.kinds, shares, strict=True)]
    return rows


def differences(rows: Sequence[Row], baseline: str, value: str = "accuracy") -> list[Row]:
    """Each arm's mean difference to the baseline over seeds, in pairs, with Student's 95 % interval.

    `rows` are runs with `seed`, `arm`, `weight` and the value; an arm at several weights has its weight in its name.
    Raises LookupError for a baseline that has no runs.
    """
    by_arm: dict[str, dict[Any, float]] = {}
    for row in rows:
        by_arm.setdefault(label(row, rows), {})[row["seed"]] = row[value]
    if baseline not in by_arm:
        raise LookupError(f"baseline={baseline!r} has no runs; choose one of {', '.join(by_arm)}")
    base, found = by_arm[baseline], []
    for arm, values in by_arm.items():
        if arm == baseline:
            continue
        gaps = [values[seed] - base[seed] for seed in values]
        mean, low, high = mean_interval(gaps)
        found.append({
            "arm": arm, "difference": mean, "low": low, "high": high, "wins": sum(g > 0 for g in gaps),
            "seeds": len(gaps), "differences": gaps,
        })  # fmt: skip
    return found


def label(row: Row, rows: Sequence[Row]) -> str:
    """An arm's name, with its weight if it was run at several."""
    weights = {r["weight"] for r in rows if r["arm"] == row["arm"]}
    return row["arm"] if len(weights) == 1 else f"{row['arm']}, weight {row['weight']:g}"


def claims(tables: Mapping[str, Sequence[Row]]) -> tuple[Claim, ...]:
    """What the tables say."""
    found: list[Claim] = []
    if "selectivity" in tables:
        found += kept_claims(tables["selectivity"])
    if "text" in tables:
        found += start_claims(tables["text"])
    return tuple(found)


def kept_claims(rows: Sequence[Row]) -> list[Claim]:
    """A narrow filter forgets the digit that the task does not need, a wide one does not; images known to the teacher.

    Several seeds' rows are all asked for.
    """
    last = max(r["layer"] for r in rows)

    def probed(dim: int, side: str) -> list[float]:
        where = (last, dim, side, "known")
        return [r["accuracy"] for r in rows if (r["layer"], r["dim"], r["side"], r["images"]) == where]

    other, wanted, wide = probed(8, "right"), probed(8, "left"), [*probed(64, "left"), *probed(64, "right")]
    return [
        Claim(
            "A filter of width 8 forgets the digit that the task does not need",
            "a probe reads it at 0.65 or less", f"{max(other):.3f}", max(other) <= 0.65,
        ),
        Claim("It keeps the digit that the task needs", "0.97 or more", f"{min(wanted):.3f}", min(wanted) >= 0.97),
        Claim("A filter of full width forgets neither", "0.95 or more for both", f"{min(wide):.3f}", min(wide) >= 0.95),
    ]  # fmt: skip


def start_claims(rows: Sequence[Row]) -> list[Claim]:
    """One seed on text: distilling the output helps."""
    found = {r["arm"]: r["accuracy"] for r in rows}
    gain = found[text.KD.name] - found[START]
    return [
        Claim("Distilling the output is better than the start", "by 0.02 or more", f"{gain:+.3f}", gain >= 0.02)
    ]  # fmt: skip


def text_claims(rows: Sequence[Row]) -> list[Claim]:
    """All seeds on text. The last one was open: is a trained filter better than principal components as narrow?"""
    kd = next(r for r in differences(rows, START) if r["arm"] == text.KD.name)
    over_lwd = next(r for r in differences(rows, text.LWD.name) if r["arm"] == text.TED.name)
    found = [
        Claim(
            "Distilling the output is better than the start, on the mean", "by 0.02 or more", spoken(kd),
            kd["difference"] >= 0.02,
        ),
        Claim(
            "TED is not worse than layer-wise distillation, on the mean", "by -0.002 or more", spoken(over_lwd),
            over_lwd["difference"] >= -0.002,
        ),
    ]  # fmt: skip
    over_pca = {r["arm"]: r for r in differences(rows, text.PCA.name)}
    for arm, words in (
        (text.TED, "Trained filters are better than a PCA projection of the same width"),
        (text.UNFITTED, "So are they when the student's own filters start untrained in both"),
    ):
        gap = over_pca[arm.name]
        found.append(Claim(words, "a 95 % interval of the paired difference above 0", spoken(gap), gap["low"] > 0))
    return found


def spoken(gap: Row) -> str:
    """A paired difference with its interval, in words."""
    return f"{gap['difference']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}), {gap['wins']} of {gap['seeds']} seeds"

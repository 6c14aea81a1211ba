"""The AdaShift page's pictures, tables and sentences: figures that stay readable on a telephone."""

from __future__ import annotations

from html import escape
from math import nan, sqrt

import numpy as np

from apps.adashift_run import HandResult, TrainingResult, WalkResult
from apps.adashift_settings import DELTAS, IDENTITY, SEQUENTIAL, STOCHASTIC, Walk
from zq_lib.adashift import Sequential, critical_delta
from zq_lib.adashift.config import FRAGILE_EPS
from zq_lib.adashift.counterexamples import ADAM, ADASHIFT, AMSGRAD, RULES
from zq_lib.adashift.figures import OPTIMISERS
from zq_lib.adashift.figures import training as curves
from zq_lib.adashift.training import TEST
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
EXPLODED = 100.0  # a loss of a batch that no start gives; guessing has log(10)
BELOW = {"loc": "outside lower center", "ncols": 2, "columnspacing": 1.5}


# --- a walk -----------------------------------------------------------------------------------------------------------
def paths(result: WalkResult) -> Figure:
    """theta of all rules: the mean of all runs, and a band from the lowest to the highest."""
    with style():
        fig, axes = subplots(width=WIDTH, height=3.5)
        axes.axhline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
        for name, path in result.paths.items():
            colour, line, marker = OPTIMISERS[name]
            axes.plot(result.at, path["mean"], linestyle=line, marker=marker, markevery=(len(OPTIMISERS[name]), 16),
                      ms=5, color=PALETTE[colour], label=name)  # fmt: skip
            if result.runs > 1:
                axes.fill_between(result.at, path["low"], path["high"], color=PALETTE[colour], alpha=0.2, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel("theta (the right way is down)")
        wrong = _wrong(result)
        axes.set_title(f"The wrong way: {', '.join(wrong)}" if wrong else "All walk the right way")
        fig.legend(**BELOW)
    said = "; ".join(f"{name} {_end(result, name)}" for name in result.ends)
    band = f", means of {result.runs} runs with bands from the lowest to the highest" if result.runs > 1 else ""
    many = " (and so many of the runs below zero)" if result.runs > 1 else ""
    return Figure(
        fig, f"Lines of theta over {result.settings.steps} steps{band}; down is right. They end at{many}: {said}."
    )


def _wrong(result: WalkResult) -> list[str]:
    return [name for name, end in result.ends.items() if end["mean"] > 0]


def _end(result: WalkResult, name: str) -> str:
    end = result.ends[name]
    runs = f" ({end['right']} of {result.runs})" if result.runs > 1 else ""
    return f"{_signed(end['mean'])}{runs}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def factors(result: WalkResult) -> Figure:
    """Pairs of bars, logarithmic: the mean net update factor of the gradients above and below zero, per rule."""
    at = np.arange(len(result.factors))[::-1]
    with style():
        fig, axes = subplots(width=WIDTH, height=3.5)
        for key, label, colour, hatch, up in (
            ("large", "gradients above 0", "blue", "", 0.2), ("small", "gradients below 0", "orange", "//", -0.2)
        ):  # fmt: skip
            values = [row[key] for row in result.factors.values()]
            bars = axes.barh(at + up, values, 0.38, color=PALETTE[colour], edgecolor="white", hatch=hatch, label=label)
            axes.bar_label(bars, [f" {number(v)}" for v in values], fontsize=10)
        axes.set_xscale("log")
        axes.margins(x=0.3)
        axes.set_yticks(at, list(result.factors))
        axes.set_xlabel("net update factor k / rate")
        worst = max(result.factors, key=lambda name: abs(np.log(result.factors[name]["ratio"])))
        fold = np.exp(abs(np.log(result.factors[worst]["ratio"])))
        alike = fold < 1.1  # what a few thousand draws leave open
        axes.set_title("k is alike for all gradients" if alike else f"{worst}: k differs {number(fold)}-fold")
        fig.legend(**BELOW)
    said = "; ".join(
        f"{name} {number(f['large'])} and {number(f['small'])}, ratio {number(f['ratio'])}"
        for name, f in result.factors.items()
    )
    return Figure(
        fig, f"Pairs of bars, logarithmic, of the mean net update factors of gradients above and below zero: {said}."
    )


def walk_rows(result: WalkResult) -> list[tuple[object, ...]]:
    """All rules in numbers."""
    return [
        (name, end["mean"], f"{number(end['low'])} to {number(end['high'])}", f"{end['right']} of {result.runs}",
         *(result.factors[name][key] for key in ("large", "small", "ratio")))
        for name, end in result.ends.items()
    ]  # fmt: skip


def walk_verdict(result: WalkResult) -> str:
    """Who goes where, and whether that was to be expected."""
    s, wrong = result.settings, _wrong(result)
    right = [name for name in RULES if name not in wrong]
    gone = [
        f"the {way} way {', '.join(f'{name} to {_end(result, name)}' for name in names)}"
        for names, way in ((wrong, "wrong"), (right, "right"))
        if names
    ]
    below = " (and so many of the runs below zero)" if result.runs > 1 else ""
    said = [f"{s.steps} steps take{below}: {'; '.join(gone)}.", _expected(result, wrong)]
    if ADASHIFT in right and AMSGRAD in right:
        times = result.ends[ADASHIFT]["mean"] / result.ends[AMSGRAD]["mean"]
        if times > 3:
            said.append(f"AdaShift comes {number(times)} times as far as AMSGrad.")
    return " ".join(said)


def _expected(result: WalkResult, wrong: list[str]) -> str:
    s = result.settings
    if s.problem == STOCHASTIC:
        line, above = critical_delta(s.C, s.beta2), s.delta >= critical_delta(s.C, s.beta2)
        place = f"delta {s.delta:g} is {'above' if above else 'below'} delta_c = {number(line)}"
        if above == (ADAM not in wrong):
            return f"As expected of Adam: {place}."
        return f"{place}, yet Adam goes the {'wrong' if above else 'right'} way: delta_c is only an estimate."
    if s.problem == SEQUENTIAL:
        same = (
            f"n = {s.n} is a multiple of the period {s.d}, so the gradient of n steps ago is today's, and AdaShift "
            "divides by what Adam divides by."
            if s.n % s.d == 0
            else f"Nothing is random here: what decides is where in the period of {s.d} the shift {s.n} looks."
        )
        if s.beta1:
            return same
        ways = (Sequential(s.C, s.d).displacement(s.beta2, n) for n in (0, s.n))
        return f"{same} In closed form, per period and unit of rate: Adam {_signed(next(ways))}, AdaShift " + (
            f"{_signed(next(ways))}."
        )
    mean = np.mean(s.gradients)
    return f"The mean of your gradients is {number(float(mean))}, so theta should decrease."


def mark(settings: Walk) -> str:
    """delta_c on a line as long as the delta slider, hatched where Adam is expected to go wrong. HTML."""
    if settings.problem != STOCHASTIC:
        return ""
    low, high = DELTAS
    line = critical_delta(settings.C, settings.beta2)
    share = 100 * min(max((line - low) / (high - low), 0), 1)
    said = f"delta_c = {number(line)}: left of it, hatched, Adam is to go wrong"
    if line > high:
        said = f"delta_c = {number(line)}, beyond the slider: Adam is to go wrong"
    hatched = "repeating-linear-gradient(45deg, var(--body-text-color) 0 1px, transparent 1px 5px)"
    return (
        '<div aria-hidden="true" style="position: relative; height: 12px; margin: 0 38px 0 46px">'
        f'<div style="position: absolute; top: 2px; height: 8px; width: {share:.1f}%; background: {hatched}"></div>'
        f'<div style="position: absolute; left: {share:.1f}%; height: 12px; '
        'border-left: 3px solid var(--body-text-color)"></div>'
        f'</div><p style="margin: 0 8px; font-size: .8rem; line-height: 1.25">{escape(said)}</p>'
    )


# --- by hand ----------------------------------------------------------------------------------------------------------
def hand_words(result: HandResult, step: int) -> str:
    """One step as a calculation."""
    s, row = result.settings, result.rows[step - 1]
    t, head = row["t"], f"Step {row['t']} of {len(result.rows)}: g_{row['t']} = {row['g']:g}."
    if row["seen"] is None:
        return f"{head} It is only remembered. v has seen nothing yet, so nothing moves yet (n = {s.n})."
    before = result.rows[t - 2]["v"] if t > 1 else 0.0
    shift = s.n if s.rule == ADASHIFT else 0
    sum_ = f"{s.beta2:g} · {number(before)} + {1 - s.beta2:.3g} · ({row['seen']:g})²"
    if s.rule == AMSGRAD:
        found = f"v keeps the largest average so far: {number(row['v'])}"
    else:
        found = f"v = {sum_} = {number(row['v'])}"
    if not row["age"]:
        return f"{head} g_{t - shift} = 0 enters v, which has seen nothing but zeros; nothing moves."
    own = "itself" if shift == 0 else "not itself but"
    corrected = f"; corrected v / (1 − {s.beta2:g}^{row['age']}) = {number(row['corrected'])}"
    return (
        f"{head} Into v goes {own} g_{t - shift} = {row['seen']:g}: {found}{corrected}. The first moment is "
        f"{number(row['m'])}, times r = {number(row['r'])} makes a step of {_signed(row['step'])}, to theta = "
        f"{_signed(row['theta'])}."
    )


def hand_rows(result: HandResult, step: int) -> list[tuple[object, ...]]:
    """The table up to a step."""
    return [
        (r["t"], f"{r['g']:g}", "–" if r["seen"] is None else f"{r['seen']:g}",
         *(r[key] for key in ("v", "m", "r", "step", "theta")))
        for r in result.rows[:step]
    ]  # fmt: skip


def factor_rows(result: HandResult, step: int) -> list[tuple[object, ...]]:
    """What each gradient has done up to a step."""
    now, last = result.rows[step - 1]["k"], result.rows[-1]["k"]
    return [
        (f"g_{i + 1} = {g:g}", now[i], -g * now[i], last[i])
        for i, g in enumerate(result.settings.gradients[:step])
    ]  # fmt: skip


def spent(result: HandResult, step: int) -> Figure:
    """The net update factor of every gradient so far, inside an outline of what it is at the end."""
    g, now, last = result.settings.gradients, result.rows[step - 1]["k"], result.rows[-1]["k"]
    at = np.arange(1, len(g) + 1)
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        for label, colour, hatch, above in (("g > 0", "blue", "", True), ("g < 0", "orange", "//", False)):
            kept = np.array([(value > 0) == above for value in g])
            if kept.any():
                axes.bar(at[kept], np.array(now)[kept], 0.7, color=PALETTE[colour], hatch=hatch, edgecolor="white",
                         label=label)  # fmt: skip
        axes.bar(at, last, 0.7, fill=False, edgecolor=PALETTE["grey"], linestyle="--", label="at the end")
        axes.set_xticks(at, [f"{value:g}" for value in g])
        axes.set_xlabel("gradients g_1, g_2, … in turn")
        axes.set_ylabel("k so far")
        axes.set_title(f"Net update factors after step {step}")
        fig.legend(**{**BELOW, "ncols": 3})
    said = ", ".join(f"{value:g} {number(k)}" for value, k in zip(g[:step], now[:step], strict=True))
    return Figure(
        fig, f"Bars of the net update factor that each gradient has got by step {step}, outlined what it gets: {said}."
    )


# --- the digits -------------------------------------------------------------------------------------------------------
def losses(result: TrainingResult) -> Figure:
    """Training loss by epoch."""
    rows = [{**r, "loss": nan if r["loss"] is None else r["loss"]} for r in result.curves]
    return _narrow(curves(rows, "loss", title="Training loss"))


def accuracy(result: TrainingResult) -> Figure:
    """Test accuracy by epoch."""
    return _narrow(curves(result.curves, "accuracy", title="Test accuracy"))


def _narrow(figure: Figure) -> Figure:
    """The library's picture for half a column, its legend below."""
    fig = figure.figure
    fig.set_size_inches(WIDTH, 3.5)
    with style():
        for axes in fig.axes:
            axes.get_legend().remove()
        names = fig.axes[0].get_legend_handles_labels()[1]
        fig.legend(**{**BELOW, "ncols": 1 if max(map(len, names)) > 20 else 2})
    return figure


def training_rows(result: TrainingResult) -> list[tuple[object, ...]]:
    """All optimisers after their last epoch."""
    found = []
    for name in result.settings.optimizers:
        if end := result.end(name):
            loss, peak = (_finite(x) for x in (end["loss"], result.peaks[name]))
            found.append((name, f"{result.rates[name]:g}", end["epoch"], loss, peak, f"{100 * end['accuracy']:.1f}"))
    return found


def _finite(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _peak(value: float | None) -> str:
    return "it leaves the finite numbers" if value is None else f"a batch's loss reaches {number(value)}"


def training_verdict(result: TrainingResult) -> str:
    """Who broke down, and whether the others differ by more than noise."""
    s, ends = result.settings, {name: result.end(name) for name in result.settings.optimizers}
    broken = [name for name, peak in result.peaks.items() if peak is None or peak > EXPLODED]
    said = [
        f"{name} breaks down: {_peak(result.peaks[name])}, and it ends with {100 * ends[name]['accuracy']:.1f}% of the "
        "test digits."
        for name in broken
    ]
    if IDENTITY in broken and s.eps < FRAGILE_EPS:
        said.append(
            f"With eps = {s.eps:g}, weights whose gradient was almost zero n steps ago are divided by almost nothing."
        )
    whole = {name: end["accuracy"] for name, end in ends.items() if name not in broken}
    if len(whole) > 1:
        best, worst = max(whole, key=whole.__getitem__), min(whole, key=whole.__getitem__)
        gap, at = 100 * (whole[best] - whole[worst]), whole[best]
        noise = 200 * sqrt(2 * at * (1 - at) / TEST)
        judged = "more than" if gap > noise else "inside"
        said.append(
            f"The others end between {100 * whole[worst]:.1f}% ({worst}) and {100 * whole[best]:.1f}% ({best}): "
            f"{judged} what chance does to two shares of {TEST} test digits, ± {number(noise)} points."
        )
    elif whole:
        said += [f"{name} ends with {100 * share:.1f}% of {TEST} test digits." for name, share in whole.items()]
    return " ".join(said)

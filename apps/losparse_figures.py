"""The LoSparse page's pictures, tables and sentences: figures that stay readable on a telephone."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from apps.losparse_run import GRID, OURS, LanguageResult, MatrixResult, TrainingResult
from apps.losparse_settings import MODELS, STEPS
from zq_lib.core.blocks import grid
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.losparse import lab
from zq_lib.losparse.figures import METHODS
from zq_lib.losparse.oneshot import LOW_RANK, ROWS

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
WAYS = (lab.DENSE, OURS, ROWS, LOW_RANK)
SHORT = {module: name for _, _, kinds in MODELS.values() for name, module in kinds.items()}


def _percent(share: float) -> str:
    return f"{number(100 * share)}%"


# --- one matrix -------------------------------------------------------------------------------------------------------
def parts(result: MatrixResult) -> Figure:
    """A corner of W, of U V and of S with the kept rows."""
    w, product = np.array(result.weight), np.array(result.product)
    sparse = np.zeros_like(w)
    sparse[result.kept] = (w - product)[result.kept]
    most = float(np.quantile(np.abs(w), 0.99))
    with style():
        fig, axes = subplots(1, 3, width=WIDTH, height=2.0)
        for axis, name, panel in zip(axes, ("W", "U V", "S, kept rows"), (w, product, sparse), strict=True):
            axis.imshow(panel, cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name)
        axes[0].set_ylabel("neuron")
        axes[1].set_xlabel("input")
    said = ", ".join(map(str, result.kept)) or "none"
    return Figure(
        fig,
        f"Maps of the first {len(w)} of {result.outputs} neurons (down) and of {result.inputs} inputs: W, the product "
        f"U V of rank {result.rank}, and S, where these neurons keep their row: {said}.",
    )


def spectrum(result: MatrixResult) -> Figure:
    """Singular values of W and row norms of what U V leaves; what is kept is filled."""
    shares = (result.rank / min(result.outputs, result.inputs), result.rows / result.outputs)
    with style():
        fig, panels = subplots(1, 2, width=WIDTH, height=2.6)
        for axes, values, share, colour, name, what in zip(
            panels, (result.values, result.norms), shares, ("orange", "blue"), ("Singular values", "Rows of S"),
            ("value, % of all", "row, % of all"), strict=True,
        ):  # fmt: skip
            at = np.linspace(0, 100, len(values))
            axes.plot(at, values, color=PALETTE[colour])
            axes.fill_between(at, values, where=at <= 100 * share, color=PALETTE[colour], alpha=0.35)
            axes.axvline(100 * share, color=PALETTE["black"], linewidth=1, linestyle=":")
            axes.set_ylim(bottom=0)
            axes.set_xticks([0, 50, 100])
            axes.set_xlabel(what)
            axes.set_title(name)
        panels[0].set_ylabel("size")
    tenth = [values[round(0.1 * (len(values) - 1))] / values[0] for values in (result.values, result.norms)]
    return Figure(
        fig,
        f"Falling lines of W's singular values and of the norms of S's rows; filled, up to the dotted line, is what is "
        f"kept: {result.rank} singular values and {result.rows} rows. After a tenth of them the singular values are at "
        f"{_percent(tenth[0])} of the largest, the rows at {_percent(tenth[1])}.",
    )


def errors(result: MatrixResult) -> Figure:
    """The squared error of three ways at every size."""
    share = result.size / (result.outputs * result.inputs)
    with style():
        fig, axes = subplots(width=WIDTH, height=3.2)
        for name, values in result.curves.items():
            colour, line, marker = METHODS[name]
            at = [100 * g for g, v in zip(GRID, values, strict=True) if v is not None]
            axes.plot(at, [v for v in values if v is not None], linestyle=line, color=PALETTE[colour], label=name)
            axes.plot([100 * share], [result.errors[name]], marker=marker, ms=7, color=PALETTE[colour])
        axes.set_ylim(0, 1)
        axes.set_xlabel("numbers left, % of W's")
        axes.set_ylabel("relative squared error")
        axes.set_title(f"{min(result.errors, key=result.errors.__getitem__).capitalize()} misses least")
        fig.legend(loc="outside lower center", ncols=3, columnspacing=1, handlelength=1.6)
    said = ", ".join(f"{name} {number(error)}" for name, error in result.errors.items())
    return Figure(
        fig,
        f"Falling lines of the squared error over the size, LoSparse's at rank {result.rank}. Marked is this setting, "
        f"{_percent(share)} of the numbers: {said}.",
    )


def gains(result: MatrixResult) -> Figure:
    """How many times as fast the shrunk layer is, by number of tokens."""
    at = np.arange(len(result.timing))[::-1]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.2)
        for y, row in zip(at, result.timing, strict=True):
            axes.barh(y, row["gain"], 0.6, color=PALETTE["blue" if row["gain"] > 1 else "grey"])
            axes.annotate(f" {number(row['gain'])}×", (row["gain"], y), va="center", fontsize=10)
        axes.axvline(1, color=PALETTE["black"], linewidth=1, linestyle=":")
        axes.set_yticks(at, [_tokens(row) for row in result.timing])
        axes.margins(x=0.2)
        axes.set_xlabel("times as fast as dense (dotted: alike)")
        axes.set_title("Speed of this layer")
    said = "; ".join(f"{_tokens(r)} {number(r['gain'])}" for r in result.timing)
    return Figure(fig, f"Bars of how many times as fast the shrunk layer is as the dense one: {said}.")


def _tokens(row: dict[str, Any]) -> str:
    return f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"


def timing_rows(result: MatrixResult) -> list[tuple[str, float, float, str]]:
    """Milliseconds, and the gain with the range of its pairs."""
    return [
        (_tokens(r), 1e3 * r["dense_s"], 1e3 * r["shrunk_s"],
         f"{number(r['gain'])} ({number(r['gain_low'])} to {number(r['gain_high'])})")
        for r in result.timing
    ]  # fmt: skip


def size_rows(result: MatrixResult) -> list[tuple[object, ...]]:
    """The dense matrix and three ways to the same size."""
    n, k, alone = result.outputs, result.inputs, result.rivals
    rank, rows = alone[LOW_RANK], alone[ROWS]
    return [
        ("dense", min(n, k), n, n * k, 0.0),
        (OURS, result.rank, result.rows, result.size, result.errors[OURS]),
        (ROWS, 0, rows, rows * k, result.errors[ROWS]),
        (LOW_RANK, rank, 0, rank * (n + k), result.errors[LOW_RANK]),
    ]


def matrix_verdict(result: MatrixResult) -> str:
    """Who wins in squared error, and what that is worth."""
    ours = result.errors[OURS]
    said = (
        f"{'less' if ours < result.errors[name] else 'no less'} than {name} ({number(result.errors[name])})"
        for name in (ROWS, LOW_RANK)
    )
    share = result.size / (result.outputs * result.inputs)
    costs = "" if share < 1 else " It has more numbers than the dense matrix, so it should stay dense."
    return (
        f"{_percent(share)} of the numbers are left. LoSparse misses {number(ours)} of the squared weight, "
        f"{next(said)} and {next(said)}.{costs}"
    )


# --- a training -------------------------------------------------------------------------------------------------------
def density(result: TrainingResult, event: int | None = None) -> Figure:
    """Layers x matrices: which share of its rows each one keeps after so many masks, by default all."""
    event = len(result.steps) if event is None else min(event, len(result.steps))
    now = result.densities(event)
    blocks, kinds, places = grid(list(now))
    table = np.full((max(1, len(blocks)), max(1, len(kinds))), np.nan)
    with style():
        fig, axes = subplots(width=WIDTH, height=2.0)
        for name, share in now.items():
            table[places[name]] = share
            axes.annotate(f"{100 * share:.0f}", places[name][::-1], ha="center", va="center",
                          color="white" if share < 0.6 else "black")  # fmt: skip
        axes.imshow(table, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(kinds)), [SHORT[k].replace(" ", "\n") for k in kinds])
        axes.set_yticks(range(len(blocks)), [f"layer {b}" for b in blocks])
        axes.set_title("Rows kept, %" if not event else f"Rows kept after step {result.steps[event - 1]}, %")
    if not event:
        return Figure(fig, "Map of layers by matrices: every matrix still has all rows of S.")
    order = sorted(now, key=now.__getitem__)
    low, high = (f"layer {blocks[places[n][0]]} {SHORT[kinds[places[n][1]]]}" for n in (order[0], order[-1]))
    return Figure(
        fig,
        f"Map of {len(blocks)} layers by {len(kinds)} matrices, the share of rows of S that mask {event} keeps: most "
        f"in {high}, {_percent(now[order[-1]])}, least in {low}, {_percent(now[order[0]])}.",
    )


def share(result: TrainingResult, event: int | None = None) -> Figure:
    """p(t), with a mark for every mask so far and where the map is on it."""
    event = len(result.steps) if event is None else min(event, len(result.steps))
    schedule = lab.settings(OURS, result.settings.ratio, STEPS).schedule()
    curve = [schedule.share(t) for t in range(STEPS)]
    step, left = (result.steps[event - 1], result.shares[event - 1]) if event else (0, 1.0)
    with style():
        fig, axes = subplots(width=WIDTH, height=2.3)
        axes.plot(range(STEPS), curve, "--", color=PALETTE["grey"])
        axes.plot(result.steps, result.shares, linestyle="", marker="o", ms=5, color=PALETTE["blue"])
        axes.plot([step], [left], linestyle="", marker="s", ms=9, color=PALETTE["vermilion"])
        axes.set_ylim(0, 1.08)
        axes.set_xlabel("step")
        axes.set_ylabel("p(t)")
        axes.set_title(f"{_percent(left)} of S may stay at step {step}")
    return Figure(
        fig,
        f"Dashed line of p(t), the share of S that may stay: 1 until step {schedule.warmup}, {number(schedule.target)} "
        f"from step {schedule.last} on. Dots are the {len(result.steps)} masks so far, the square is the map's: "
        f"{_percent(left)} at step {step}.",
    )


def losses(result: TrainingResult) -> Figure:
    """The training losses of all ways, as a mean over five steps."""
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        for name, values in result.losses.items():
            colour, line, _ = METHODS[name]
            smooth = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axes.plot(range(1, len(values) + 1), smooth, linestyle=line, color=PALETTE[colour], label=name)
        axes.set_xlim(0, STEPS)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        if result.losses:
            fig.legend(loc="outside lower center", ncols=2, columnspacing=1)
    said = "; ".join(f"{name} {number(np.mean(v[-5:]))}" for name, v in result.losses.items()) or "no step yet"
    return Figure(fig, f"Lines of the training loss, each point a mean of five steps. At the end: {said}.")


def outcome(result: TrainingResult) -> Figure:
    """Loss on the test questions of all ways."""
    rows = [r for way in WAYS if (r := result.row(way))]
    at = np.arange(len(rows))[::-1]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.4)
        for y, row in zip(at, rows, strict=True):
            colour = METHODS[row["method"]][0]
            hatch = "//" if row["method"] == lab.DENSE else ""
            axes.barh(y, row["nll"], 0.6, color=PALETTE["grey" if hatch else colour], hatch=hatch, edgecolor="white")
            axes.annotate(f" {number(row['nll'])}", (row["nll"], y), va="center", fontsize=10)
        axes.set_yticks(at, [f"{r['method']}, {number(100 * r['kept'])}%" for r in rows])
        axes.margins(x=0.2)
        axes.set_xlabel("loss on test questions")
        axes.set_title("Less is better")
    said = "; ".join(f"{r['method']} {number(r['nll'])}" for r in rows) or "none yet"
    return Figure(fig, f"Bars of the loss on {lab.SIZES['quick'].test} test questions: {said}.")


def outcome_rows(result: TrainingResult) -> list[tuple[object, ...]]:
    """All ways in numbers."""
    return [
        (r["method"], 100 * r["kept"], r["rate"], r["nll"], 100 * r["accuracy"])
        for way in WAYS
        if (r := result.row(way))
    ]


def answer_rows(result: TrainingResult) -> list[tuple[str, str, str]]:
    """The typed questions, before and after."""
    return [
        (text, *(f"{answer[way][0]} ({answer[way][1]:.0%})" for way in (lab.DENSE, OURS)))
        for text, answer in zip(result.settings.questions, result.answers, strict=True)
    ]


def training_verdict(result: TrainingResult) -> str:
    """Who is best at the same size, where a difference of accuracy is more than noise."""
    ours, tests = result.row(OURS), lab.SIZES["quick"].test
    noise = 100 * sqrt(ours["accuracy"] * (1 - ours["accuracy"]) / tests)
    said = []
    for way in (ROWS, LOW_RANK):
        other = result.row(way)
        better = "less" if ours["nll"] < other["nll"] else "more"
        said.append(f"{better} than {way} ({number(other['nll'])})")
    rates = "each at its own best learning rate" if result.settings.own_rates else "one learning rate for all"
    return (
        f"With {_percent(ours['kept'])} of the replaced weights, {rates}: a test loss of {number(ours['nll'])}, "
        f"{said[0]} and {said[1]}. One seed, {tests} questions; an accuracy is sure to ± {number(noise)} points."
    )


# --- a language model -------------------------------------------------------------------------------------------------
def survivors(result: LanguageResult) -> Figure:
    """Blocks x matrices of the language model: which share of the rows of S is kept."""
    table, kinds = np.array(result.densities), list(MODELS["smollm2"][2])
    with style():
        fig, axes = subplots(width=WIDTH, height=3.8)
        image = axes.imshow(table, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(kinds)), [k.replace(" ", "\n") for k in kinds], fontsize=9)
        axes.set_yticks(range(0, len(table), 5))
        axes.set_ylabel("block")
        axes.set_title("Rows of S that stay")
        fig.colorbar(image, ax=axes, ticks=[0, 0.5, 1], format="{x:.0%}")
    means = dict(zip(kinds, table.mean(0), strict=True))
    order = sorted(means, key=means.__getitem__)
    said = ", ".join(f"{k} {_percent(means[k])}" for k in (order[-1], order[0]))
    return Figure(
        fig,
        f"Map of {len(table)} blocks by {len(kinds)} matrices, the share of rows of S that stay. On average most and "
        f"least stay in {said}.",
    )


def language_rows(result: LanguageResult) -> list[tuple[str, str, str]]:
    """The model before and after."""
    pair = (result.dense, result.ours)
    return [
        ("perplexity of unseen text", *(number(s.perplexity) for s in pair)),
        ("parameters, millions", *(number(s.parameters / 1e6) for s in pair)),
        ("size in 32 bits, MB", *(number(4 * s.parameters / 1e6) for s in pair)),
        ("CPU seconds to read 768 tokens", *(number(s.seconds) for s in pair)),
    ]


def language_verdict(result: LanguageResult) -> str:
    """What was lost."""
    before, after = result.dense, result.ours
    return (
        f"{result.settings.label}: {_percent(result.ratio)} of the blocks' weights and "
        f"{_percent(after.parameters / before.parameters)} of the model are left; perplexity goes from "
        f"{number(before.perplexity)} to {number(after.perplexity)}. {result.dense_layers} of "
        f"{sum(map(len, result.densities))} matrices stay dense, which is cheaper for them."
    )

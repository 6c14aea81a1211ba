"""TED's pictures: pure functions from numbers to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row
from zq_lib.ted.filters import LayerReport

# colour, line and marker of an arm by the first word of its name; what is not here takes the others in turn
ARMS = {
    "TED": ("blue", "-", "o"),
    "LWD": ("orange", "--", "s"),
    "KD": ("green", "-.", "^"),
    "labels": ("grey", ":", "x"),
    "teacher": ("black", (0, (1, 1)), "d"),
}
OTHERS = (("purple", (0, (5, 1)), "v"), ("sky", (0, (3, 1, 1, 1)), "D"), ("vermilion", (0, (1, 2)), "P"))
SIDES = {"left": ("blue", "-", "o", "left digit, the task"), "right": ("vermilion", "--", "s", "right digit")}
TERMS = {"task": ("grey", "", "labels"), "kd": ("sky", "//", "output"), "layer": ("blue", "..", "filtered states")}


def layer_accuracy(reports: Mapping[str, Sequence[LayerReport]], chance: float | None = None) -> Figure:
    """Where the answer is known: accuracy of the first stage's head behind each layer, a line per model; what
    `TaskFilters.report` says, of a task that has right answers."""
    with style():
        fig, axes = subplots(width=7.0, height=3.6)
        for (name, of), (colour, line, marker) in zip(reports.items(), _looks(reports), strict=True):
            shares = [100 * r.accuracy for r in of]
            axes.plot(
                [r.layer for r in of], shares, linestyle=line, marker=marker, color=PALETTE[colour], label=name
            )  # fmt: skip
        if chance is not None:
            _level(axes, 100 * chance, "chance")
        axes.set_xticks(sorted({r.layer for of in reports.values() for r in of}))
        axes.set_xlabel("layer")
        axes.set_ylabel("right answers behind the filter, %")
        axes.legend()
        best = {name: max(of, key=lambda r: r.accuracy) for name, of in reports.items()}
        top = max(best, key=lambda name: best[name].accuracy)
        axes.set_title(f"Layer {best[top].layer} of the {top} knows best: {number(100 * best[top].accuracy)} %")
    said = "; ".join(
        f"{name} " + ", ".join(f"layer {r.layer} {number(100 * r.accuracy)} %" for r in of)
        for name, of in reports.items()
    )  # fmt: skip
    return Figure(fig, f"Lines of the heads' accuracy against the layer: {said}.")


def kept(rows: Sequence[Row], chance: float = 0.1, title: str = "") -> Figure:
    """What a probe reads of either digit against the filter's width: rows with `dim`, 0 for the state itself, `side`
    "left" or "right" and `accuracy`, of one layer and one set of images; several rows of a width and side are several
    seeds."""
    dims = sorted({r["dim"] for r in rows if r["dim"]}, reverse=True)
    order = ([0] if any(r["dim"] == 0 for r in rows) else []) + dims
    found = {s: [[float(r["accuracy"]) for r in rows if (r["dim"], r["side"]) == (d, s)] for d in order] for s in SIDES}
    means = {side: [float(np.mean(values)) for values in of] for side, of in found.items()}
    at = np.arange(len(order))
    with style():
        fig, axes = subplots(width=7.0, height=3.8)
        for side, (colour, line, marker, name) in SIDES.items():
            axes.plot(at, means[side], linestyle=line, marker=marker, color=PALETTE[colour], label=name)
            for x, values in zip(at, found[side], strict=True):
                if len(values) > 1:
                    axes.plot([x] * len(values), values, "o", ms=4, mfc="none", color=PALETTE[colour])
        _level(axes, chance, "chance")
        axes.set_ylim(0, 1.05)
        axes.set_xticks(at, ["state" if d == 0 else str(d) for d in order])
        axes.set_xlabel("width of the filter d_f")
        axes.set_ylabel("accuracy of a linear probe")
        axes.legend(loc="center left")
        axes.set_title(
            title or f"At width {order[-1]} the filter keeps {number(means['left'][-1])} of the left digit and "
            f"{number(means['right'][-1])} of the right one"
        )  # fmt: skip
    said = "; ".join(
        f"{'the state' if d == 0 else f'width {d}'} {number(left)} and {number(right)}"
        for d, left, right in zip(order, means["left"], means["right"], strict=True)
    )
    return Figure(
        fig,
        f"Two lines of a probe's accuracy against the width of the filter, for the left digit, which the task asks "
        f"for, and the right one: {said}; chance is {number(chance)}.",
    )


def loss_terms(rows: Sequence[Row], weights: Mapping[str, float]) -> Figure:
    """The stacked terms of the second stage's loss over steps: rows with `step`, `task`, `kd` and `layer`, before the
    `weights` of these three, one for each name that is to be drawn."""
    steps = [r["step"] for r in rows]
    terms = {name: np.array([weight * r[name] for r in rows], float) for name, weight in weights.items()}
    base = np.zeros(len(rows))
    with style():
        fig, axes = subplots(width=7.0, height=3.6)
        for name, values in terms.items():
            colour, hatch, label = TERMS[name]
            axes.fill_between(
                steps, base, base + values, facecolor=PALETTE[colour], edgecolor="white", hatch=hatch, linewidth=0.5,
                label=f"{label}, weight {number(weights[name])}",
            )  # fmt: skip
            base = base + values
        axes.set_ylim(0, 1.35 * base.max())  # room for the legend
        axes.set_xlim(steps[0], steps[-1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, stacked")
        axes.legend()
        ends = {name: float(values[-1]) for name, values in terms.items()}
        largest = max(ends, key=ends.__getitem__)
        axes.set_title(f"At the end {number(100 * ends[largest] / base[-1])} % of the loss is the {_term(largest)}")
    said = "; ".join(f"{_term(name)} {number(float(of[0]))} to {number(ends[name])}" for name, of in terms.items())
    return Figure(fig, f"Stacked areas of the loss's weighted terms, steps {steps[0]} to {steps[-1]}: {said}.")


def _term(name: str) -> str:
    return f"{TERMS[name][2]} term"


def arms(rows: Sequence[Row], baseline: str, label: str = "accuracy", title: str = "") -> Figure:
    """Paired differences to an arm with their intervals: rows with `arm`, `difference`, `low` and `high`, in the unit
    of `label`, and if the single seeds are to be seen `differences`, a sequence.

    The title counts the arms whose interval leaves out 0, so that a difference inside the noise is not read as one.
    """
    at = np.arange(len(rows))[::-1]
    above, below = [r["arm"] for r in rows if r["low"] > 0], [r["arm"] for r in rows if r["high"] < 0]
    with style():
        fig, axes = subplots(width=7.5, height=0.45 * len(rows) + 1.4)
        axes.axvline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
        for y, r in zip(at, rows, strict=True):
            clear = r["low"] > 0 or r["high"] < 0
            colour = PALETTE["blue" if clear else "grey"]
            axes.plot([r["low"], r["high"]], [y, y], "-", color=colour, linewidth=2.5)
            axes.plot(r["difference"], y, "o", color=colour, ms=8, mfc=colour if clear else "white", zorder=3)
            if "differences" in r:
                axes.plot(r["differences"], [y - 0.28] * len(r["differences"]), "|", color=PALETTE["vermilion"], ms=7)
            axes.annotate(f" {r['difference']:+.4f}", (r["high"], y), va="center", fontsize=10)
        axes.set_yticks(at, [r["arm"] for r in rows])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.margins(x=0.2)
        axes.set_xlabel(f"difference in {label} to {baseline}")
        axes.set_title(
            title or f"{len(above)} above {baseline}, {len(below)} below, {_rest(rows, above, below)} inside the noise"
        )
    said = "; ".join(f"{r['arm']} {r['difference']:+.4f} ({r['low']:+.4f} to {r['high']:+.4f})" for r in rows)
    seeds = " Ticks are single seeds." if any("differences" in r for r in rows) else ""
    return Figure(
        fig,
        f"Points with intervals: paired difference in {label} to {baseline}: {said}. A hollow point has an interval "
        f"that holds 0.{seeds}",
    )


def _rest(rows: Sequence[Row], *found: Sequence[str]) -> int:
    return len(rows) - sum(map(len, found))


def lens(rows: Sequence[Row], title: str = "") -> Figure:
    """The tuned lens: loss of the next word behind each layer, read by the identity and by the filter. Rows with
    `layer`, `identity` and `lens`; one whose layer is "model" is the whole model's and becomes a level."""
    layers = [r for r in rows if r["layer"] != "model"]
    whole = next((float(r["lens"]) for r in rows if r["layer"] == "model"), None)
    at = [int(r["layer"]) for r in layers]
    with style():
        fig, axes = subplots(width=7.0, height=3.8)
        for key, name, colour, line, marker in (
            ("identity", "identity (logit lens)", "grey", "--", "x"), ("lens", "filter (tuned lens)", "blue", "-", "o"),
        ):  # fmt: skip
            axes.plot(at, [r[key] for r in layers], linestyle=line, marker=marker, color=PALETTE[colour], label=name)
        if whole is not None:
            _level(axes, whole, f"whole model, {number(whole)}")
        axes.set_xticks(at)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("loss of the next word, nats")
        axes.legend()
        gain = max(layers, key=lambda r: r["identity"] - r["lens"])
        axes.set_title(
            title or f"Behind layer {gain['layer']} the filter takes {number(gain['identity'])} down to "
            f"{number(gain['lens'])}"
        )  # fmt: skip
    said = "; ".join(f"layer {r['layer']} {number(float(r['identity']))} to {number(float(r['lens']))}" for r in layers)
    end = "" if whole is None else f" The whole model has {number(whole)}."
    return Figure(fig, f"Two falling lines of loss against the layer, identity and trained filter: {said}.{end}")


def perplexity(rows: Sequence[Row], teacher: float | None = None, title: str = "") -> Figure:
    """Perplexity over steps: rows with `arm`, `step` and `perplexity`. `teacher` becomes a level; by default that of
    the arm of this name, if there is one."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["arm"], []).append(row)
    if (of := lines.pop("teacher", None)) and teacher is None:
        teacher = float(of[-1]["perplexity"])
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        for (name, of), (colour, line, marker) in zip(lines.items(), _looks(lines), strict=True):
            axes.plot(
                [r["step"] for r in of], [r["perplexity"] for r in of], linestyle=line, marker=marker, ms=4,
                color=PALETTE[colour], label=name,
            )  # fmt: skip
        if teacher is not None:
            _level(axes, teacher, f"teacher, {number(teacher)}")
        axes.set_yscale("log")
        _plain_ticks(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("perplexity")
        axes.legend()
        ends = {name: float(of[-1]["perplexity"]) for name, of in lines.items()}
        axes.set_title(title or f"{min(ends, key=ends.__getitem__)} ends lowest, at {number(min(ends.values()))}")
    said = "; ".join(
        f"{name} {number(float(of[0]['perplexity']))} to {number(ends[name])}" for name, of in lines.items()
    )
    end = "" if teacher is None else f" The teacher has {number(teacher)}."
    return Figure(
        fig, f"Falling lines of perplexity, logarithmic, over {max(r['step'] for r in rows)} steps: {said}.{end}"
    )


def costs(rows: Sequence[Row], unit: str = "MB", title: str = "") -> Figure:
    """Plain torch against the chunked or fused path, bytes or time: rows with `what`, `plain` and `ours` in `unit`."""
    at, gains = np.arange(len(rows))[::-1], [r["plain"] / r["ours"] for r in rows]
    with style():
        fig, axes = subplots(width=7.5, height=0.7 * len(rows) + 1.4)
        for way, name, colour, hatch, shift in (
            ("plain", "plain torch", "grey", "", 0.2), ("ours", "chunked", "blue", "//", -0.2)
        ):  # fmt: skip
            values = [float(r[way]) for r in rows]
            axes.barh(at + shift, values, 0.38, color=PALETTE[colour], edgecolor="white", hatch=hatch, label=name)
            for y, v in zip(at + shift, values, strict=True):
                axes.annotate(f" {number(v)}", (v, y), va="center", fontsize=10)
        axes.set_yticks(at, [str(r["what"]) for r in rows])
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the bars, not on them
        axes.set_title(title or f"Without stored probabilities and states: {_times(gains)} times less")
    said = "; ".join(f"{r['what']} {number(float(r['plain']))} to {number(float(r['ours']))} {unit}" for r in rows)
    return Figure(fig, f"Pairs of bars, plain torch and chunked: {said}.")


def _times(gains: Sequence[float]) -> str:
    low, high = number(min(gains)), number(max(gains))
    return low if low == high else f"{low} to {high}"


def _plain_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic axis as numbers without powers."""
    low, high = axes.get_ylim()
    steps = [m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5)]
    shown = [s for s in steps if low <= s <= high]
    axes.set_yticks(shown, [f"{s:g}" for s in shown])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _level(axes: Axes, value: float, name: str) -> None:
    """A horizontal line with its name at the right end."""
    axes.axhline(value, color=PALETTE["black"], linewidth=1, linestyle=":")
    axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                  textcoords="offset points", fontsize=10)  # fmt: skip


def _looks(lines: Mapping[str, object]) -> list[tuple]:
    """A look for each line: that of its name's first word once, or one of those that are left in turn."""
    unused = dict(ARMS)
    found = [unused.pop(name.split()[0], None) for name in lines]
    spare = iter([*OTHERS, *unused.values()] * len(found))
    return [look or next(spare) for look in found]

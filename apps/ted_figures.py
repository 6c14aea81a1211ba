"""The TED page's pictures, tables and sentences: figures that stay readable on a telephone."""

from __future__ import annotations

from math import sqrt

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from apps.ted_run import KINDS, START, TEACHER, WIDTHS, DigitsResult, QuestionResult, TrainingResult
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.ted import digits
from zq_lib.ted.digits import CLASSES, LAYERS, SIDES
from zq_lib.ted.figures import ARMS, TERMS

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
TESTED = digits.SIZES["quick"].test
CHANCE = 1 / CLASSES


def _percent(share: float) -> str:
    return f"{number(100 * share)}%"


def _state(dim: int) -> str:
    return f"width {dim}" if dim else "the state"


# --- two digits -------------------------------------------------------------------------------------------------------
def pair(result: DigitsResult) -> Figure:
    """The two digits as the teacher gets them, and what it is to say of them."""
    with style():
        fig, axes = subplots(width=WIDTH, height=2.5)
        axes.imshow(np.array(result.pixels), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.axvline(7.5, color=PALETTE["vermilion"], linewidth=2, linestyle=":")
        axes.set_xticks([3.5, 11.5], ["left: the task", "right: not asked for"])
        axes.set_yticks([])
        axes.set_title("The pair")
    if not result.labels:
        return Figure(fig, "A drawn pair of 8 by 16 pixels as the teacher gets it; the left half is the task's.")
    left, right = (result.labels[side] for side in SIDES)
    return Figure(
        fig, f"An image of 8 by 16 pixels: a {left} on the left, the task's, and a {right} on the right. The teacher "
        "has not seen either drawing."
    )  # fmt: skip


def said(result: DigitsResult, dim: int, layer: int) -> Figure:
    """Probabilities that readers of the state and of the filtered state give both digits."""
    parts = []
    with style():
        fig, panels = subplots(2, 2, width=WIDTH, height=3.4)
        for row, width in zip(panels, (0, dim), strict=True):
            for axes, side in zip(row, SIDES, strict=True):
                shares, true = result.shares(width, layer, side), result.labels.get(side)
                _digit_bars(axes, shares, true)
                axes.set_title(f"{_state(width).capitalize()}: {side}", fontsize=10)
                parts.append(_reading(width, side, shares, true))
        for axes in panels[:, 0]:
            axes.set_ylabel("probability", fontsize=10)
    hatched = " The true digit is hatched." if result.labels else ""
    return Figure(fig, f"Bars of what readers of layer {layer} say: {'; '.join(parts)}.{hatched}")


def _digit_bars(axes: Axes, shares: list[float], true: int | None) -> None:
    for digit, share in enumerate(shares):
        right = digit == true
        axes.bar(digit, share, 0.8, color=PALETTE["blue" if right else "grey"], edgecolor="white",
                 hatch="//" if right else "")  # fmt: skip
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 1])
    axes.set_xticks(range(CLASSES))
    axes.tick_params(labelsize=9)


def _reading(dim: int, side: str, shares: list[float], true: int | None) -> str:
    best = int(np.argmax(shares))
    wrong = "" if true in (None, best) else f", and the true {true} {_percent(shares[true])}"
    return f"{_state(dim)}, {side}: {best} with {_percent(shares[best])}{wrong}"


def kept(result: DigitsResult, dim: int, layer: int) -> Figure:
    """Layers x widths: how often a reader names either digit of a test pair; the chosen place is framed."""
    with style():
        fig, panels = subplots(1, 2, width=WIDTH, height=2.6)
        for axes, side in zip(panels, SIDES, strict=True):
            table = np.array([[result.accuracy(w, n, side) for w in WIDTHS] for n in range(1, LAYERS + 1)])
            axes.imshow(table, vmin=0, vmax=1, aspect="auto")
            for (y, x), share in np.ndenumerate(table):
                axes.annotate(f"{100 * share:.0f}", (x, y), ha="center", va="center", fontsize=10,
                              color="white" if share < 0.5 else "black")  # fmt: skip
            place = (WIDTHS.index(dim) - 0.46, layer - 1.46)
            axes.add_patch(Rectangle(place, 0.92, 0.92, fill=False, edgecolor=PALETTE["vermilion"], linewidth=2.5))
            axes.set_xticks(range(len(WIDTHS)), ["state", *map(str, WIDTHS[1:])])
            axes.tick_params(labelsize=9)
            axes.set_yticks(range(LAYERS), [f"layer {n}" for n in range(1, LAYERS + 1)] if side == "left" else [])
            axes.set_title(f"{side.capitalize()} digit, %", fontsize=11)
        fig.supxlabel("width of the filter d_f", fontsize=10)
    numbers = "; ".join(
        f"layer {n} " + ", ".join(f"{_state(w)} {_both(result, w, n)}" for w in (0, dim)) for n in range(1, LAYERS + 1)
    )
    return Figure(
        fig, f"Maps of layers by widths: how often a linear probe names the left and the right digit of {TESTED} test "
        f"pairs: {numbers} percent."
    )  # fmt: skip


def _both(result: DigitsResult, dim: int, layer: int) -> str:
    left, right = (number(100 * result.accuracy(dim, layer, side)) for side in SIDES)
    return f"{left} and {right}"


def widths(result: DigitsResult, layer: int) -> Figure:
    """What a probe reads of either digit behind one layer, from the state to the narrowest filter."""
    order = (0, *sorted(WIDTHS[1:], reverse=True))
    looks = {"left": ("blue", "-", "o"), "right": ("vermilion", "--", "s")}
    with style():
        fig, axes = subplots(width=WIDTH, height=2.8)
        for side, (colour, line, marker) in looks.items():
            values = [100 * result.accuracy(w, layer, side) for w in order]
            axes.plot(range(len(order)), values, linestyle=line, marker=marker, color=PALETTE[colour], label=side)
        axes.axhline(100 * CHANCE, color=PALETTE["black"], linewidth=1, linestyle=":")
        axes.annotate("chance", (0, 100 * CHANCE), xytext=(0, 3), textcoords="offset points", fontsize=10)
        axes.set_ylim(0, 105)
        axes.set_xticks(range(len(order)), ["state", *map(str, order[1:])])
        axes.set_xlabel("width of the filter d_f")
        axes.set_ylabel("probe, %")
        axes.set_title(f"Layer {layer}: what is kept")
        axes.legend(loc="center left", title="digit")
    numbers = "; ".join(f"{_state(w)} {_both(result, w, layer)}" for w in order)
    return Figure(
        fig, f"Two lines of a probe's accuracy against the filter's width behind layer {layer}, left and right digit, "
        f"in percent: {numbers}; chance is {number(100 * CHANCE)}."
    )  # fmt: skip


def digits_verdict(result: DigitsResult, dim: int, layer: int) -> str:
    """What the filter keeps, on all test pairs and on this one."""
    before, after = ({side: result.accuracy(w, layer, side) for side in SIDES} for w in (0, dim))
    lost = {side: before[side] - after[side] for side in SIDES}
    if max(lost.values()) < 0.05:
        what = "It drops neither digit"
    elif lost["left"] >= 0.05:
        what = "It also loses something of the digit that the task needs"
    elif lost["right"] < 0.2:
        what = "It begins to drop the digit that the task does not need"
    else:
        what = "It lets go of the digit that the task does not need"
    own = ""
    if (digit := result.labels.get("right")) is not None:
        shares = (_percent(result.shares(w, layer, "right")[digit]) for w in (0, dim))
        own = f" The {digit} on the right of this pair: {' before, '.join(shares)} after."
    return (
        f"Behind layer {layer} a filter of width {dim} takes a probe from {_percent(before['left'])} to "
        f"{_percent(after['left'])} on the left digit, and from {_percent(before['right'])} to "
        f"{_percent(after['right'])} on the right one. {what}.{own}"
    )


# --- a training -------------------------------------------------------------------------------------------------------
def terms(result: TrainingResult) -> Figure:
    """The stacked terms of the first arm's loss, as they enter it."""
    weights = {"task": 1.0, "kd": result.settings.kd_weight, "layer": result.settings.layer_weight}
    rows, base = result.terms, np.zeros(len(result.terms))
    ends = {}
    with style():
        fig, axes = subplots(width=WIDTH, height=3.0)
        for name, (colour, hatch, label) in TERMS.items():
            if not weights[name] or not rows:
                continue
            values = np.array([r[name] for r in rows])
            axes.fill_between([r["step"] for r in rows], base, base + values, facecolor=PALETTE[colour], hatch=hatch,
                              edgecolor="white", linewidth=0.5, label=f"{label} × {number(weights[name])}")  # fmt: skip
            base, ends[label] = base + values, (values[0], values[-1])
        axes.set_xlim(0, max(1, result.steps * result.epochs))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, stacked")
        axes.set_title(f"What {result.names[0]} learns from")
        if ends:
            fig.legend(loc="outside lower center", ncols=3, columnspacing=0.8, handlelength=1.2, fontsize=9)
    said = "; ".join(f"{label} {number(float(a))} to {number(float(b))}" for label, (a, b) in ends.items())
    return Figure(
        fig, f"Stacked areas of the weighted terms of the loss of {result.names[0]}, first to last step: "
        f"{said or 'no step yet'}."
    )  # fmt: skip


def curves(result: TrainingResult) -> Figure:
    """Accuracy of the students as their epochs end, between the start and the teacher."""
    with style():
        fig, axes = subplots(width=WIDTH, height=3.0)
        for name, values in result.curves.items():
            colour, line, marker = ARMS[name.split()[0]]
            axes.plot(range(len(values)), [100 * v for v in values], linestyle=line, marker=marker, ms=4,
                      color=PALETTE[colour], label=name)  # fmt: skip
        for name, value in result.levels.items():
            axes.axhline(100 * value, color=PALETTE["black"], linewidth=1, linestyle=":")
            axes.annotate(name, (0, 100 * value), xytext=(0, 3), textcoords="offset points", fontsize=10)
        axes.set_ylim(0, 105)
        axes.set_xlim(-0.2, max(1, result.epochs) + 0.2)
        axes.set_xlabel("passes over the pairs")
        axes.set_ylabel("right test pairs, %")
        axes.set_title("The gap to the teacher")
        if result.curves:
            fig.legend(loc="outside lower center", ncols=4, columnspacing=0.8, handlelength=1.6, fontsize=9)
    said = "; ".join(f"{name} {number(100 * v[-1])} after {len(v) - 1}" for name, v in result.curves.items())
    levels = ", ".join(f"{name} {number(100 * v)}" for name, v in result.levels.items())
    return Figure(
        fig, f"Rising lines of the accuracy on test pairs in percent over passes: {said or 'none yet'}. Dotted levels: "
        f"{levels or 'none yet'}."
    )  # fmt: skip


def outcome(result: TrainingResult) -> Figure:
    """Accuracy of all students at the end, with start and teacher, and the error bar of one figure."""
    values = {**{n: result.levels[n] for n in (TEACHER,) if n in result.levels},
              **{r["arm"]: r["accuracy"] for r in result.rows},
              **{n: result.levels[n] for n in (START,) if n in result.levels}}  # fmt: skip
    at = np.arange(len(values))[::-1]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.8)
        for y, (name, value) in zip(at, values.items(), strict=True):
            colour = "grey" if name in (TEACHER, START) else ARMS[name.split()[0]][0]
            hatch = "//" if name in (TEACHER, START) else ""
            axes.barh(y, 100 * value, 0.6, color=PALETTE[colour], hatch=hatch, edgecolor="white")
            error = 196 * _error(value)
            axes.plot([100 * value - error, 100 * value + error], [y, y], "-", color=PALETTE["black"],
                      linewidth=1.5)  # fmt: skip
            axes.annotate(f" {number(100 * value)}", (100 * value + error, y), va="center", fontsize=10)
        axes.set_yticks(at, list(values))
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("right test pairs, %; lines: 95%")
        axes.set_title("At the end")
    said = "; ".join(f"{name} {number(100 * v)}" for name, v in values.items()) or "none yet"
    return Figure(fig, f"Bars of the accuracy on {TESTED} test pairs in percent, with 95% intervals: {said}.")


def _error(share: float) -> float:
    """Standard error of an accuracy on the test pairs."""
    return sqrt(share * (1 - share) / TESTED)


def outcome_rows(result: TrainingResult) -> list[tuple[object, ...]]:
    """All in numbers: right answers, and the share of the gap between start and teacher that is closed."""
    if not result.levels:
        return []
    top, low = result.levels[TEACHER], result.levels[START]
    gap = max(top - low, 1e-9)
    rows = [(r["arm"], 100 * r["accuracy"], 100 * (r["accuracy"] - low) / gap) for r in result.rows]
    return [(TEACHER, 100 * top, 100.0), *rows, (START, 100 * low, 0.0)]


def training_verdict(result: TrainingResult) -> str:
    """Who is best from this start, and whether that is more than noise."""
    own, rest = result.rows[0], result.rows[1:]
    top, low = result.levels[TEACHER], result.levels[START]
    closed = (own["accuracy"] - low) / max(top - low, 1e-9)
    said = []
    for other in rest:
        gap = own["accuracy"] - other["accuracy"]
        noise = 1.96 * sqrt(_error(own["accuracy"]) ** 2 + _error(other["accuracy"]) ** 2)
        how = "no clear difference to" if abs(gap) < noise else "better than" if gap > 0 else "worse than"
        said.append(f"{how} {other['arm']} ({100 * gap:+.1f} points)")
    versus = f": {', '.join(said)}" if said else ""
    return (
        f"{own['arm']} closes {_percent(closed)} of the gap between its start ({_percent(low)}) and the teacher "
        f"({_percent(top)}), up to {_percent(own['accuracy'])}{versus}. One seed, {TESTED} pairs: "
        "another seed can turn the order round."
    )


# --- sentences --------------------------------------------------------------------------------------------------------
def answers(result: QuestionResult) -> Figure:
    """Models x kinds of answer: the probabilities."""
    return _map(
        [(name, result.table("model", name)) for name in result.models], "Teacher, start and students",
        "Map of models by kinds of answer, probabilities in percent; the likeliest of each: ",
    )  # fmt: skip


def layers(result: QuestionResult) -> Figure:
    """The teacher's layers x kinds of answer: what the heads behind the filters say."""
    numbers = sorted({r["layer"] for r in result.layers})
    return _map(
        [(f"layer {n}", result.table("layer", n)) for n in numbers], "Where does the teacher know it?",
        "Map of the teacher's layers by kinds of answer, what the heads behind their filters say in percent; the "
        "likeliest of each: ",
    )  # fmt: skip


def _map(rows: list[tuple[str, dict[str, float]]], title: str, says: str) -> Figure:
    table = np.array([list(shares.values()) for _, shares in rows])
    with style():
        fig, axes = subplots(width=WIDTH, height=3.0)
        axes.imshow(table, vmin=0, vmax=1, aspect="auto")
        for (y, x), share in np.ndenumerate(table):
            best = share == table[y].max()
            axes.annotate(f"{100 * share:.0f}", (x, y), ha="center", va="center", fontsize=10,
                          weight="bold" if best else "normal", color="white" if share < 0.5 else "black")  # fmt: skip
        axes.set_xticks(range(len(KINDS)), list(KINDS.values()), fontsize=9, rotation=25, ha="right")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_title(title)
    best = "; ".join(f"{name} {max(s, key=s.__getitem__)} {_percent(max(s.values()))}" for name, s in rows)
    return Figure(fig, f"{says}{best}.")


def answer_rows(result: QuestionResult) -> list[tuple[str, str, float, float]]:
    """Each model's answer, its probability, and how often the model is right."""
    found = []
    for name in result.models:
        kind = result.best("model", name)
        found.append((name, kind, 100 * result.table("model", name)[kind], 100 * result.accuracy[name]))
    return found


def sentences_verdict(result: QuestionResult) -> str:
    """Who answers as the teacher does, how early it knows, and what the models' test says."""
    wanted = result.best("model", TEACHER)
    agree = [n for n in result.models if n != TEACHER and result.best("model", n) == wanted]
    differ = [n for n in result.models if n != TEACHER and n not in agree]
    early = next(iter(sorted(r["layer"] for r in result.layers if _settled(result, r["layer"], wanted))), None)
    best = max(result.models[1:], key=lambda n: result.accuracy[n])
    noise = 196 * sqrt(result.accuracy[best] * (1 - result.accuracy[best]) / result.tested)
    return (
        f"The teacher takes the answer for a {wanted} ({_percent(result.table('model', TEACHER)[wanted])}). So do: "
        f"{', '.join(agree) or 'none'}; not: {', '.join(differ) or 'none'}. "
        + (f"Its heads say so from layer {early} on. " if early else "None of its heads settles on that. ")
        + f"On {result.tested} test questions the best student, {best}, is right in {_percent(result.accuracy[best])}, "
        f"sure to ± {number(noise)} points: smaller differences between students are noise."
    )


def _settled(result: QuestionResult, layer: int, kind: str) -> bool:
    """Whether this layer's head and all later ones prefer this kind."""
    numbers = {r["layer"] for r in result.layers}
    return all(result.best("layer", n) == kind for n in numbers if n >= layer)

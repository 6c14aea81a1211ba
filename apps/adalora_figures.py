"""The AdaLoRA page's pictures and tables: from a result to figures that stay readable on a telephone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import sqrt

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, NullFormatter

from apps.adalora_run import Result
from apps.adalora_settings import KINDS, Settings
from zq_lib.adalora.lab import ADALORA, CUT, UNIFORM, WIDE
from zq_lib.core.blocks import grid
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
CLOSE = 0.1  # errors of planted needs that differ by less are called alike: one run cannot tell
HEAD = "text-align: center; padding: .1rem !important; font-size: .8rem"
CELL = (
    "border-radius: 4px; padding: .25rem .1rem !important; text-align: center !important; line-height: 1.15; "
    "overflow-wrap: normal"
)
SHORT = {module: name for name, module in KINDS.items()}


def theatre(result: Result, event: int | None = None) -> str:
    """The map of layers x matrices as a table: each cell is a rank, as number and colour; planted ones are framed."""
    ranks, s = result.ranks(event), result.settings
    event = result.events if event is None else min(event, result.events)
    blocks, kinds, places = grid(list(ranks))
    cells = [["<td></td>"] * len(kinds) for _ in blocks]
    for name, rank in ranks.items():
        row, column = places[name]
        red, green, blue, _ = colour = colormaps["cividis"](rank / s.init_rank)
        ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#fff"
        hidden = s.planted.get(name)
        frame = f"outline: 3px solid {PALETTE['vermilion']}; outline-offset: -3px;" if hidden else ""
        under = f'<br><small style="color: {ink}; font-size: .7rem">need {hidden}</small>' if hidden else ""
        cells[row][column] = (
            f'<td style="{CELL}; background: {to_hex(colour)}; color: {ink} !important; {frame}">'
            f'<strong style="color: {ink}">{rank}</strong>{under}</td>'
        )
    head = "".join(f'<th scope="col" style="{HEAD}">{SHORT[k]}</th>' for k in kinds)
    body = "".join(
        f'<tr><th scope="row">layer {block}</th>{"".join(row)}</tr>' for block, row in zip(blocks, cells, strict=True)
    )
    return (
        '<div class="zq-table"><table style="border-collapse: separate !important; border-spacing: 2px; '
        f'table-layout: fixed"><caption>{escape(state(result, event))}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def state(result: Result, event: int) -> str:
    """What the map shows, as a sentence."""
    ranks, s = result.ranks(event), result.settings
    total = sum(ranks.values())
    if not event:
        said = f"Before the first cut: every matrix has {s.init_rank} ranks, {total} together."
    else:
        said = f"After step {result.step(event)}: {total} ranks are left of {s.init_rank * len(ranks)}."
    if s.is_planted:
        hit = sum(ranks[n] for n in s.planted)
        said += f" {hit} of them are on the {len(s.planted)} framed matrices, where needs are hidden."
    return said


def budget(result: Result, event: int) -> Figure:
    """b(t), and where the map is on it."""
    schedule = result.settings.plan.schedule
    steps = np.arange(schedule.total)
    curve = [schedule.budget(int(t)) for t in steps]
    at, trace = result.step(event), result.trace
    left = sum(result.ranks(event).values())
    with style():
        fig, axes = subplots(width=WIDTH, height=2.5)
        axes.plot(steps, curve, "--", color=PALETTE["grey"])
        axes.plot(trace.steps[: result.events], trace.budgets[: result.events], linestyle="", marker="o", ms=4,
                  color=PALETTE["blue"])  # fmt: skip
        axes.plot([at], [left], linestyle="", marker="s", ms=9, color=PALETTE["vermilion"])
        for when in (schedule.warmup, schedule.last):
            axes.axvline(when, color=PALETTE["grey"], linewidth=1, linestyle=":")
        axes.set_ylim(0, schedule.start * 1.08)
        axes.set_xlabel("step")
        axes.set_ylabel("ranks in all")
        axes.set_title(f"Budget: {left} ranks at step {at}")
    return Figure(
        fig,
        f"Dashed line of the budget b(t): {schedule.start} ranks until step {schedule.warmup}, {schedule.target} from "
        f"step {schedule.last} on (dotted lines); dots are the {result.events} allocations so far, the square is the "
        f"one that the map shows: {left} ranks at step {at}.",
    )


def losses(result: Result) -> Figure:
    """Task loss and penalty, which are kept apart."""
    s, steps = result.settings, np.arange(len(result.losses))
    with style():
        fig, axes = subplots(width=WIDTH, height=2.5)
        axes.plot(steps, result.losses, color=PALETTE["blue"], label="task loss")
        if s.penalty:
            axes.plot(steps, result.penalties, "--", color=PALETTE["orange"], label="penalty × weight")
        if len(steps):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, s.steps)
        axes.set_xlabel("step")
        fig.legend(loc="outside lower center", ncols=2, columnspacing=1)
        axes.set_title("AdaLoRA's training (log)")
    if not len(steps):
        return Figure(fig, "Lines of the task loss and the penalty; no step was made yet.")
    other = f" The orthogonality penalty, times its weight, is {number(result.penalties[-1])}." if s.penalty else ""
    return Figure(
        fig,
        f"Line of the task loss over {len(steps)} of {s.steps} steps, from {number(result.losses[0])} to "
        f"{number(result.losses[-1])}.{other or ' There is no penalty.'}",
    )


def values(result: Result, matrix: str, event: int) -> Figure:
    """The values l of one matrix' triplets, just before every allocation."""
    table, keep, steps = _triplets(result, matrix, "values")
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        _lines(axes, table, keep, steps)
        axes.axhline(0, color=PALETTE["grey"], linewidth=1)
        _here(axes, result, event)
        axes.set_xlabel("step")
        axes.set_ylabel("λ")
        axes.set_title(f"{short(matrix)}: λ of its triplets")
    if not len(steps):
        return Figure(fig, f"Lines of the values λ of {short(matrix)}; ranks were not shared out yet.")
    largest = float(np.abs(table[-1]).max())
    return Figure(
        fig,
        f"Lines of λ of the {table.shape[1]} triplets of {short(matrix)} before each of {len(steps)} allocations. "
        f"{_kept(keep)} The largest λ at the end is {number(largest)} in size.",
    )


def scores(result: Result, matrix: str, event: int) -> Figure:
    """The scores S of one matrix' triplets, and the smallest one kept anywhere."""
    table, keep, steps = _triplets(result, matrix, "scores")
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        _lines(axes, np.where(table > 0, table, np.nan), keep, steps)
        limit = result.trace.thresholds[: len(steps)]
        axes.plot(steps, limit, "--", color=PALETTE["black"], linewidth=1.5)
        if len(steps):
            axes.set_yscale("log")
            axes.annotate("threshold", (steps[-1], limit[-1]), xytext=(0, 5), textcoords="offset points", ha="right",
                          fontsize=10)  # fmt: skip
        _here(axes, result, event)
        axes.set_xlabel("step")
        axes.set_ylabel("score S (log)")
        axes.set_title(f"{short(matrix)}: their scores")
    if not len(steps):
        return Figure(fig, f"Lines of the scores of {short(matrix)}; ranks were not shared out yet.")
    above = int((table[-1] >= limit[-1]).sum())
    return Figure(
        fig,
        f"Lines of the score S of the {table.shape[1]} triplets of {short(matrix)}; dashed, the smallest score kept "
        f"anywhere, at last {number(limit[-1])}: {above} triplets reach it.",
    )


def _triplets(result: Result, matrix: str, kind: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One matrix over the allocations: numbers [events, R], whether kept, and the steps."""
    at, n, found = result.trace.names.index(matrix), result.events, getattr(result.trace, kind)
    shape = (n, result.settings.init_rank)
    table, keep = (np.array([event[at] for event in of[:n]]).reshape(shape) for of in (found, result.trace.keep))
    return table, keep, result.trace.steps[:n]


def _lines(axes: object, table: np.ndarray, keep: np.ndarray, steps: Sequence[int]) -> None:
    """A line per triplet: those kept at the end in blue, the others grey; a cross where a triplet is cut."""
    for i in range(table.shape[1] if len(steps) else 0):
        stays = keep[-1, i]
        axes.plot(steps, table[:, i], color=PALETTE["blue" if stays else "grey"], linewidth=1.8 if stays else 1,
                  linestyle="-" if stays else ":")  # fmt: skip
        cut = [j for j in range(len(steps)) if not keep[j, i]]
        axes.plot([steps[j] for j in cut], table[cut, i], linestyle="", marker="x", ms=5, color=PALETTE["vermilion"])


def _here(axes: object, result: Result, event: int) -> None:
    if event and result.events:
        axes.axvline(result.step(event), color=PALETTE["vermilion"], linewidth=1, linestyle=":")


def _kept(keep: np.ndarray) -> str:
    back = int((~keep[:-1] & keep[1:]).sum())
    said = f"{int(keep[-1].sum())} are kept at the end (solid); a cross is a cut."
    return said + (f" After a cut, {back} came back." if back else "")


def short(matrix: str) -> str:
    """A matrix as the page names it.

    >>> short("encoder.layer.1.intermediate.dense")
    'layer 1 FFN in'
    """
    layer, _, kind = matrix.partition("layer.")[2].partition(".")
    return f"layer {layer} {SHORT[kind]}"


def bars(result: Result) -> Figure:
    """Errors of AdaLoRA and its rivals; the one with more ranks is hatched."""
    rows = [r for m in (ADALORA, UNIFORM, CUT, WIDE) if (r := result.row(m))]
    looks = {ADALORA: ("blue", ""), WIDE: ("sky", "//")}
    errors = [r["error"] for r in rows]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.7)
        at = np.arange(len(rows))[::-1]
        for y, row in zip(at, rows, strict=True):
            colour, hatch = looks.get(row["method"], ("grey", ""))
            axes.barh(y, row["error"], 0.6, color=PALETTE[colour], hatch=hatch, edgecolor="white")
            axes.annotate(f" {number(row['error'])}", (row["error"], y), va="center", fontsize=10)
        axes.set_yticks(at, [f"{r['method']}\n{r['ranks']} ranks" for r in rows])
        axes.margins(x=0.2)
        axes.set_xlabel(error_name(result.settings))
        axes.set_title("Less is better")
    said = "; ".join(f"{r['method']} ({r['ranks']} ranks) {number(e)}" for r, e in zip(rows, errors, strict=True))
    return Figure(
        fig, f"Bars of the {error_name(result.settings)}: {said}. Before training it is {number(rows[0]['start'])}."
    )


def error_name(settings: Settings) -> str:
    """What an error is."""
    return "error on new texts" if settings.is_planted else "share of wrong answers"


def table(result: Result) -> list[tuple[object, ...]]:
    """AdaLoRA and its rivals in numbers."""
    rows = [r for m in (ADALORA, UNIFORM, CUT, WIDE) if (r := result.row(m))]
    return [
        (r["method"], r["ranks"], r["parameters"], r["error"],
         f"{r['on_planted']:.0%}" if result.settings.is_planted else _deviation(result.settings, r))
        for r in rows
    ]  # fmt: skip


def table_head(settings: Settings) -> tuple[str, ...]:
    """What the table's columns are."""
    return ("method", "ranks", "numbers", "error", "on needs" if settings.is_planted else "± standard error")


def _deviation(settings: Settings, row: Row) -> float:
    """Standard error of a share of wrong answers."""
    return sqrt(row["error"] * (1 - row["error"]) / settings.size.test)


def verdict(result: Result) -> str:
    """Who wins at the same final budget, said only where the difference is more than noise."""
    ours, uniform, cut = (result.row(m) for m in (ADALORA, UNIFORM, CUT))
    said = [_against(result.settings, ours, other) for other in (uniform, cut)]
    return f"Same final budget, {ours['ranks']} ranks. Against {UNIFORM}: {said[0]} Against {CUT}: {said[1]} One seed."


def _against(settings: Settings, ours: Row, other: Row) -> str:
    one, two = ours["error"], other["error"]
    if settings.is_planted:
        alike, low = abs(one - two) <= CLOSE * max(one, two), min(one, two)
        how = f"{number(max(one, two) / max(low, 1e-12))} times the error"
    else:
        spread = 2 * sqrt(_deviation(settings, ours) ** 2 + _deviation(settings, other) ** 2)
        alike, how = abs(one - two) <= spread, f"{abs(one - two):.1%} more wrong answers"
    if alike:
        return f"no clear difference ({number(one)} and {number(two)})."
    return f"AdaLoRA {'wins' if one < two else 'loses'} ({'the other' if one < two else 'it'} has {how})."


def found(result: Result) -> list[tuple[str, int | None, int]]:
    """Hidden and found ranks: of the matrices with a need, or of those that got most, and of all others together."""
    ranks, hidden = result.ranks(), result.settings.planted
    named = list(hidden) or sorted(ranks, key=lambda n: -ranks[n])[:6]
    rows = [(short(n), hidden.get(n), ranks[n]) for n in named]
    rest = len(ranks) - len(named)
    return [*rows, (f"the {rest} others", None, sum(ranks.values()) - sum(r[2] for r in rows))] if rest else rows


def precision(result: Result) -> str:
    """How well the hidden needs were found; nothing is known of real text."""
    ranks, hidden = result.ranks(), result.settings.planted
    total = sum(ranks.values())
    if not hidden:
        three = sorted(ranks, key=lambda n: -ranks[n])[:3]
        said = ", ".join(f"{short(n)} {ranks[n]}" for n in three)
        return f"Nobody knows where real text needs rank. Here most went to {said}."
    met = sum(min(rank, hidden.get(n, 0)) for n, rank in ranks.items())
    return (
        f"Precision: {met} of {total} ranks ({met / total:.0%}) answer a hidden need; equal ranks everywhere would "
        f"give {_equal(result):.0%}. Needs met: {met} of {sum(hidden.values())}."
    )


def _equal(result: Result) -> float:
    """The precision of equal ranks everywhere."""
    s = result.settings
    return sum(min(s.target_rank, need) for need in s.planted.values()) / (s.target_rank * len(result.ranks()))


def plan_sentence(settings: Settings) -> str:
    """What a setting would do, before it is run."""
    made = settings.plan
    times = len(made.schedule.allocation_steps())
    low, high = (f"{round(n / 1000)}" for n in made.parameters)
    odd = "".join(f" Note: {w}." for w in made.warnings)
    return (
        f"{made.schedule.start} ranks shrink to {made.schedule.target} in {times} "
        f"allocation{'s' if times != 1 else ''}; {round(made.parameters_at_start / 1000)} thousand parameters become "
        f"{low} to {high} thousand.{odd}"
    )

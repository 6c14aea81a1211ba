"""AdaLoRA's pictures: pure functions from numbers to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from zq_lib.adalora.schedule import Schedule
from zq_lib.adalora.trace import RankTrace
from zq_lib.core.blocks import grid, short
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row


def budget_curve(schedule: Schedule) -> Figure:
    """b(t) with its three phases, and the formula that the paper's appendix prints, which is wrong."""
    steps = np.arange(schedule.total)
    ours = [schedule.budget(int(t)) for t in steps]
    phase = (steps > schedule.warmup) & (steps <= schedule.total - schedule.final)
    span = schedule.total - schedule.final - schedule.warmup
    left = 1 - (steps[phase] - schedule.warmup - schedule.final) / span
    printed = schedule.target + (schedule.start - schedule.target) * left**3
    with style():
        fig, axes = subplots(width=7.0, height=3.6)
        axes.plot(steps, ours, color=PALETTE["blue"], linestyle="-")
        axes.plot(steps[phase], printed, color=PALETTE["vermilion"], linestyle="--")
        axes.annotate("as printed in the appendix", (steps[phase][0], printed[0]), xytext=(8, 0),
                      textcoords="offset points", color=PALETTE["vermilion"], va="center")  # fmt: skip
        for at, name in ((0, "warm-up"), (schedule.warmup, "budget phase"), (schedule.last, "final phase")):
            axes.axvline(at, color=PALETTE["grey"], linewidth=1, linestyle=":")
            axes.annotate(name, (at, 0), xytext=(4, 6), textcoords="offset points", color=PALETTE["grey"])
        axes.set_ylim(0, max(schedule.start, float(printed.max())) * 1.05)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("ranks of all matrices together")
        axes.set_title(f"The budget falls from {schedule.start} to {schedule.target} by a cubic")
    return Figure(
        fig,
        f"Line of the budget over {schedule.total} steps: {schedule.start} until step {schedule.warmup}, then a cubic "
        f"down to {schedule.target} at step {schedule.last}; the formula printed in the appendix would start at "
        f"{number(float(printed[0]))}.",
    )


def rank_map(ranks: Mapping[str, int], most: int, planted: Sequence[str] = (), title: str = "") -> Figure:
    """Blocks x matrices, the rank as colour and number; planted matrices are framed."""
    blocks, kinds, _ = grid(list(ranks))
    with style():
        fig, axes = subplots(width=_map_width(kinds), height=0.5 * len(blocks) + 2.2)
        _draw_map(axes, ranks, most, planted)
        axes.set_title(title or f"{sum(ranks.values())} ranks over {len(ranks)} matrices")
    return Figure(fig, _describe_map(ranks, planted))


def rank_frame(trace: RankTrace, event: int, planted: Sequence[str] = ()) -> Figure:
    """One frame of the animation: the map after an allocation, by index, above the budget so far."""
    ranks = dict(zip(trace.names, (int(r) for r in trace.ranks()[event]), strict=True))
    blocks, kinds, _ = grid(list(ranks))
    step, budget = trace.steps[event], trace.budgets[event]
    with style():
        fig, (above, below) = subplots(2, 1, width=_map_width(kinds), height=0.5 * len(blocks) + 4.2)
        _draw_map(above, ranks, trace.keep[0].shape[1], planted)
        above.set_title(f"Step {step}: {budget} ranks are left")
        below.plot(trace.steps, trace.budgets, color=PALETTE["grey"], linestyle="--")
        below.plot(trace.steps[: event + 1], trace.budgets[: event + 1], color=PALETTE["blue"], marker="o")
        below.set_ylim(bottom=0)
        below.set_xlabel("optimiser step")
        below.set_ylabel("budget b(t)")
    return Figure(
        fig,
        f"{_describe_map(ranks, planted)} Below, the budget: allocation {event + 1} of {len(trace)}, at step {step}, "
        f"leaves {budget} ranks.",
    )


def _map_width(kinds: Sequence[str]) -> float:
    return max(5.0, 1.1 * len(kinds) + 1.5)


def _draw_map(axes: Axes, ranks: Mapping[str, int], most: int, planted: Sequence[str]) -> None:
    blocks, kinds, places = grid(list(ranks))
    table = np.full((len(blocks), len(kinds)), np.nan)
    for name, rank in ranks.items():
        table[places[name]] = rank
    axes.imshow(table, vmin=0, vmax=most, aspect="auto")
    for name, rank in ranks.items():
        y, x = places[name]
        axes.annotate(str(rank), (x, y), ha="center", va="center", color="white" if rank < most * 0.6 else "black")
        if name in planted:
            frame = Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=PALETTE["vermilion"], lw=2.5)
            axes.add_patch(frame)
    axes.set_xticks(range(len(kinds)), [short(k) for k in kinds], rotation=25, ha="right")
    axes.set_yticks(range(len(blocks)), [str(b) for b in blocks])
    axes.set_ylabel("block")


def _describe_map(ranks: Mapping[str, int], planted: Sequence[str]) -> str:
    blocks, kinds, _ = grid(list(ranks))
    first = sorted(ranks.items(), key=lambda item: -item[1])[:3]
    said = ", ".join(f"{short(n)} {r}" for n, r in first)
    hit = sum(ranks[n] for n in planted)
    frames = f" The {len(planted)} framed matrices, where a need was planted, hold {hit} of them." if planted else ""
    return (
        f"Map of {len(blocks)} blocks by {len(kinds)} matrices, {sum(ranks.values())} ranks in all; most have {said}."
        f"{frames}"
    )


def rank_history(trace: RankTrace, planted: Sequence[str] = ()) -> Figure:
    """Rank of every matrix over the allocations, the planted ones in colour."""
    ranks = trace.ranks()
    with style():
        fig, axes = subplots(width=7.0, height=3.8)
        for i, name in enumerate(trace.names):
            hit = name in planted
            colour, width = (PALETTE["blue"], 2.5) if hit else (PALETTE["grey"], 1.0)
            axes.plot(trace.steps, ranks[:, i], color=colour, linewidth=width, linestyle="-" if hit else ":")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("rank")
        ends = [int(ranks[-1, trace.names.index(n)]) for n in planted]
        total = int(ranks[-1].sum())
        axes.set_title(
            f"The planted matrices (solid) end with {sum(ends)} of {total} ranks" if planted else f"{total} ranks stay"
        )
    said = f" The {len(ends)} planted ones end at {', '.join(map(str, ends))}." if planted else ""
    return Figure(fig, f"Lines of rank over {len(trace)} allocations for {len(trace.names)} matrices.{said}")


def smoothing(raw: Sequence[float], smooth: Sequence[float], uncertain: Sequence[float]) -> Figure:
    """One entry's sensitivity over steps: raw, smoothed, and how far they are apart."""
    with style():
        fig, axes = subplots(width=7.0, height=3.4)
        steps = np.arange(len(raw))
        for values, name, colour, line in (
            (raw, "raw I", "grey", ":"),
            (smooth, "smoothed I", "blue", "-"),
            (uncertain, "uncertainty U", "orange", "--"),
        ):
            axes.plot(steps, values, color=PALETTE[colour], linestyle=line, label=name)
        axes.legend()
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("importance of one entry")
        ratio = float(np.std(raw[len(raw) // 2 :]) / max(float(np.std(smooth[len(raw) // 2 :])), 1e-12))
        axes.set_title(f"Smoothing makes the signal {number(ratio)} times steadier")
    return Figure(
        fig,
        f"Three lines over {len(raw)} steps for one entry: raw sensitivity, its moving average, whose spread is "
        f"{number(ratio)} times smaller, and the uncertainty.",
    )


def comparison(rows: Sequence[Row], label: str = "error", low: float | None = None) -> Figure:
    """Bars of error per method, with intervals where rows have `low` and `high`."""
    names = [f"{r['method']} ({r['ranks']} ranks)" for r in rows]
    values = [float(r["error"]) for r in rows]
    best = min(range(len(rows)), key=values.__getitem__)
    with style():
        fig, axes = subplots(width=7.5, height=0.5 * len(rows) + 1.3)
        at = np.arange(len(rows))[::-1]
        spread = None
        if "low" in rows[0]:
            spread = [[v - r["low"] for v, r in zip(values, rows, strict=True)],
                      [r["high"] - v for v, r in zip(values, rows, strict=True)]]  # fmt: skip
        colours = [PALETTE["blue"] if r["method"] == "AdaLoRA" else PALETTE["grey"] for r in rows]
        axes.barh(at, values, 0.6, color=colours, xerr=spread, capsize=3)
        axes.set_yticks(at, names)
        tips = [r.get("high", v) for r, v in zip(rows, values, strict=True)]
        for y, v, tip in zip(at, values, tips, strict=True):
            axes.annotate(f" {number(v)}", (tip, y), va="center")
        axes.margins(x=0.15)
        if low is not None:
            axes.set_xlim(left=low)
        axes.set_xlabel(label)
        axes.set_title(f"{rows[best]['method']} has the smallest {label}")
    said = "; ".join(f"{n} {number(v)}" for n, v in zip(names, values, strict=True))
    return Figure(fig, f"Bars of {label} per method: {said}.")


def regrowth(trace: RankTrace) -> Figure:
    """How many dropped triplets were not zero any more when the next allocation came."""
    with style():
        fig, axes = subplots(width=7.0, height=3.2)
        axes.plot(trace.steps, trace.budgets, color=PALETTE["blue"], linestyle="-", label="kept")
        nonzero = np.array([(value != 0).sum() for value in trace.values])
        axes.plot(trace.steps, nonzero, color=PALETTE["orange"], linestyle="--", label="not zero before the cut")
        axes.legend()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("triplets")
        axes.set_title(f"{trace.revived()} times a dropped triplet came back")
    return Figure(
        fig,
        f"Two lines over {len(trace)} allocations: triplets kept, from {trace.budgets[0]} to {trace.budgets[-1]}, "
        f"and values not zero just before, {nonzero[-1]} at the end; {trace.revived()} times a dropped one came back.",
    )

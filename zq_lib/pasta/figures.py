"""PASTA's pictures: pure functions from numbers to a figure with its description."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row


def reweighting(words: Sequence[str], before: Tensor, after: Tensor, marked: Tensor) -> Figure:
    """One attention row before and after steering, bars per token. All [S]."""
    share = [float((row * marked).sum()) for row in (before, after)]
    with style():
        fig, axes = subplots(width=8.0, height=3.2)
        at = np.arange(len(words))
        axes.bar(at - 0.2, before.tolist(), 0.4, color=PALETTE["grey"], label="before")
        axes.bar(at + 0.2, after.tolist(), 0.4, color=PALETTE["blue"], hatch="//", edgecolor="white", label="after")
        axes.set_xticks(at, [f"*{w}*" if m else w for w, m in zip(words, marked, strict=True)], rotation=35, ha="right")
        axes.set_ylabel("attention probability")
        axes.set_title(f"The marked words go from {share[0]:.0%} to {share[1]:.0%} of the row")
        axes.legend()
    return Figure(
        fig,
        f"Bars of attention probability per token, before and after steering: the marked tokens' share rises from "
        f"{number(share[0])} to {number(share[1])}, and the proportions among them stay.",
    )


def log_odds(before: Tensor, after: Tensor, alpha: float) -> Figure:
    """Share of the marked tokens per head, before against after, in log-odds. [N] each."""
    x, y = (t.double().flatten().logit() for t in (before, after))
    shift = float((y - x).mean())
    with style():
        fig, axes = subplots(width=5.5, height=4.2)
        ends = torch.tensor([float(x.min()), float(x.max())])
        axes.plot(ends, ends, color=PALETTE["grey"], linestyle="--", linewidth=1.5)
        axes.annotate("unsteered", (float(ends[1]), float(ends[1])), ha="right", va="top", color=PALETTE["grey"])
        axes.plot(x, y, linestyle="", marker="o", markersize=5, color=PALETTE["blue"])
        axes.set_xlabel("log-odds of the marked share before")
        axes.set_ylabel("after")
        axes.set_title(f"Steering adds {number(shift)} to the log-odds of every head")
    return Figure(
        fig,
        f"Scatter of {len(x)} heads, log-odds of the marked tokens' share before and after steering: all lie on a "
        f"line of slope one, {number(shift)} above the diagonal, which is minus the logarithm of alpha {alpha:g}.",
    )


def conditions(
    rows: Sequence[Row], title: str, value: str = "es", label: str = "share of items that prefer the new fact"
) -> Figure:
    """Horizontal bars of one value per condition, with intervals where the rows have them."""
    names = [r["condition"] for r in rows]
    values = [float(r[value]) for r in rows]
    with style():
        fig, axes = subplots(width=7.5, height=0.42 * len(rows) + 1.3)
        at = np.arange(len(rows))[::-1]
        ours = [("top" in n or "PASTA" in n) and "random" not in n for n in names]
        colours = [PALETTE["blue"] if mine else PALETTE["grey"] for mine in ours]
        low, high = f"{value}_low", f"{value}_high"
        if f"{value}_se" in rows[0]:
            axes.barh(at, values, 0.65, color=colours, xerr=[1.96 * r[f"{value}_se"] for r in rows], capsize=3)
        elif low in rows[0]:
            spread = [
                [v - r[low] for v, r in zip(values, rows, strict=True)],
                [r[high] - v for v, r in zip(values, rows, strict=True)],
            ]
            axes.barh(at, values, 0.65, color=colours, xerr=spread, ecolor=PALETTE["black"], capsize=3)
        else:
            axes.barh(at, values, 0.65, color=colours)
        axes.set_yticks(at, names)
        tips = [
            1.96 * r[f"{value}_se"] if f"{value}_se" in r else r.get(high, v) - v
            for v, r in zip(values, rows, strict=True)
        ]
        for y, v, tip in zip(at, values, tips, strict=True):
            axes.annotate(f"{v:.2f}", (v + tip, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
        axes.set_xlim(0, 1.12)
        axes.set_xlabel(label)
        axes.set_title(title)
    said = "; ".join(f"{n} {number(v)}" for n, v in zip(names, values, strict=True))
    return Figure(fig, f"Bars, {label}, per condition: {said}.")


def alpha_curve(rows: Sequence[Row]) -> Figure:
    """Efficacy and probability against alpha, per task, on a log axis."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    ends = []
    with style():
        fig, axes = subplots(width=6.5, height=3.8)
        for task, colour, line in zip(tasks, (PALETTE["blue"], PALETTE["orange"]), ("-", "--"), strict=False):
            mine = [r for r in rows if r["task"] == task]
            axes.plot([r["alpha"] for r in mine], [r["p"] for r in mine], line, color=colour, marker="o")
            axes.annotate(
                task,
                (mine[-1]["alpha"], mine[-1]["p"]),
                xytext=(4, 6),
                textcoords="offset points",
                color=colour,
                ha="right",
            )
            ends.append(f"{task} from {number(mine[0]['p'])} to {number(mine[-1]['p'])}")
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_ylim(0, 1)
        axes.set_xlabel("alpha (smaller is stronger)")
        axes.set_ylabel("probability of the marked answer")
        axes.set_title("Most of the effect is there at alpha 0.03")
    return Figure(fig, f"Lines of the marked answer's probability against alpha from 1 to 0.001: {', '.join(ends)}.")


def head_map(scores: Tensor, chosen: Sequence[tuple[int, int]] = (), what: str = "gain in log-odds") -> Figure:
    """A value per head as a map, layers across, heads down; chosen heads get a ring. `scores` [L, H]."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    limit = float(scores.abs().max())
    with style():
        fig, axes = subplots(width=8.0, height=3.0)
        image = axes.imshow(scores.T, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.grid(False)
        for at, h in chosen:
            axes.plot(at, h, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.5)
        axes.set_xlabel("layer")
        axes.set_ylabel("head")
        axes.set_yticks(range(scores.shape[1]))
        fig.colorbar(image, ax=axes, label=what)
        axes.set_title(f"The best head is {head} of layer {layer}")
    rings = f" The {len(chosen)} rings are the heads chosen." if chosen else ""
    return Figure(
        fig,
        f"Map of {scores.shape[0]} layers by {scores.shape[1]} heads, colour is the {what} when that head alone is "
        f"steered: best layer {layer} head {head} with {number(float(scores.max()))}, worst "
        f"{number(float(scores.min()))}.{rings}",
    )


def agreement(estimate: Tensor, exact: Tensor, rank_correlation: float) -> Figure:
    """Gradient estimate against exact gain, one point per head. [L, H] each."""
    with style():
        fig, axes = subplots(width=5.5, height=4.2)
        axes.axhline(0, color=PALETTE["grey"], linewidth=1, linestyle="-")
        axes.axvline(0, color=PALETTE["grey"], linewidth=1, linestyle="-")
        axes.plot(
            estimate.flatten(),
            exact.flatten(),
            linestyle="",
            marker="o",
            markersize=4,
            color=PALETTE["blue"],
            alpha=0.7,
        )
        axes.set_xlabel("slope at gate 0 (one backward pass)")
        axes.set_ylabel("exact gain (one run per head)")
        axes.set_title(f"One backward pass ranks the heads: correlation {rank_correlation:.2f}")
    return Figure(
        fig,
        f"Scatter of {exact.numel()} heads, gradient estimate against exact gain: rank correlation "
        f"{number(rank_correlation)}.",
    )


def price(rows: Sequence[Row]) -> Figure:
    """What is gained on the marked instruction against what is kept of the question."""
    with style():
        fig, axes = subplots(width=7.0, height=4.0)
        taken: list[tuple[float, float, float]] = [
            (float(r["question_kept"]) - 0.01, float(r["question_kept"]) + 0.01, float(r["keyword"])) for r in rows
        ]
        for row in rows:
            x, y = float(row["question_kept"]), float(row["keyword"])
            axes.plot(x, y, "o", color=PALETTE["grey"] if row["condition"] == "unsteered" else PALETTE["blue"])
            left, right = x + 0.012, x + 0.012 + 0.0135 * len(row["condition"])
            for level in (0.0, 0.065, -0.065, 0.13, -0.13):  # beside the point, or the next free line above or below
                if not any(a < right and left < b and abs(y + level - c) < 0.05 for a, b, c in taken):
                    break
            taken.append((left, right, y + level))
            axes.annotate(row["condition"], (left, y + level), va="center", fontsize=10)
        axes.set_xlim(-0.03, 0.75)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("answers that still address the question")
        axes.set_ylabel("answers with the keyword")
        axes.set_title("Emphasis is bought from the rest of the prompt")
    said = "; ".join(f"{r['condition']} {number(r['keyword'])} and {number(r['question_kept'])}" for r in rows)
    return Figure(
        fig, f"Points per setting, share of answers with the keyword and share that keep the question: {said}."
    )


def profiling_cost(rows: Sequence[Row]) -> Figure:
    """CPU seconds per prompt for all heads, by method, on a log axis."""
    with style():
        fig, axes = subplots(width=6.5, height=2.6)
        at = np.arange(len(rows))[::-1]
        axes.barh(at, [r["cpu_s_per_prompt"] for r in rows], 0.6, color=PALETTE["blue"])
        axes.set_yticks(at, [r["method"] for r in rows])
        axes.set_xscale("log")
        axes.set_xlabel("CPU seconds per prompt, all 270 heads (log scale)")
        for y, r in zip(at, rows, strict=True):
            axes.annotate(f" {r['times_cheaper']:.0f}×", (r["cpu_s_per_prompt"], y), va="center")
        axes.margins(x=0.15)
        axes.set_title(f"One backward pass is {rows[-1]['times_cheaper']:.0f} times cheaper than the loop")
    said = "; ".join(f"{r['method']} {number(r['cpu_s_per_prompt'])} s" for r in rows)
    return Figure(fig, f"Bars of CPU seconds per prompt to score every head, log scale: {said}.")


def next_tokens(before: Sequence[tuple[str, float]], after: Sequence[tuple[str, float]]) -> Figure:
    """The most likely next tokens without and with steering, side by side."""
    with style():
        fig, pair = subplots(1, 2, width=8.0, height=2.8)
        for axes, tokens, name, colour in zip(
            pair, (before, after), ("unsteered", "steered"), ("grey", "blue"), strict=True
        ):
            at = np.arange(len(tokens))[::-1]
            axes.barh(at, [p for _, p in tokens], 0.65, color=PALETTE[colour])
            axes.set_yticks(at, [repr(t) for t, _ in tokens])
            axes.set_xlim(0, 1)
            axes.set_xlabel("probability")
            axes.set_title(name)
    first, last = before[0], after[0]
    return Figure(
        fig,
        f"Two bar charts of the most likely next tokens: unsteered {first[0]!r} at {number(first[1])}, "
        f"steered {last[0]!r} at {number(last[1])}.",
    )

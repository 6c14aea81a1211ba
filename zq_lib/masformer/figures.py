"""MASFormer's pictures: pure functions from plans and rows to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap

from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row
from zq_lib.masformer.reference import visible
from zq_lib.masformer.spans import SpanPlan, entries, receptive_field

WAYS = {  # of the speed benchmark: colour, line and marker
    "full": ("grey", "--", "o"),
    "full, masked": ("vermilion", "-.", "x"),
    "window": ("blue", "-", "s"),
    "window + 4 sinks": ("sky", ":", "d"),
    "block": ("orange", "-", "^"),
}


def masks(patterns: Mapping[str, tuple[int | None, str, int]], length: int = 16) -> Figure:
    """What each query sees, one picture per pattern: name -> (span, kind, sinks)."""
    counts = {name: entries(length, *pattern) for name, pattern in patterns.items()}
    with style():
        fig, panels = subplots(1, len(patterns), width=2.3 * len(patterns) + 0.5, height=2.9)
        for axes, (name, (span, kind, sinks)) in zip(np.atleast_1d(panels), patterns.items(), strict=True):
            seen = visible(length, length, span, kind, sinks)[0, 0].numpy()
            axes.pcolormesh(
                seen[::-1],
                cmap=ListedColormap(["white", PALETTE["blue"]]),
                vmin=0,
                vmax=1,
                edgecolors="#D0D0D0",
                lw=0.4,
            )
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel("key")
            axes.set_title(f"{name}\n{counts[name]} entries", fontsize=11)
        np.atleast_1d(panels)[0].set_ylabel("query")
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    return Figure(
        fig,
        f"Masks of {length} queries (down) by {length} keys (across), filled where the query sees the key. Score "
        f"entries: {said}.",
    )


def cone(plan: SpanPlan, length: int, token: int | None = None) -> Figure:
    """Which positions can reach a token's final state, layer by layer; full layers are marked."""
    token = length - 1 if token is None else token
    reached = receptive_field(plan, length, token)
    layers = len(plan.layers)
    first = int(reached[0].argmax())
    with style():
        fig, axes = subplots(width=8.0, height=min(6.0, 0.16 * layers + 1.8))
        colours = ListedColormap(["white", PALETTE["blue"]])
        axes.imshow(
            reached, aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=1, interpolation="nearest",
            extent=(-0.5, length - 0.5, -0.5, layers + 0.5),
        )  # fmt: skip
        for layer in plan.full:
            axes.axhline(layer + 0.5, color=PALETTE["orange"], linewidth=1.5, linestyle="--")
            axes.annotate(
                "full", (length - 0.5, layer + 0.5), xytext=(4, 0), textcoords="offset points", va="center",
                color=PALETTE["orange"], fontsize=10, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel("token")
        axes.set_ylabel("input of layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{int(reached[0].sum())} of {token + 1} tokens reach token {token}")
    full = f"layers {', '.join(map(str, plan.full))} are full" if plan.full else "no layer is full"
    return Figure(
        fig,
        f"Map of {layers} layers (up) by {length} tokens (across), filled where a token can change the final state of "
        f"token {token}; {full}. {int(reached[0].sum())} of {token + 1} tokens reach it, the first is {first}.",
    )


def amdahl(plan: SpanPlan, lengths: Sequence[int], width: int, vocabulary: int, title: str = "") -> Figure:
    """Gain of the attention alone and of the whole model against the text's length, by counted FLOP."""
    found = [plan.speedup(length, width, vocabulary) for length in lengths]
    lines = {
        "attention alone": ([s.attention for s in found], "grey", "--", "o"),
        "whole model": ([s.end_to_end for s in found], "blue", "-", "s"),
    }
    with style():
        fig, axes = subplots(width=7.0, height=3.8)
        for name, (gains, colour, line, marker) in lines.items():
            axes.plot(lengths, gains, line, color=PALETTE[colour], marker=marker, ms=5)
            _label(axes, name, lengths[-1], gains[-1], colour)
        _lengths(axes, lengths)
        axes.set_ylim(bottom=0.9)
        axes.set_ylabel("times fewer FLOP")
        axes.set_title(title or "The saving counts only as far as attention does")
    at = "; ".join(
        f"{length} tokens: attention is {number(100 * s.attention_share)} % of the FLOP, gain {number(s.attention)} "
        f"alone and {number(s.end_to_end)} for the whole model"
        for length, s in ((lengths[0], found[0]), (lengths[-1], found[-1]))
    )
    return Figure(fig, f"Lines of counted gains against tokens, logarithmic across. {at}.")


def times(rows: Sequence[Row], column: str = "forward_ms", title: str = "A mask saves nothing, a band does") -> Figure:
    """Milliseconds against tokens, both logarithmic: rows with `attention`, `tokens`, `column` (empty: left out)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if isinstance(row[column], int | float):
            lines.setdefault(row["attention"], []).append((row["tokens"], float(row[column])))
    with style():
        fig, axes = subplots(width=7.5, height=4.4)
        for (name, points), level in zip(lines.items(), _levels([p[-1][1] for p in lines.values()]), strict=True):
            colour, line, marker = WAYS[name]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, line, color=PALETTE[colour], marker=marker, ms=5)
            _label(axes, name, x[-1], level, colour)
        axes.set_yscale("log")
        _lengths(axes, sorted({r["tokens"] for r in rows}))
        axes.set_ylabel("ms of CPU time")
        axes.set_title(title)
    said = "; ".join(f"{name} {number(points[-1][1])} ms at {points[-1][0]}" for name, points in lines.items())
    return Figure(fig, f"Lines of milliseconds against tokens, both axes logarithmic: {said}.")


def importance(rows: Sequence[Row], chosen: str = "in 8") -> Figure:
    """What making one layer local costs: bars of `drop` per `layer`; those marked in column `chosen` stand out."""
    kept = [r["layer"] for r in rows if r[chosen]]
    with style():
        fig, axes = subplots(width=8.0, height=3.6)
        for marked, colour, hatch, name in (
            (True, "vermilion", "//", "stay full"),
            (False, "grey", "", "become local"),
        ):
            of = [r for r in rows if bool(r[chosen]) is marked]
            axes.bar(
                [r["layer"] for r in of], [r["drop"] for r in of], 0.75, color=PALETTE[colour], hatch=hatch,
                edgecolor="white", label=name,
            )  # fmt: skip
        axes.axhline(0, color=PALETTE["black"], linewidth=0.8)
        axes.set_xlabel("layer made local, alone")
        axes.set_ylabel("loss of log p(answer), nats")
        axes.legend()
        axes.set_title(f"{len(kept)} of {len(rows)} layers carry the retrieval")
    worst = max(rows, key=lambda r: r["drop"])
    return Figure(
        fig,
        f"Bars of the loss in log probability of the answer when one layer alone is local. Layer {worst['layer']} "
        f"costs most, {number(float(worst['drop']))} nats; layers {', '.join(map(str, kept))} stay full.",
    )


def plans(rows: Sequence[Row], title: str = "Perplexity hardly notices what retrieval loses") -> Figure:
    """Retrieval and perplexity side by side: rows with `plan`, `full layers`, `window`, `sinks`,
    `accuracy`, `perplexity`."""
    usual, window = max(r["sinks"] for r in rows), next((r["window"] for r in rows if r.get("window")), "")
    names = [
        r["plan"]
        + (f", {r['full layers']}" if r["plan"] not in ("full", "all local") else "")
        + (f", window {r['window']}" if r.get("window", "") not in ("", window) else "")
        + (", no sinks" if r["sinks"] != usual and r["plan"] != "full" else "")
        for r in rows
    ]
    at = np.arange(len(rows))[::-1]
    with style():
        fig, (left, right) = subplots(1, 2, width=9.0, height=0.36 * len(rows) + 1.4)
        for axes, key, colour, label in (
            (left, "accuracy", "blue", "digits retrieved"), (right, "perplexity", "orange", "perplexity"),
        ):  # fmt: skip
            values = [float(r[key]) for r in rows]
            axes.barh(at, values, 0.7, color=PALETTE[colour], edgecolor="white", hatch="//" if axes is right else "")
            for y, value in zip(at, values, strict=True):
                axes.annotate(f" {number(value)}", (value, y), va="center", fontsize=10)
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_xlabel(label)
        left.set_yticks(at, names)
        right.set_yticks([])
        fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    said = "; ".join(
        f"{name} {number(float(r['accuracy']))} and {number(float(r['perplexity']))}"
        for name, r in zip(names, rows, strict=True)
    )
    return Figure(fig, f"Two sets of bars by plan, share of digits retrieved and perplexity: {said}.")


def recall(rows: Sequence[Row]) -> Figure:
    """Tiny decoders: accuracy by which layers are full. Rows with `layers` ("F L L L"), `accuracy`, `step`."""
    at = np.arange(len(rows))[::-1]
    with style():
        fig, axes = subplots(width=7.0, height=0.5 * len(rows) + 1.3)
        for y, row in zip(at, rows, strict=True):
            full = "F" in row["layers"]
            axes.barh(
                y, row["accuracy"], 0.6, color=PALETTE["blue" if full else "vermilion"], edgecolor="white",
                hatch="" if full else "//",
            )  # fmt: skip
            axes.annotate(f" {number(float(row['accuracy']))}", (row["accuracy"], y), va="center", fontsize=10)
        axes.set_yticks(at, [r["layers"] for r in rows])
        axes.set_xlim(0, 1.15)
        axes.set_xlabel("accuracy")
        axes.set_title("One full layer (F) is enough, none is not")
    said = "; ".join(f"{r['layers']} {number(float(r['accuracy']))} after {r['step']} steps" for r in rows)
    return Figure(fig, f"Bars of recall accuracy by layers, F full and L local: {said}.")


def kv_bytes(plans: Mapping[str, SpanPlan], lengths: Sequence[int], heads: int, width: int, itemsize: int) -> Figure:
    """Bytes of keys and values against the text's length, one line per plan."""
    sizes = {name: [plan.kv_bytes(n, heads, width, itemsize) / 1e6 for n in lengths] for name, plan in plans.items()}
    colours = ["grey", "blue", "orange", "green", "vermilion", "purple"]
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        ends = _levels([found[-1] for found in sizes.values()])
        for i, ((name, found), level) in enumerate(zip(sizes.items(), ends, strict=True)):
            colour = colours[i % len(colours)]
            axes.plot(lengths, found, "--" if i == 0 else "-", color=PALETTE[colour], marker="os^dvx"[i % 6], ms=4)
            _label(axes, name, lengths[-1], level, colour)
        axes.set_yscale("log")
        _lengths(axes, lengths)
        axes.set_ylabel("MB of keys and values")
        axes.set_title("What local layers keep stops growing")
    said = "; ".join(f"{name} {number(found[-1])} MB" for name, found in sizes.items())
    return Figure(fig, f"Lines of cache size against tokens, both axes logarithmic. At {lengths[-1]} tokens: {said}.")


def _label(axes: Any, name: str, x: float, y: float, colour: str) -> None:
    """The name of a line behind its last point."""
    axes.annotate(name, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=PALETTE[colour])


def _lengths(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of tokens with room for the lines' names on the right."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] * 0.9, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.45 * 1.1)
    axes.set_xticks(list(lengths))
    axes.xaxis.set_major_formatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}")
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _levels(values: Sequence[float], ratio: float = 1.3) -> list[float]:
    """The same positive numbers, raised where two would be closer than `ratio`: places for labels on a log axis."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found, last = [0.0] * len(values), 0.0
    for i in order:
        last = found[i] = max(values[i], last * ratio)
    return found

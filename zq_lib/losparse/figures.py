"""LoSparse's pictures: pure functions from numbers to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from zq_lib.core.blocks import grid, short
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row
from zq_lib.losparse.reference import decompose
from zq_lib.losparse.schedule import Schedule
from zq_lib.losparse.trace import DensityTrace

# colour, line and marker of a method, wherever it appears; others of LoSparse's settings take the colours that are left
METHODS = {
    "rows only": ("orange", "--", "s"),
    "low rank only": ("grey", "-.", "x"),
    "LoSparse": ("blue", "-", "o"),
    "dense": ("black", ":", "d"),
}
OTHERS = (("green", (0, (5, 1)), "^"), ("purple", (0, (3, 1, 1, 1)), "v"), ("sky", (0, (1, 1)), "D"))


def parts(weight: Tensor, rank: int, kept: Sequence[int]) -> Figure:
    """A small matrix as U V + S: W, what the low rank gives, S with only its `kept` rows, and their sum."""
    left, right, rest = decompose(weight.detach().double(), rank)
    alive = torch.zeros(len(rest), 1, dtype=torch.bool)
    alive[list(kept)] = True
    sparse = torch.where(alive, rest, 0.0)
    product = left @ right
    panels = {"W": weight.double(), "U V": product, "S, kept rows": sparse, "U V + S": product + sparse}
    error = float((rest - sparse).square().sum() / weight.double().square().sum())
    most = float(max(panel.abs().max() for panel in panels.values()))
    rows = "1 row" if len(kept) == 1 else f"{len(kept)} rows"
    with style():
        fig, axes = subplots(1, len(panels), width=9.0, height=2.9)
        for axis, (name, panel) in zip(axes, panels.items(), strict=True):
            axis.imshow(panel.numpy(), cmap="PuOr", vmin=-most, vmax=most)
            if panel.numel() <= 36:
                for (i, j), value in np.ndenumerate(panel.numpy()):
                    shown = "0" if value == 0 else f"{value:.1f}"
                    dark = abs(value) > 0.6 * most
                    axis.annotate(shown, (j, i), ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name)
        axes[0].set_ylabel("output neuron")
    return Figure(
        fig,
        f"Four maps of {weight.shape[0]} neurons by {weight.shape[1]} inputs: W, the product U V of rank {rank}, S "
        f"with {rows} kept, and U V + S, which misses {number(100 * error)} % of W's squared entries; a "
        "neuron whose row of S is gone still has its row of U V.",
    )


def spectra(values: Mapping[str, Tensor], shares: Sequence[float] = (0.05, 0.2)) -> Figure:
    """Singular values of real matrices: name -> all singular values [min(N, K)], of square or nearly square ones.

    Marked is how much of the squared weight the first `shares` of them hold.
    """
    held = {name: _held(v, shares) for name, v in values.items()}
    colours = ("blue", "orange", "green", "vermilion", "purple", "sky")
    with style():
        fig, axes = subplots(width=7.5, height=3.8)
        for i, (name, v) in enumerate(values.items()):
            v = v.detach().double().cpu().numpy()
            line = ("-", "--", "-.", ":")[i % 4]
            axes.plot(np.arange(1, len(v) + 1) / len(v), v / v[0], line, color=PALETTE[colours[i % 6]], label=name)
        for share in shares:
            axes.axvline(share, color=PALETTE["grey"], linewidth=1, linestyle=":")
            axes.annotate(f"{share:.0%}", (share, 0), xytext=(3, 4), textcoords="offset points", color=PALETTE["grey"])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("singular value, as a part of all")
        axes.set_ylabel("size relative to the largest")
        axes.legend()
        least, most = min(h[-1] for h in held.values()), max(h[-1] for h in held.values())
        axes.set_title(f"The first {shares[-1]:.0%} hold {100 * least:.0f} to {100 * most:.0f} % of the squared weight")
    said = "; ".join(f"{name} " + " and ".join(f"{number(100 * h)} %" for h in found) for name, found in held.items())
    first = " and ".join(f"{share:.0%}" for share in shares)
    return Figure(
        fig,
        f"Falling lines of singular values of {len(values)} matrices; the first {first} of them hold of the squared "
        f"weight: {said}.",
    )


def _held(values: Tensor, shares: Sequence[float]) -> list[float]:
    squares = values.detach().double().square()
    return [float(squares[: max(1, round(share * len(squares)))].sum() / squares.sum()) for share in shares]


def errors(rows: Sequence[Row], title: str = "In squared error of the weights, low rank alone wins") -> Figure:
    """Approximation error against the ratio of parameters left: rows with `method`, `ratio`, `error`."""
    return _curves(rows, "error", "relative squared error", title, logarithmic=False)


def perplexities(rows: Sequence[Row], dense: float, title: str = "In perplexity, the order is another") -> Figure:
    """Perplexity against the ratio of parameters left: rows with `method`, `ratio`, `perplexity`."""
    return _curves(rows, "perplexity", "perplexity", title, logarithmic=True, dense=dense)


def _curves(
    rows: Sequence[Row], column: str, label: str, title: str, logarithmic: bool, dense: float | None = None
) -> Figure:
    lines = _by_method(rows)
    least = min(r["ratio"] for r in rows)
    with style():
        fig, axes = subplots(width=7.5, height=4.2)
        for (name, of), (colour, line, marker) in zip(lines.items(), _looks(lines), strict=True):
            of = sorted(of, key=lambda r: r["ratio"])
            axes.plot(
                [100 * r["ratio"] for r in of], [r[column] for r in of], linestyle=line, color=PALETTE[colour],
                marker=marker, ms=5, label=name,
            )  # fmt: skip
        if dense is not None:
            axes.axhline(dense, color=PALETTE["black"], linewidth=1, linestyle=":", label=f"dense, {number(dense)}")
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters left in the replaced matrices, %")
        axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the lines, not on them
        axes.set_title(title)
    there = [r for r in rows if r["ratio"] == least]
    said = "; ".join(f"{r['method']} {number(float(r[column]))}" for r in there)
    ends = f" The dense model has {number(dense)}." if dense is not None else ""
    scale = ", logarithmic," if logarithmic else ""
    return Figure(
        fig, f"Lines of {label}{scale} against the share of parameters left. At {100 * least:g} %: {said}.{ends}"
    )


def share_curve(schedule: Schedule, low_rank: float = 0.0) -> Figure:
    """p(t) with its three phases, and below it the share of the low-rank part, which no mask touches."""
    steps = np.arange(schedule.total)
    shares = np.array([schedule.share(int(t)) for t in steps])
    masks = schedule.mask_steps()
    with style():
        fig, axes = subplots(width=7.0, height=3.6)
        axes.plot(steps, shares, color=PALETTE["blue"], linestyle="-")
        axes.plot(masks, [schedule.share(t) for t in masks], "|", color=PALETTE["vermilion"], ms=9)
        if low_rank:
            axes.axhline(low_rank, color=PALETTE["orange"], linestyle="--")
            axes.annotate("low rank, always there", (schedule.total, low_rank), xytext=(0, 4), ha="right",
                          textcoords="offset points", color=PALETTE["orange"])  # fmt: skip
        for at, name in ((0, "warm-up"), (schedule.warmup, "rows go"), (schedule.last, "final phase")):
            axes.axvline(at, color=PALETTE["grey"], linewidth=1, linestyle=":")
            axes.annotate(name, (at, 1), xytext=(4, 4), textcoords="offset points", color=PALETTE["grey"])
        axes.set_ylim(0, 1.12)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("p(t), share of S that may stay")
        axes.set_title(f"S falls to {number(100 * schedule.target)} % by a cubic", pad=12)
    return Figure(
        fig,
        f"Line of p(t) over {schedule.total} steps: 1 until step {schedule.warmup}, then a cubic down to "
        f"{number(schedule.target)} at step {schedule.last}; {len(masks)} ticks mark the masks.",
    )


def density_map(densities: Mapping[str, float], title: str = "") -> Figure:
    """Blocks x matrices: which share of its rows of S each matrix keeps, as colour and number (per cent)."""
    with style():
        fig, axes = subplots(width=_map_width(densities), height=_map_height(densities) + 1.7)
        _draw_map(axes, densities)
        axes.set_title(title or f"One threshold, {len(densities)} densities")
    return Figure(fig, _describe_map(densities))


def density_frame(trace: DensityTrace, event: int) -> Figure:
    """One frame of the animation: the map after the mask with index `event`, above p(t) at all masks."""
    event = range(len(trace))[event]
    now = dict(zip(trace.names, trace.densities()[event].tolist(), strict=True))
    step, left = trace.steps[event], number(100 * trace.shares[event])
    with style():
        fig, (above, below) = subplots(2, 1, width=_map_width(now), height=_map_height(now) + 3.7)
        _draw_map(above, now)
        above.set_title(f"Step {step}: {left} % of S may stay")
        below.plot(trace.steps, trace.shares, color=PALETTE["grey"], linestyle="--")
        below.plot(trace.steps[: event + 1], trace.shares[: event + 1], color=PALETTE["blue"], marker="o", ms=4)
        below.set_ylim(0, 1.05)
        below.set_xlabel("optimiser step")
        below.set_ylabel("p(t)")
    return Figure(
        fig,
        f"{_describe_map(now)} Below, p(t): mask {event + 1} of {len(trace)}, at step {step}, leaves {left} % of S.",
    )


def _map_width(densities: Mapping[str, float]) -> float:
    return max(5.0, 1.1 * len(grid(list(densities))[1]) + 1.5)


def _map_height(densities: Mapping[str, float]) -> float:
    return 0.5 * len(grid(list(densities))[0])


def _draw_map(axes: Axes, densities: Mapping[str, float]) -> None:
    blocks, kinds, places = grid(list(densities))
    table = np.full((len(blocks), len(kinds)), np.nan)
    for name, density in densities.items():
        table[places[name]] = density
    axes.imshow(table, vmin=0, vmax=1, aspect="auto")
    for name, density in densities.items():
        y, x = places[name]
        colour = "white" if density < 0.6 else "black"
        axes.annotate(f"{100 * density:.0f}", (x, y), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(kinds)), [short(k) for k in kinds], rotation=25, ha="right")
    axes.set_yticks(range(len(blocks)), [str(b) for b in blocks])
    axes.set_ylabel("block")


def _describe_map(densities: Mapping[str, float]) -> str:
    blocks, kinds, _ = grid(list(densities))
    order = sorted(densities, key=lambda name: -densities[name])
    said = ", ".join(f"{short(n)} {number(100 * densities[n])} %" for n in (order[0], order[-1]))
    return (
        f"Map of {len(blocks)} blocks by {len(kinds)} matrices, the share of rows of S that stay; the most and the "
        f"least are {said}."
    )


def training(rows: Sequence[Row], column: str = "loss", label: str = "loss") -> Figure:
    """Training curves of the methods: rows with `method`, `step` and `column`."""
    lines = _by_method(rows)
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        for (name, of), (colour, line, _) in zip(lines.items(), _looks(lines), strict=True):
            axes.plot(
                [r["step"] for r in of], [r[column] for r in of], linestyle=line, color=PALETTE[colour], label=name
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
        axes.legend()
        ends = {name: float(of[-1][column]) for name, of in lines.items()}
        axes.set_title(f"{min(ends, key=ends.__getitem__)} ends lowest")
    said = "; ".join(f"{name} {number(value)}" for name, value in ends.items())
    return Figure(fig, f"Lines of {label} over {rows[-1]['step'] + 1} steps. At the end: {said}.")


def comparison(rows: Sequence[Row], column: str = "nll", label: str = "negative log likelihood") -> Figure:
    """Bars per method with intervals, smaller is better unless `column` is "accuracy": rows with `method`, `column`,
    and where there are intervals `low` and `high`."""
    names, values = [r["method"] for r in rows], [float(r[column]) for r in rows]
    best = (max if column == "accuracy" else min)(range(len(rows)), key=values.__getitem__)
    at = np.arange(len(rows))[::-1]
    spread = None
    if all("low" in r for r in rows):
        spread = [[v - r["low"] for v, r in zip(values, rows, strict=True)],
                  [r["high"] - v for v, r in zip(values, rows, strict=True)]]  # fmt: skip
    with style():
        fig, axes = subplots(width=7.5, height=0.5 * len(rows) + 1.3)
        colours = [PALETTE["blue" if name.startswith("LoSparse") else "grey"] for name in names]
        axes.barh(at, values, 0.6, color=colours, xerr=spread, capsize=3)
        axes.set_yticks(at, names)
        tips = [r.get("high", v) for r, v in zip(rows, values, strict=True)]
        for y, v, tip in zip(at, values, tips, strict=True):
            axes.annotate(f" {number(v)}", (tip, y), va="center")
        axes.margins(x=0.15)
        axes.set_xlabel(label)
        axes.set_title(f"{names[best]} has the {'highest' if column == 'accuracy' else 'lowest'} {label}")
    said = "; ".join(
        f"{name} {number(v)}" + (f" ({number(r['low'])} to {number(r['high'])})" if spread else "")
        for name, v, r in zip(names, values, rows, strict=True)
    )
    return Figure(fig, f"Bars of {label} per method{', with intervals' if spread else ''}: {said}.")


def speed(rows: Sequence[Row], title: str = "") -> Figure:
    """Dense against shrunk, milliseconds and parameters side by side: rows with `layer`, `dense_ms`, `shrunk_ms`,
    `dense_parameters`, `shrunk_parameters`."""
    gains = [r["dense_ms"] / r["shrunk_ms"] for r in rows]
    at = np.arange(len(rows))[::-1]
    with style():
        fig, panels = subplots(1, 2, width=9.0, height=0.55 * len(rows) + 1.6)
        for axes, kind, label, scale in zip(
            panels, ("ms", "parameters"), ("ms of CPU time", "million parameters"), (1, 1e-6), strict=True
        ):
            for way, colour, hatch, shift in (("dense", "grey", "", 0.2), ("shrunk", "blue", "//", -0.2)):
                values = [scale * r[f"{way}_{kind}"] for r in rows]
                axes.barh(at + shift, values, 0.38, color=PALETTE[colour], edgecolor="white", hatch=hatch, label=way)
                for y, v in zip(at + shift, values, strict=True):
                    axes.annotate(f" {number(v)}", (v, y), va="center", fontsize=10)
            axes.margins(x=0.2)
            axes.set_xlabel(label)
        panels[0].set_yticks(at, [str(r["layer"]) for r in rows])
        panels[1].set_yticks([])
        panels[1].legend()
        fig.suptitle(
            title or f"Shrunk layers run {number(min(gains))} to {number(max(gains))} times as fast as dense ones",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
    said = "; ".join(
        f"{r['layer']} {number(r['dense_ms'])} to {number(r['shrunk_ms'])} ms and "
        f"{number(r['dense_parameters'] / 1e6)} to {number(r['shrunk_parameters'] / 1e6)} million"
        for r in rows
    )
    return Figure(fig, f"Two sets of bars, dense and shrunk, of milliseconds and of parameters: {said}.")


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["method"], []).append(row)
    return lines


def _looks(lines: Mapping[str, object]) -> list[tuple]:
    """A look for each method: its own, that of LoSparse for the first of its settings, or one of the others in turn."""
    fresh, first = iter(OTHERS * len(lines)), next((name for name in lines if name.startswith("LoSparse")), "")
    known = METHODS | {first: METHODS["LoSparse"]}
    return [known[name] if name in known else next(fresh) for name in lines]

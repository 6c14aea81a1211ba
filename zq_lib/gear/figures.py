"""GEAR's pictures: pure functions from tensors and rows to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row

COMPONENTS = {  # of `GearCache.nbytes_by_component`: colour and hatch
    "codes": ("blue", ""),
    "metadata": ("orange", "//"),
    "low rank": ("green", "\\\\"),
    "outliers": ("vermilion", "xx"),
    "exact": ("grey", ".."),
    "positions": ("purple", "++"),
    "other layers": ("sky", "oo"),
}
FAMILIES = {"plain": ("grey", "o"), "gear": ("vermilion", "s"), "other": ("blue", "^")}  # colour and marker


def channels(keys: Tensor, values: Tensor) -> Figure:
    """One head's keys and values as maps, tokens across and channels down. [n, D] each."""
    largest = keys.abs().mean(0).sort(descending=True).values
    ratio = float(largest[0] / keys.abs().mean(0).median())
    flat = float(values.abs().mean(0).max() / values.abs().mean(0).median())
    with style():
        fig, pair = subplots(1, 2, width=9.0, height=3.4)
        for axes, x, name in zip(pair, (keys, values), ("keys", "values"), strict=True):
            limit = float(x.abs().quantile(0.995))
            image = axes.imshow(x.T, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.set_xlabel("token")
            axes.set_ylabel("channel")
            fig.colorbar(image, ax=axes)
            axes.set_title(name)
        fig.suptitle("Keys have strong stripes, values weak ones", x=0.01, ha="left", fontsize=12)
    return Figure(
        fig,
        f"Two maps of one head, tokens across and channels down, colour is the entry: the largest key channel is on "
        f"average {number(ratio)} times the median channel and stays large over all tokens; for values it is "
        f"{number(flat)} times.",
    )


def error_heatmap(x: Tensor, restored: Tensor, outliers: Tensor | None = None, title: str = "") -> Figure:
    """Where a head's restored keys or values are wrong. `x`, `restored` [n, D]; `outliers` [n, D] bool gets marks."""
    wrong = (restored.float() - x.float()).abs()
    error = float(wrong.norm() / x.float().norm())
    with style():
        fig, axes = subplots(width=8.0, height=3.6)
        image = axes.imshow(wrong.T, aspect="auto", interpolation="nearest", vmin=0, vmax=float(wrong.quantile(0.995)))
        if outliers is not None:
            token, channel = outliers.nonzero(as_tuple=True)
            axes.plot(token, channel, linestyle="", marker="s", markersize=2, color=PALETTE["vermilion"])
        axes.set_xlabel("token")
        axes.set_ylabel("channel")
        fig.colorbar(image, ax=axes, label="absolute error")
        axes.set_title(title or f"Relative error {number(error)}")
    marks = f" {int(outliers.sum())} red marks are outliers, restored exactly." if outliers is not None else ""
    return Figure(
        fig,
        f"Map of {x.shape[0]} tokens by {x.shape[1]} channels, colour is the absolute error after restoring: the "
        f"relative error is {number(error)}.{marks}",
    )


def residual_spectrum(residuals: Mapping[str, Tensor], rank: int = 4, most: int = 16) -> Figure:
    """How much of each residual's energy a low rank holds. Tensors [..., n, D]; "noise" in a name: dashed."""
    shares = {}
    for name, x in residuals.items():
        energy = torch.linalg.svdvals(x.float()).square().flatten(0, -2)  # [heads, min(n, D)]
        shares[name] = (energy.cumsum(-1) / energy.sum(-1, keepdim=True)).mean(0)
    colours = [c for c in PALETTE if c not in ("grey", "black")]
    with style():
        fig, axes = subplots(width=7.0, height=4.0)
        ends = []
        for i, (name, share) in enumerate(shares.items()):
            noise = "noise" in name
            at = np.arange(1, min(most, len(share)) + 1)
            colour = PALETTE["grey" if noise else colours[i % len(colours)]]
            axes.plot(at, share[: len(at)], "--" if noise else "-", color=colour, marker="" if noise else "o", ms=4)
            ends.append((float(share[len(at) - 1]), at[-1], name, colour))
        for y, (_, x, name, colour) in zip(_spread([e[0] for e in ends], 0.05), ends, strict=True):
            axes.annotate(name, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=colour)
        axes.axvline(rank, color=PALETTE["grey"], linewidth=1, linestyle=":")
        axes.set_xlim(0.5, most * 1.45)
        axes.set_xticks(range(2, most + 1, 2))
        axes.set_ylim(0, 1)
        axes.set_xlabel("rank")
        axes.set_ylabel("share of the residual's energy")
        axes.set_title(f"What rank {rank} can repair")
    said = "; ".join(f"{name} {number(float(share[rank - 1]))}" for name, share in shares.items())
    return Figure(fig, f"Lines of the share of the residual's energy in the best low rank. At rank {rank}: {said}.")


def error_ladder(rows: Sequence[Row], title: str = "Each part lowers the error") -> Figure:
    """Relative error of keys and values per setting: rows with `setting`, `keys`, `values`."""
    with style():
        fig, axes = subplots(width=7.5, height=0.55 * len(rows) + 1.3)
        at = np.arange(len(rows))[::-1]
        for side, shift, colour, hatch in (("keys", 0.2, "blue", ""), ("values", -0.2, "orange", "//")):
            found = [float(r[side]) for r in rows]
            axes.barh(at + shift, found, 0.38, color=PALETTE[colour], hatch=hatch, edgecolor="white", label=side)
            for y, v in zip(at + shift, found, strict=True):
                axes.annotate(f" {number(v)}", (v, y), va="center", fontsize=10)
        axes.set_yticks(at, [r["setting"] for r in rows])
        axes.set_xlim(0, 1.15 * max(float(r[s]) for r in rows for s in ("keys", "values")))
        axes.set_xlabel("relative error")
        axes.legend(loc="lower right")
        axes.set_title(title)
    said = "; ".join(f"{r['setting']} {number(r['keys'])} and {number(r['values'])}" for r in rows)
    return Figure(fig, f"Bars of the relative error of keys and values per setting: {said}.")


def bytes_over_tokens(rows: Sequence[Row], title: str = "The cache grows with every token") -> Figure:
    """Bytes against tokens, a line per `name` with its name at the end: rows with `name`, `tokens`, `bytes`."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    colours = [c for c in PALETTE if c != "black"]
    unit, what = (1e9, "GB") if max(r["bytes"] for r in rows) >= 5e8 else (1e6, "MB")
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        ends = []
        for i, name in enumerate(names):
            mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["tokens"])
            x, y, colour = [r["tokens"] for r in mine], [r["bytes"] / unit for r in mine], colours[i % len(colours)]
            axes.plot(x, y, color=PALETTE[colour], marker="os^Dv"[i % 5], markersize=5)
            ends.append((x[-1], y[-1], name, PALETTE[colour]))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        low, high = axes.get_ylim()
        levels = _spread([float(np.log10(y)) for _, y, _, _ in ends], 0.07 * float(np.log10(high / low)))
        for level, (x, _, name, colour) in zip(levels, ends, strict=True):
            axes.annotate(name, (x, 10**level), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
        ticks = sorted({r["tokens"] for r in rows})
        axes.set_xticks(ticks[:: max(1, len(ticks) // 8)])
        axes.xaxis.set_major_formatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}")
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(f"cache size, {what}")
        axes.set_title(title)
    said = "; ".join(f"{name} {number(y)} {what} at {x}" for x, y, name, _ in ends)
    return Figure(fig, f"Lines of cache size against tokens, both axes logarithmic: {said}.")


def size_bar(caches: Mapping[str, Mapping[str, int]], dense_bytes: int) -> Figure:
    """Bytes by component per cache (`GearCache.nbytes_by_component`), beside the same tokens in 16 bits."""
    parts = [p for p in COMPONENTS if any(sizes.get(p, 0) for sizes in caches.values())]
    unit, what = (1e6, "MB") if dense_bytes >= 1e6 else (1e3, "kB")
    with style():
        fig, axes = subplots(width=8.0, height=0.5 * len(caches) + 1.9)
        at = np.arange(len(caches) + 1)[::-1]
        axes.barh(at[0], dense_bytes / unit, 0.6, color="white", edgecolor=PALETTE["black"])
        start = np.zeros(len(caches))
        for part in parts:
            sizes = np.array([found.get(part, 0) / unit for found in caches.values()])
            colour, hatch = COMPONENTS[part]
            options: dict[str, Any] = {"color": PALETTE[colour], "hatch": hatch, "edgecolor": "white", "label": part}
            axes.barh(at[1:], sizes, 0.6, left=start, **options)
            start += sizes
        totals = {name: sum(found.values()) for name, found in caches.items()}
        for y, total in zip(at[1:], totals.values(), strict=True):
            axes.annotate(
                f" {total / unit:.2f} {what}, {dense_bytes / total:.2f}×", (total / unit, y), va="center", fontsize=10
            )
        axes.set_yticks(at, ["16 bits", *caches])
        axes.set_xlim(0, 1.05 * max(dense_bytes, *totals.values()) / unit)
        axes.set_xlabel(f"{what} in the cache")
        fig.legend(loc="outside lower center", ncols=len(parts))
        axes.set_title("Where the bytes go")
    said = "; ".join(
        f"{name} {number(totals[name] / unit)} {what} ("
        + ", ".join(f"{p} {number(found[p] / unit)}" for p in parts if found.get(p))
        + ")"
        for name, found in caches.items()
    )
    return Figure(
        fig, f"Stacked bars of bytes by component, against {number(dense_bytes / unit)} {what} in 16 bits: {said}."
    )


def equal_bytes(rows: Sequence[Row], title: str = "What a bit buys") -> Figure:
    """Bits per element against KL, with standard errors: rows with `setting`, `bits`, `kl`, `kl_se` and, if there are
    several texts, `text`, each of which gets a panel. Plain settings are joined by a line: below it is a gain."""
    names = list(dict.fromkeys(r.get("text", "") for r in rows))
    with style():
        fig, all_axes = subplots(len(names), 1, width=8.0, height=3.5 * len(names) + 0.4)
        for axes, name in zip(np.atleast_1d(all_axes), names, strict=True):
            _equal_bytes_panel(axes, [r for r in rows if r.get("text", "") == name])
            axes.set_ylabel("KL, nats (log)")
            axes.set_title(f"{title}: {name}" if name else title)
        axes.set_xlabel("bits per cached element")
    said = []
    for name in names:
        of = sorted((r for r in rows if r.get("text", "") == name), key=lambda r: r["bits"])
        said.append(
            (f"{name}: " if name else "")
            + ", ".join(f"{r['setting']} {number(float(r['bits']))} bits {number(float(r['kl']))}" for r in of)
        )
    return Figure(
        fig,
        "Points of bits per element against KL from full precision, with standard errors; a line joins plain "
        f"quantisation, and what lies above it loses at equal bytes. {'; '.join(said)}.",
    )


def family(setting: str) -> str:
    """Plain quantisation, a recipe of the paper, or another setting; by its name."""
    if setting.startswith("plain"):
        return "plain"
    return "gear" if setting.startswith(("GEAR", "paper", "lite")) else "other"


def _equal_bytes_panel(axes: Any, rows: Sequence[Row]) -> None:
    plain = sorted((r for r in rows if family(r["setting"]) == "plain"), key=lambda r: r["bits"])
    axes.plot([r["bits"] for r in plain], [r["kl"] for r in plain], "-", color=PALETTE["grey"], linewidth=1.5)
    axes.set_yscale("log")
    for r in rows:
        colour, marker = FAMILIES[family(r["setting"])]
        below = min(r["kl_se"], 0.9 * r["kl"])  # a log axis has no zero
        spread = [[below], [r["kl_se"]]]
        axes.errorbar(r["bits"], r["kl"], spread, marker=marker, ms=7, color=PALETTE[colour], capsize=3, linestyle="")
    left, right = min(r["bits"] for r in rows), max(r["bits"] for r in rows)
    low, high = (np.log10(f(r["kl"] for r in rows)) for f in (min, max))
    width, height = (right - left) or 1.0, (high - low) or 1.0
    axes.set_xlim(left - 0.06 * width, right + 0.3 * width)
    axes.set_ylim(10 ** (low - 0.12 * height), 10 ** (high + 0.15 * height))
    taken = [((r["bits"] - 0.015 * width, r["bits"] + 0.015 * width), np.log10(r["kl"])) for r in rows]
    for r in sorted(rows, key=lambda r: r["bits"]):  # beside the point, or the next free line above or below
        x, y = r["bits"] + 0.025 * width, np.log10(r["kl"])
        span = (x, x + 0.0185 * width * len(r["setting"]))
        for step in (0.0, 0.07, -0.07, 0.14, -0.14, 0.21, -0.21):
            level = y + height * (step if family(r["setting"]) == "plain" else -step)
            if not any(a < span[1] and span[0] < b and abs(level - c) < 0.065 * height for (a, b), c in taken):
                break
        taken.append((span, level))
        colour = PALETTE[FAMILIES[family(r["setting"])][0]]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.annotate(r["setting"], (x, 10**level), va="center", fontsize=10, color=colour, bbox=box)


def stream(rows: Sequence[Row], tokens: int) -> Figure:
    """The cache when it holds `tokens`: which are exact, which packed, and the bytes until then. Rows, one per token:
    `tokens`, `sinks`, `segments` (their lengths), `buffer`, `bytes`, `dense`."""
    now = next(r for r in rows if r["tokens"] == tokens)
    past = [r for r in rows if r["tokens"] <= tokens]
    parts = [("sinks", now["sinks"], "grey", "..")]
    parts += [(f"segment {i}", n, "blue", "//" if i % 2 else "\\\\") for i, n in enumerate(now["segments"], 1)]
    parts += [("buffer", now["buffer"], "orange", "..")]
    with style():
        fig, (strip, axes) = subplots(2, 1, width=8.0, height=4.4)
        at = 0
        for name, n, colour, hatch in parts:
            if n:
                strip.barh(0, n, 0.8, left=at, color=PALETTE[colour], hatch=hatch, edgecolor="white")
                strip.annotate(f"{name}\n{n}", (at + n / 2, 0.5), ha="center", va="bottom", fontsize=10)
            at += n
        last = rows[-1]
        strip.set_xlim(0, last["tokens"])
        strip.set_ylim(-0.5, 1.3)
        strip.set_yticks([])
        strip.spines["left"].set_visible(False)
        strip.set_title(f"{sum(now['segments'])} of {tokens} tokens are packed")
        x = [r["tokens"] for r in past]
        axes.plot(x, [r["dense"] / 1e3 for r in past], "--", color=PALETTE["grey"])
        axes.plot(x, [r["bytes"] / 1e3 for r in past], "-", color=PALETTE["blue"])
        for key, name, colour in (("dense", "16 bits", "grey"), ("bytes", "this cache", "blue")):
            axes.annotate(
                f"{name} {number(now[key] / 1e3)} kB", (tokens, now[key] / 1e3), xytext=(-6, 6),
                textcoords="offset points", ha="right", color=PALETTE[colour],
            )  # fmt: skip
        axes.set_xlim(0, last["tokens"])
        axes.set_ylim(0, 1.15 * last["dense"] / 1e3)
        axes.set_xlabel("tokens")
        axes.set_ylabel("kB, one layer")
    return Figure(
        fig,
        f"A strip of {tokens} tokens above a line of bytes: {now['sinks']} sinks and {now['buffer']} tokens in the "
        f"buffer are exact, {sum(now['segments'])} are packed in {len(now['segments'])} segments; "
        f"{number(now['bytes'] / 1e3)} kB instead of {number(now['dense'] / 1e3)} kB in 16 bits.",
    )


def _spread(levels: Sequence[float], space: float) -> list[float]:
    """The same levels, moved up where they would be closer than `space`."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    found, last = [0.0] * len(levels), -np.inf
    for i in order:
        last = found[i] = max(levels[i], last + space)
    return found

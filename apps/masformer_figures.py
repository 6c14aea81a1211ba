"""The MASFormer page's pictures, tables and sentences: figures that stay readable on a telephone."""

from __future__ import annotations

from math import ceil

import numpy as np
from matplotlib.colors import ListedColormap

from apps.masformer_run import Result
from apps.masformer_settings import LAYERS, Price, Settings, price
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.masformer import receptive_field
from zq_lib.masformer.reference import visible

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
MB = 1e6
CELLS = 64  # of a mask's picture
HARDLY, BROKEN = 1.1, 1.2  # times full attention's perplexity: up to here it hardly tells, from there the text suffers
_SEEN = ListedColormap(["white", PALETTE["blue"]])


def masks(settings: Settings) -> Figure:
    """What a full and a local layer see, drawn on CELLS x CELLS cells of the text."""
    cell = settings.length / CELLS
    span, sinks = max(1, round(settings.window / cell)), ceil(settings.sinks / cell)
    with style():
        fig, panels = subplots(1, 2, width=WIDTH, height=2.7)
        for axes, name, pattern in (
            (panels[0], "full layer", (None, "window", 0)),
            (panels[1], f"local: {settings.kind} {settings.window}", (span, settings.kind, sinks)),
        ):
            seen = visible(CELLS, CELLS, *pattern)[0, 0].numpy()
            axes.imshow(
                seen, cmap=_SEEN, vmin=0, vmax=1, extent=(0, settings.length, settings.length, 0),
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(name)
            axes.set_xticks([0, settings.length])
            axes.get_xticklabels()[1].set_horizontalalignment("right")
            axes.set_xlabel("key")
        panels[0].set_yticks([0, settings.length])
        panels[0].set_ylabel("query")
        panels[1].set_yticks([])
    every = f" and the first {settings.sinks} tokens (sinks)" if settings.sinks else ", no sinks"
    what = f"its last {settings.window} tokens" if settings.kind == "window" else f"its own block of {settings.window}"
    return Figure(
        fig,
        f"Masks of {settings.length} queries (down) by as many keys (across), filled where a query sees a key; a cell "
        f"is {number(cell)} tokens. A full layer sees all before it, a local one {what}{every}.",
    )


def cone(settings: Settings, counted: Price) -> Figure:
    """From which tokens something can reach the last one, layer by layer."""
    length = settings.length
    reached = receptive_field(settings.plan, length)
    with style():
        fig, axes = subplots(width=WIDTH, height=3.3)
        axes.imshow(
            reached, aspect="auto", origin="lower", cmap=_SEEN, vmin=0, vmax=1, interpolation="nearest",
            extent=(0, length, -0.5, LAYERS + 0.5),
        )  # fmt: skip
        full = settings.full
        axes.plot(
            [1.03] * len(full), full, linestyle="", marker="s", ms=4, color=PALETTE["vermilion"], clip_on=False,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        axes.set_xticks([0, length // 2, length])
        axes.get_xticklabels()[2].set_horizontalalignment("right")
        axes.set_yticks(range(0, LAYERS + 1, 5))
        axes.set_xlabel("token")
        axes.set_ylabel("input of layer")
        axes.set_title(f"{counted.reached} of {length} tokens reach the last")
    squares = f"red squares mark the {len(full)} full layers" if full else "no layer is full"
    return Figure(
        fig,
        f"Influence cone of the last token: layers up, {length} tokens across, filled where a token can change its "
        f"final state; {squares}. {counted.reached} tokens reach it. Reach is needed for an answer, but not enough.",
    )


def left(settings: Settings, counted: Price) -> Figure:
    """What is left of full attention's work and bytes."""
    shares = {
        "score entries": (counted.score_entries / counted.full_score_entries, "blue", ""),
        "KV cache": (counted.cache_bytes / counted.full_cache_bytes, "orange", "//"),
        "whole model's\nFLOP": (1 / counted.whole_gain, "grey", ".."),
    }
    at = np.arange(len(shares))[::-1]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.4)
        for y, (share, colour, hatch) in zip(at, shares.values(), strict=True):
            axes.barh(y, share, 0.6, color=PALETTE[colour], hatch=hatch, edgecolor="white")
            axes.annotate(f" {number(100 * share)}%", (share, y), va="center", fontsize=10)
        axes.set_yticks(at, list(shares))
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
        axes.set_xlabel(f"left of full attention, {settings.length} tokens")
        axes.set_title(f"Attention {number(counted.attention_gain)}×, model {number(counted.whole_gain)}×")
    said = ", ".join(f"{name.replace(chr(10), ' ')} {number(100 * share)}%" for name, (share, *_) in shares.items())
    return Figure(
        fig,
        f"Bars of what is left of full attention on {settings.length} tokens: {said}. Attention is "
        f"{number(100 * counted.attention_share)}% of the full model's FLOP, so its gain of "
        f"{number(counted.attention_gain)} becomes {number(counted.whole_gain)} for the whole model.",
    )


def digits(result: Result) -> Figure:
    """Probability of each right digit under full attention and under the plan."""
    s, code = result.settings, result.settings.code
    at = np.arange(len(code))
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        axes.bar(at - 0.2, result.full.right, 0.38, color=PALETTE["grey"], label="full attention")
        axes.bar(
            at + 0.2, result.plan.right, 0.38, color=PALETTE["blue"], hatch="//", edgecolor="white", label=s.label
        )  # fmt: skip
        axes.axhline(0.1, color=PALETTE["black"], linewidth=1, linestyle=":")
        axes.set_xticks(at, list(code))
        axes.set_ylim(0, 1)
        axes.set_xlabel("digit of the code (dotted: guessing)")
        axes.set_ylabel("probability")
        axes.set_title(f"Right digits: full {result.found('full')}, plan {result.found('plan')} of {len(code)}")
        fig.legend(loc="outside lower center", ncols=2, columnspacing=1)
    said = (", ".join(f"{p:.2f}" for p in side.right) for side in (result.full, result.plan))
    return Figure(
        fig,
        f"Bars of the probability of each digit of the code {code}, after the right ones before it. Full attention: "
        f"{next(said)}. {s.label}: {next(said)}. A guess would have 0.10.",
    )


def verdict(result: Result) -> str:
    """What became of the code and of the text."""
    count, whole, ours = len(result.settings.code), result.found("full"), result.found("plan")
    if whole < count:
        said = "Full attention itself misses the code, so this text says little"
    elif ours == count:
        said = "The plan keeps the code"
    elif ours:
        said = "The plan loses part of the code"
    else:
        said = "The plan loses the code"
    damaged = result.ratio > BROKEN
    joint = "but the text suffers" if damaged and ours == count else "and the text suffers" if damaged else ""
    if result.ratio <= HARDLY and ours < whole == count:
        joint = "and perplexity hardly tells"
    return (
        f"{said}{', ' + joint if joint else ''}: {ours} of {count} digits ({whole} under full attention), perplexity "
        f"{number(result.plan.perplexity)} ({number(result.full.perplexity)})."
    )


def run_rows(result: Result) -> list[tuple[str, str, str]]:
    """What was measured, under full attention and under the plan."""
    pairs = (result.full, result.plan)
    mean = (sum(s.right) / len(s.right) for s in pairs)
    return [
        ("digits right", *(f"{result.found(side)} of {len(result.settings.code)}" for side in ("full", "plan"))),
        ("mean probability of a right digit", *map(number, mean)),
        ("likeliest, digit by digit", *(" ".join(map(_printable, s.chosen)) for s in pairs)),
        ("perplexity of the document", *(number(s.perplexity) for s in pairs)),
        ("cache, MB measured", *(number(s.bytes / MB) for s in pairs)),
        (
            "cache, MB counted",
            *(number(b / MB) for b in _counted(price(result.settings.plan, result.tokens))),
        ),
    ]


def _counted(counted: Price) -> tuple[int, int]:
    return counted.full_cache_bytes, counted.cache_bytes


def _printable(token: str) -> str:
    """A token that can be seen, whatever it is."""
    shown = token.strip(" ").replace("\n", "↵") or "␣"
    return "".join(c if c.isprintable() else "�" for c in shown)


def price_rows(counted: Price) -> list[tuple[str, str, str, float]]:
    """What is counted, for full attention and for the plan, and how many times less that is."""
    attention, whole = counted.attention_gain, counted.whole_gain
    entries = (number(n / 1e6) for n in (counted.full_score_entries, counted.score_entries))
    sizes = _counted(counted)
    return [
        ("score entries a head, millions", *entries, attention),
        ("KV cache, MB", *(number(b / MB) for b in sizes), sizes[0] / sizes[1]),
        ("FLOP, attention alone", "100%", f"{number(100 / attention)}%", attention),
        ("FLOP, whole model", "100%", f"{number(100 / whole)}%", whole),
    ]


def price_sentence(settings: Settings, counted: Price) -> str:
    """The price in a line."""
    entries = counted.score_entries / counted.full_score_entries
    size = counted.cache_bytes / counted.full_cache_bytes
    return (
        f"{settings.label}: {number(100 * entries)}% of the score entries and {number(100 * size)}% of the cache at "
        f"{settings.length} tokens."
    )

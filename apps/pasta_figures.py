"""The PASTA page's pictures and tables: from a comparison to figures that stay readable on a telephone."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Rectangle

from apps.pasta_comparison import Comparison
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen


def printable(token: str, most: int = 16) -> str:
    """A token in quotation marks, with white space and control characters made visible and formulas left as text."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").strip(" ")
    shown = "".join(c if c.isprintable() else "�" for c in shown)
    return f'"{shown[: most - 1] + "…" if len(shown) > most else shown}"'


def _small(probability: float) -> str:
    return "below 0.001" if probability < 0.001 else number(probability)


def next_tokens(result: Comparison) -> Figure:
    """Bars of the next token's probability, before and after."""
    names, before, after = zip(*result.following, strict=True)
    top, was = int(np.argmax(after)), int(np.argmax(before))
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        at = np.arange(len(names))[::-1]
        axes.barh(at + 0.2, before, 0.38, color=PALETTE["grey"], label="unsteered")
        axes.barh(at - 0.2, after, 0.38, color=PALETTE["blue"], hatch="//", edgecolor="white", label="steered")
        axes.set_yticks(at, [printable(n) for n in names], parse_math=False)
        axes.set_xlim(0, 1)
        axes.set_xlabel("probability of the next token")
        axes.set_title(f"{printable(names[top])}: {before[top]:.0%} → {after[top]:.0%}", parse_math=False)
        axes.legend(loc="lower right")
    return Figure(
        fig,
        f"Bars of the next token's probability. Most likely unsteered: {printable(names[was])} at "
        f"{_small(before[was])}, steered {_small(after[was])}. Most likely steered: {printable(names[top])} at "
        f"{_small(after[top])}, unsteered {_small(before[top])}.",
    )


def attention_map(result: Comparison) -> Figure:
    """Share of the marked words in the last prompt token's attention, layer by head, before and after."""
    before, after = np.array(result.plain.share), np.array(result.steered.share)
    with style():
        fig, pair = subplots(2, 1, width=WIDTH, height=3.7)
        for axes, share, name in zip(pair, (before, after), ("unsteered", "steered"), strict=True):
            image = axes.imshow(share.T, vmin=0, vmax=1, aspect="auto")
            axes.set_ylabel("head")
            axes.set_yticks(range(0, share.shape[1], 4))
            axes.set_title(name)
            if len(result.heads) < share.size:
                for layer, head in result.heads:
                    axes.add_patch(_outline(layer, head))
        pair[0].set_xticklabels([])
        pair[1].set_xlabel("layer")
        fig.colorbar(image, ax=pair, label="share of the marks")
    n = len(result.heads)
    heads = f"{n} steered head{'s' if n > 1 else ''}{' (outlined)' if n < before.size else ''}"
    return Figure(
        fig,
        f"Two maps of layers by heads: share of the marked words in the attention of the last prompt token. "
        f"Mean of the {heads}: {number(result.share(result.plain))} unsteered, "
        f"{number(result.share(result.steered))} steered; mean of all heads: {number(float(before.mean()))} and "
        f"{number(float(after.mean()))}.",
    )


def _outline(layer: int, head: int) -> Rectangle:
    return Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=PALETTE["vermilion"], linewidth=2)


def attended(result: Comparison, most: int = 5) -> list[tuple[str, str, float, float]]:
    """The tokens that the steered heads look at most: token, whether marked, share before and after."""
    order = sorted(range(len(result.tokens)), key=lambda i: -result.steered.row[i])[:most]
    return [
        (
            printable(result.tokens[i]),
            "yes" if result.marked[i] else "no",
            result.plain.row[i],
            result.steered.row[i],
        )
        for i in order
    ]


def numbers(result: Comparison) -> list[tuple[str, float, float]]:
    """What steering changed and what it cost."""
    a, b = result.plain, result.steered
    return [
        ("Attention on the marks, steered heads", result.share(a), result.share(b)),
        (
            "Probability of the likeliest next token",
            max(n[1] for n in result.following),
            max(n[2] for n in result.following),
        ),
        ("Price: repeated word pairs in the answer", a.repeated, b.repeated),
        ("Price: log-probability of the unsteered answer, per token", a.logprob, b.logprob),
    ]

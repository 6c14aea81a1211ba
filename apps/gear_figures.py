"""The GEAR page's pictures and tables: from a result to figures that stay readable on a telephone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from apps.gear_run import Look, Result, Rival
from apps.gear_settings import PLAIN, PROMPT, STEPS, Settings, dense_bytes, weigh
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.gear.figures import COMPONENTS
from zq_lib.gear.measure import Score, standard_error

WIDTH = 4.2  # inches, 403 pixels of a page: ten points stay ten points in half a column and on a small screen
MB = 1e6


def label(settings: Settings) -> str:
    """What the page calls a setting."""
    return (settings.preset or "your setting").replace("_", " ")


def sizes(settings: Settings, rival: str | None = None) -> Figure:
    """Bytes by component after the prompt, beside 16 bits and the plain setting of nearly the same size."""
    weights = {label(settings): weigh(settings.config)}
    if rival is not None and PLAIN[rival] != settings.config:
        weights[rival] = weigh(PLAIN[rival])
    dense, ours = dense_bytes(PROMPT), next(iter(weights.values()))
    shown = [part for part in COMPONENTS if any(w.parts.get(part) for w in weights.values())]
    with style():
        fig, axes = subplots(width=WIDTH, height=2.9)
        at = np.arange(len(weights) + 1)[::-1]
        axes.barh(at[0], dense / MB, 0.6, color="white", edgecolor=PALETTE["black"])
        left = np.zeros(len(weights))
        for part in shown:
            size = np.array([w.parts.get(part, 0) / MB for w in weights.values()])
            colour, hatch = COMPONENTS[part]
            axes.barh(at[1:], size, 0.6, left=left, color=PALETTE[colour], hatch=hatch, edgecolor="white", label=part)
            left += size
        for y, weight in zip(at[1:], weights.values(), strict=True):
            axes.annotate(f" {weight.ratio:.1f}× smaller", (weight.bytes / MB, y), va="center", fontsize=10)
        axes.set_yticks(at, ["16 bits", *weights])
        axes.set_xlabel(f"MB, cache of {PROMPT} tokens")
        axes.set_title(f"{ours.bits:.2f} bits per compressed element")
        fig.legend(loc="outside lower center", ncols=3, columnspacing=1, handlelength=1.5)
    said = "; ".join(
        f"{name} {number(w.bytes / MB)} MB ("
        + ", ".join(f"{part} {number(size / MB)}" for part, size in w.parts.items())
        + ")"
        for name, w in weights.items()
    )
    return Figure(
        fig,
        f"Bars of the bytes after {PROMPT} tokens, by component. 16 bits: {number(dense / MB)} MB; {said}. Exact are "
        "sinks and buffer, here in the model's 32 bits.",
    )


def same_bytes(settings: Settings, score: Score, plain: dict[str, Score]) -> Figure:
    """Size of the cache against the distance from full precision, with plain quantisation as a line."""
    plain = {name: s for name, s in plain.items() if s.bytes < max(1.3 * score.bytes, 4 * MB)}
    x, y, spread = ([f(s) for s in plain.values()] for f in (_mb, _kl, _error))
    with style():
        fig, axes = subplots(width=WIDTH, height=3.2)
        axes.errorbar(x, y, _whiskers(y, spread), color=PALETTE["grey"], marker="o", ms=6, linestyle="-", capsize=3)
        for name, at, level in zip(plain, x, y, strict=True):
            short = name.removeprefix("plain ").replace(" bit", "-bit")
            if PLAIN[name] == settings.config:
                continue  # the square has its name
            axes.annotate(short, (at, level), xytext=(5, 3), textcoords="offset points", va="bottom", fontsize=10,
                          color=PALETTE["grey"])  # fmt: skip
        mine = _kl(score)
        axes.errorbar(
            _mb(score), mine, _whiskers([mine], [_error(score)]), color=PALETTE["vermilion"], marker="s", ms=8,
            linestyle="", capsize=3,
        )  # fmt: skip
        left = _mb(score) < x[0] + (x[-1] - x[0]) / 3  # the line falls, so there is room above it and below it
        axes.annotate(
            label(settings), (_mb(score), mine), xytext=(8, 6) if left else (-8, -6), textcoords="offset points",
            ha="left" if left else "right", va="bottom" if left else "top", fontsize=10, color=PALETTE["vermilion"],
        )  # fmt: skip
        axes.set_yscale("log")
        axes.margins(x=0.14, y=0.12)
        axes.set_xlabel(f"MB, cache of {PROMPT + STEPS} tokens")
        axes.set_ylabel("KL, nats (log)")
        axes.set_title("Same bytes: lower is better")
    said = ", ".join(f"{name} {number(a)} MB {number(b)}" for name, a, b in zip(plain, x, y, strict=True))
    return Figure(
        fig,
        f"Points of cache size against KL from full precision over {STEPS} tokens, with standard errors; a line joins "
        f"plain quantisation ({said}). Square: {label(settings)}, {number(_mb(score))} MB, {number(mine)}.",
    )


def _mb(score: Score) -> float:
    return score.bytes / MB


def _kl(score: Score) -> float:
    return float(score.kl.mean())


def _error(score: Score) -> float:
    return standard_error(score.kl)


def _whiskers(y: Sequence[float], spread: Sequence[float]) -> list[list[float]]:
    return [[min(e, 0.9 * v) for v, e in zip(y, spread, strict=True)], list(spread)]  # a log axis has no zero


def error_map(look: Look) -> Figure:
    """Where one head's keys or values are wrong, with the outliers marked."""
    wrong = look.map()
    with style():
        fig, axes = subplots(width=WIDTH, height=3.3)
        top = max(float(wrong.quantile(0.995)), 1e-9)
        image = axes.imshow(wrong.T, aspect="auto", interpolation="nearest", vmin=0, vmax=top)
        if look.outliers:
            token, channel = zip(*look.outliers, strict=True)
            axes.plot(token, channel, linestyle="", marker="s", markersize=3, markerfacecolor="none",
                      markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
        axes.set_xlabel(f"token, the first {len(wrong)}")
        axes.set_ylabel("channel")
        axes.set_title(f"{look.side.capitalize()}: relative error {number(look.error)}")
        fig.colorbar(image, ax=axes, label="absolute error")
    marks = f" {len(look.outliers)} white squares are outliers, restored exactly." if look.outliers else " No outliers."
    return Figure(
        fig,
        f"Map of the error of {look.side}, layer {look.layer}, head {look.head}: {len(wrong)} tokens by "
        f"{wrong.shape[1]} channels. Relative error over the whole prompt {number(look.error)}.{marks}",
    )


def spectrum(look: Look, rank: int) -> Figure:
    """How much of what the codes get wrong a low rank can hold, against white noise."""
    ranks = np.arange(1, len(look.spectrum) + 1)
    at = max(rank, 4) - 1
    with style():
        fig, axes = subplots(width=WIDTH, height=3.3)
        axes.plot(ranks, look.spectrum, "-", marker="o", ms=4, color=PALETTE["blue"], label="residual")
        axes.plot(ranks, look.noise, "--", color=PALETTE["grey"], label="white noise")
        axes.axvline(at + 1, color=PALETTE["grey"], linewidth=1, linestyle=":")
        axes.set_ylim(0, 1)
        axes.set_xticks(range(2, len(ranks) + 1, 2))
        axes.set_xlabel("rank")
        axes.set_ylabel("share of the residual's energy")
        axes.set_title(f"Rank {at + 1} holds {look.spectrum[at]:.0%}; of noise {look.noise[at]:.0%}")
        axes.legend(loc="upper left")
    return Figure(
        fig,
        f"Lines of the share of energy in the best low rank, for what the codes of these {look.side} get wrong and for "
        f"white noise of the same shape: {number(look.spectrum[at])} and {number(look.noise[at])} at rank {at + 1}.",
    )


def growth(settings: Settings, rival: str | None = None) -> Figure:
    """Bytes while tokens are generated: the buffer fills, then becomes a segment."""
    lines = {label(settings): weigh(settings.config).growth}
    if rival is not None and PLAIN[rival] != settings.config:
        lines[rival] = weigh(PLAIN[rival]).growth
    tokens = [t for t, _ in lines[label(settings)]]
    dense = [dense_bytes(t) / MB for t in tokens]
    with style():
        fig, axes = subplots(width=WIDTH, height=3.0)
        axes.plot(tokens, dense, ":", color=PALETTE["black"], label="16 bits")
        looks = (("vermilion", "-"), ("grey", "--"))
        for (name, of), (colour, dash) in zip(lines.items(), looks, strict=False):
            axes.plot(tokens, [b / MB for _, b in of], dash, color=PALETTE[colour], label=name)
        axes.set_ylim(0, 1.05 * dense[-1])
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("MB")
        last = lines[label(settings)][-1][1] / MB
        axes.set_title(f"At {tokens[-1]} tokens: {last:.1f} of {dense[-1]:.1f} MB")
        fig.legend(loc="outside lower center", ncols=3, columnspacing=1)
    said = "; ".join(f"{name} {number(of[-1][1] / MB)} MB" for name, of in lines.items())
    return Figure(
        fig,
        f"Lines of the cache's bytes from {tokens[0]} to {tokens[-1]} tokens: a buffer fills in 32 bits and is then "
        f"compressed, which makes the teeth. At the end 16 bits {number(dense[-1])} MB; {said}.",
    )


def quality(settings: Settings, score: Score, rival: Rival) -> list[tuple[str, str, str]]:
    """Bits, bytes and distance from full precision, beside the plain setting."""
    pairs = (score, rival.score)
    return [
        ("bits per compressed element", *(f"{s.bits:.2f}" for s in pairs)),
        (f"MB at {PROMPT + STEPS} tokens", *(f"{s.bytes / MB:.2f}" for s in pairs)),
        ("KL, nats", *(f"{number(_kl(s))} ± {number(_error(s))}" for s in pairs)),
        ("same most likely token", *(f"{float(s.agree.float().mean()):.1%}" for s in pairs)),
    ]


def verdict(settings: Settings, score: Score, rival: Rival) -> str:
    """Who is closer to full precision, said only where bytes and standard errors allow it."""
    name, theirs = label(settings), rival.name
    if PLAIN[theirs] == settings.config:
        return f"This is plain quantisation itself: KL {number(_kl(score))}."
    us, them = (f"KL {number(_kl(x))} with {_mb(x):.2f} MB" for x in (score, rival.score))
    said = f"{name} {us}; {theirs} {them}."
    if not rival.clear:
        return f"Same bytes: no clear winner, the difference is within two standard errors. {said}"
    if rival.difference > 0 and rival.score.bytes <= score.bytes:
        return f"Same bytes: {theirs} wins, closer with no more bytes. {said}"
    if rival.difference < 0 and score.bytes <= rival.score.bytes:
        return f"Same bytes: {name} wins, closer with no more bytes. {said}"
    return f"Same bytes: no fair winner, {name if rival.difference < 0 else theirs} is closer but larger. {said}"


def answers(result: Result) -> list[tuple[str, str, str]]:
    """Where the answers part."""
    at, all_of = result.divergence, len(result.full.ids)
    if at is None:
        return [("tokens alike", f"all {all_of}", f"all {all_of}")]
    return [
        ("tokens alike", f"{at} of {all_of}", f"{at} of {len(result.compressed.ids)}"),
        (f"token {at + 1}, the first that differs", *map(_printable, _firsts(result))),
    ]


def _firsts(result: Result) -> Iterable[str]:
    return (side.pieces[1] for side in (result.full, result.compressed))


def visible(token: str) -> str:
    """A token with white space and control characters that can be seen."""
    if token.isspace():
        token = token.replace(" ", "␣")
    return "".join(c if c.isprintable() else "�" for c in token.replace("\n", "↵").replace("\t", "⇥"))


def _printable(token: str) -> str:
    return f'"{visible(token)}"' if token else "(the answer ends)"


def size_sentence(settings: Settings) -> str:
    """Size of a setting before it is run."""
    weight = weigh(settings.config)
    return (
        f"{label(settings)}: {weight.bits:.2f} bits per compressed element, {weight.ratio:.1f}× smaller than 16 bits."
    )

"""AdaShift's pictures: pure functions from numbers to a figure with its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.patches import Rectangle

from zq_lib.adashift.counterexamples import Array, critical_delta
from zq_lib.adashift.factors import Factors
from zq_lib.adashift.window import place
from zq_lib.core.figures import PALETTE, Figure, number, style, subplots
from zq_lib.core.lab import Row

# colour, line and marker of an optimiser by the first word of its name; what is not here takes the others in turn
OPTIMISERS = {
    "Adam": ("vermilion", "--", "s"),
    "AMSGrad": ("orange", "-.", "^"),
    "AdaShift": ("blue", "-", "o"),
    "SGD": ("grey", ":", "x"),
}
OTHERS = (("green", (0, (5, 1)), "v"), ("sky", (0, (3, 1, 1, 1)), "D"), ("purple", (0, (1, 1)), "P"),
          ("black", (0, (1, 2)), "d"))  # fmt: skip
POINTS = 400  # of a line; a screen shows no more


def trajectories(paths: Mapping[str, Array], title: str = "") -> Figure:
    """theta over steps for some optimisers: name -> [T, lanes], drawn as the mean of the lanes and a band from the
    smallest to the largest. The right way is down."""
    ends = {name: np.asarray(of)[-1] for name, of in paths.items()}
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        axes.axhline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
        for (name, of), (colour, line, _) in zip(paths.items(), _looks(paths), strict=True):
            of = np.asarray(of)
            kept = np.unique(np.linspace(0, len(of) - 1, min(POINTS, len(of))).astype(int))
            some = of[kept]
            axes.plot(kept + 1, some.mean(1), linestyle=line, color=PALETTE[colour], label=name)
            if of.shape[1] > 1:
                axes.fill_between(kept + 1, some.min(1), some.max(1), color=PALETTE[colour], alpha=0.2, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel("theta, to be decreased")
        axes.legend()
        wrong = [name for name, end in ends.items() if end.mean() > 0]
        axes.set_title(title or (f"The wrong way: {', '.join(wrong)}" if wrong else "All walk the right way"))
    said = "; ".join(f"{name} {_ends(end)}" for name, end in ends.items())
    return Figure(fig, f"Lines of theta over {max(map(len, paths.values()))} steps, down is right, ending at: {said}.")


def _ends(end: Array) -> str:
    text = f"{end.mean():+.3g}"
    return f"{text} ({end.min():+.3g} to {end.max():+.3g} in {len(end)} runs)" if len(end) > 1 else text


def update_factors(found: Mapping[str, Factors], title: str = "") -> Figure:
    """Pairs of bars, logarithmic: the mean net update factor k of the large and of the small gradients, per rule."""
    at = np.arange(len(found))
    with style():
        fig, axes = subplots(width=7.5, height=3.8)
        for key, name, colour, hatch, shift in (
            ("large", "k(C)", "blue", "", -0.2), ("small", "k(-1)", "orange", "//", 0.2)
        ):  # fmt: skip
            values = [getattr(f, key) for f in found.values()]
            bars = axes.bar(
                at + shift, values, 0.38, color=PALETTE[colour], edgecolor="white", hatch=hatch, label=name
            )  # fmt: skip
            axes.bar_label(bars, [number(v) for v in values], fontsize=10)
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.set_xticks(at, list(found))
        axes.set_ylabel("net update factor k / lr")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        worst = max(found, key=lambda name: abs(np.log(found[name].ratio)))
        axes.set_title(title or f"{worst} gives the large gradient {number(found[worst].ratio)} of the small one's k")
    said = "; ".join(
        f"{name} {number(f.large)} and {number(f.small)}, ratio {number(f.ratio)}, drift {f.drift:+.3g}"
        for name, f in found.items()
    )
    return Figure(
        fig, f"Pairs of bars of the mean net update factors of C and of -1, logarithmic, with drift per step: {said}."
    )  # fmt: skip


def boundary(rows: Sequence[Row], beta2: float, optimiser: str = "Adam", title: str = "") -> Figure:
    """Where an optimiser walks the wrong way: rows with `C`, `delta` and `drift` of theta per step, beside the line
    delta_c = (1 - beta2) C / 2."""
    wrong, right = [r for r in rows if r["drift"] > 0], [r for r in rows if r["drift"] <= 0]
    largest = max(r["C"] for r in rows)
    with style():
        fig, axes = subplots(width=7.0, height=4.2)
        for of, name, colour, marker in (
            (wrong, "wrong way", "vermilion", "^"), (right, "right way", "blue", "v")
        ):  # fmt: skip
            axes.plot([r["C"] for r in of], [r["delta"] for r in of], marker, color=PALETTE[colour], label=name)
        line = np.array([0.0, 1.05 * largest])
        axes.plot(line, critical_delta(1.0, beta2) * line, "-", color=PALETTE["black"], label="delta_c")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size C of the rare gradient")
        axes.set_ylabel("mean gradient delta")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        agreed = sum((r["drift"] > 0) == (r["delta"] < critical_delta(r["C"], beta2)) for r in rows)
        axes.set_title(title or f"delta_c tells {optimiser}'s way in {agreed} of {len(rows)} problems")
    return Figure(
        fig,
        f"Points in the plane of C and delta at beta2 {number(beta2)}: {optimiser} walks the wrong way in {len(wrong)} "
        f"of {len(rows)}; the line delta_c, {number(critical_delta(largest, beta2))} at C {number(largest)}, is on the "
        f"right side of {agreed}.",
    )


def ring(n: int = 3, steps: int = 8) -> Figure:
    """The ring of n gradients over time: a column per step, a row per slot, the slot that is taken over outlined."""
    kept = [[""] * n for _ in range(steps)]
    for t in range(1, steps + 1):
        kept[t - 1] = list(kept[t - 2]) if t > 1 else [""] * n
        kept[t - 1][place(t, n)] = f"g{t}"
    with style():
        fig, axes = subplots(width=0.85 * steps + 1.6, height=0.55 * n + 1.9)
        for column, slots in enumerate(kept):
            for slot, name in enumerate(slots):
                new = slot == place(column + 1, n)
                face, edge = (PALETTE["sky"], 2.5) if new else ("white", 0.8)
                corner = (column - 0.45, slot - 0.4)
                axes.add_patch(Rectangle(corner, 0.9, 0.8, facecolor=face, edgecolor=PALETTE["black"], linewidth=edge))
                axes.annotate(name, (column, slot), ha="center", va="center")
            gone = f"g{column + 1 - n}" if column >= n else "–"
            axes.annotate(gone, (column, n), ha="center", va="center", color=PALETTE["vermilion"])
        axes.set_xlim(-0.6, steps - 0.4)
        axes.set_ylim(n + 0.5, -0.6)
        axes.set_xticks(range(steps), [str(t) for t in range(1, steps + 1)])
        axes.set_yticks(range(n + 1), [*(f"slot {i}" for i in range(n)), "goes to v"])
        axes.tick_params(length=0)
        axes.set_xlabel("step t")
        axes.set_title(f"Step t takes over slot (t - 1) mod {n}, and what it finds there goes to v")
    last = steps - n
    return Figure(
        fig,
        f"A table of {n} slots over {steps} steps: g_t is written to slot (t - 1) mod {n}; nothing goes to v until "
        f"step {n}, then g_1 at step {n + 1} and so on" + (f", g_{last} at step {steps}." if last > 0 else "."),
    )


def training(rows: Sequence[Row], column: str = "loss", x: str = "epoch", title: str = "") -> Figure:
    """Training curves: rows with `optimizer`, `x` and `column`, and if there are several seeds `low` and `high`. A
    column whose name holds "accuracy" is better when larger; the others are drawn on a logarithmic axis."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["optimizer"], []).append(row)
    rises = "accuracy" in column
    with style():
        fig, axes = subplots(width=7.5, height=4.0)
        for (name, of), (colour, line, marker) in zip(lines.items(), _looks(lines), strict=True):
            steps = [r[x] for r in of]
            axes.plot(
                steps, [r[column] for r in of], linestyle=line, marker=marker, markevery=max(1, len(of) // 8), ms=5,
                color=PALETTE[colour], label=name,
            )  # fmt: skip
            if all("low" in r for r in of):
                axes.fill_between(steps, [r["low"] for r in of], [r["high"] for r in of], color=PALETTE[colour],
                                  alpha=0.15, linewidth=0)  # fmt: skip
        if not rises:
            axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(column)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        ends = {name: of[-1] for name, of in lines.items()}
        best = (max if rises else min)(ends, key=lambda name: ends[name][column])
        axes.set_title(title or f"{best} ends {'highest' if rises else 'lowest'}{_noise(ends, best)}")
    said = "; ".join(f"{name} {_with_interval(end, column)}" for name, end in ends.items())
    return Figure(fig, f"Lines of {column} over {x}s to {rows[-1][x]}, ending at: {said}.")


def _noise(ends: Mapping[str, Row], best: str) -> str:
    """Whether another one's interval holds what the best has."""
    own = ends[best]
    if not all("low" in r for r in ends.values()):
        return ""
    near = sum(r["low"] <= own["high"] and own["low"] <= r["high"] for r in ends.values())
    return f", {near - 1} of {len(ends) - 1} others inside its interval" if near > 1 else ""


def _with_interval(row: Row, column: str) -> str:
    text = number(float(row[column]))
    return f"{text} ({number(float(row['low']))} to {number(float(row['high']))})" if "low" in row else text


def costs(rows: Sequence[Row], title: str = "") -> Figure:
    """Time of a step beside memory: rows with `optimizer`, `ms` and `bytes` of state per parameter."""
    at = np.arange(len(rows))[::-1]
    with style():
        fig, both = subplots(1, 2, width=9.0, height=0.5 * len(rows) + 1.4)
        for axes, key, label, colour, hatch in (
            (both[0], "ms", "ms per step", "blue", ""),
            (both[1], "bytes", "bytes of state per parameter", "orange", "//"),
        ):  # fmt: skip
            values = [float(r[key]) for r in rows]
            axes.barh(at, values, 0.6, color=PALETTE[colour], edgecolor="white", hatch=hatch)
            for y, v in zip(at, values, strict=True):
                axes.annotate(f" {number(v)}", (v, y), va="center", fontsize=10)
            axes.margins(x=0.2)
            axes.set_xlabel(label)
            axes.set_yticks(at, [str(r["optimizer"]) for r in rows] if key == "ms" else [])
        fastest, smallest = min(rows, key=lambda r: r["ms"]), min(rows, key=lambda r: r["bytes"])
        both[0].set_title(title or f"{fastest['optimizer']} is fastest{' and smallest' if fastest is smallest else ''}")
    said = "; ".join(
        f"{r['optimizer']} {number(float(r['ms']))} ms and {number(float(r['bytes']))} bytes" for r in rows
    )
    return Figure(fig, f"Two sets of bars, time of a step and state per parameter: {said}.")


def survival(rows: Sequence[Row], title: str = "") -> Figure:
    """What becomes of the identity: rows with `eps`, `case`, `survived` runs of `runs`, and their mean `accuracy` or
    None; a grid of eps by case."""
    epsilons, names = sorted({r["eps"] for r in rows}), list(dict.fromkeys(r["case"] for r in rows))
    found = {(r["eps"], r["case"]): r for r in rows}
    share = np.full((len(epsilons), len(names)), np.nan)
    with style():
        fig, axes = subplots(width=1.6 * len(names) + 2.0, height=0.55 * len(epsilons) + 1.7)
        for (eps, name), r in found.items():
            i, j = epsilons.index(eps), names.index(name)
            share[i, j] = r["survived"] / r["runs"]
            text = f"{r['survived']} / {r['runs']}"
            if r["accuracy"] is not None:
                text += f"\n{number(r['accuracy'])}"
            axes.annotate(text, (j, i), ha="center", va="center", color="white" if share[i, j] < 0.5 else "black")
        axes.imshow(share, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(epsilons)), [f"{eps:.0e}" for eps in epsilons])
        axes.set_ylabel("eps")
        safe = [eps for i, eps in enumerate(epsilons) if np.nanmin(share[i:]) == 1]
        finding = f"Every run survives from eps = {min(safe):.0e}" if safe else "Some runs always diverge"
        axes.set_title(title or finding)
    said = "; ".join(f"eps {r['eps']:.0e} {r['case']} {_survived(r)}" for r in rows)
    return Figure(fig, f"A grid of runs that stay finite and learn, eps by case: {said}.")


def _survived(row: Row) -> str:
    accuracy = "" if row["accuracy"] is None else f" at {number(row['accuracy'])}"
    return f"{row['survived']} of {row['runs']}{accuracy}"


def _looks(lines: Mapping[str, object]) -> list[tuple]:
    """A look for each line: that of its name's first word once, or one of those that are left in turn."""
    unused = dict(OPTIMISERS)
    found = [unused.pop(name.split()[0], None) for name in lines]
    spare = iter([*OTHERS, *unused.values()] * len(found))
    return [look or next(spare) for look in found]

"""The AdaShift page's three parts by name: what each shows of a result, as HTML. Nothing of gradio."""

from __future__ import annotations

from collections.abc import Sequence

from apps import adashift_figures as figures
from apps.adashift_run import HandResult, Result, TrainingResult, WalkResult
from apps.adashift_settings import RATE
from zq_lib.adashift.counterexamples import ADASHIFT
from zq_lib.ui import pieces

SEEN = {
    "walk": ("mark", "paths", "factors", "verdict", "table"),
    "hand": ("words", "table", "spent", "factors"),
    "digits": ("losses", "accuracy", "verdict", "table"),
}
FIRST_STEP = 4  # at which the calculation by hand opens
BEGUN = "The curves come with the first epoch."


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str], caption: str) -> str:
    """A table of many columns: on a telephone it scrolls and does not widen the page."""
    return f'<div style="contain: inline-size">{pieces.table(rows, headers, caption)}</div>'


def walk(result: WalkResult) -> dict[str, str]:
    """Where everybody goes, and why."""
    return {
        "mark": figures.mark(result.settings),
        "paths": pieces.picture(figures.paths(result)),
        "factors": pieces.picture(figures.factors(result)),
        "verdict": pieces.paragraph(figures.walk_verdict(result)),
        "table": _table(
            figures.walk_rows(result),
            ("rule", "theta", "lowest to highest", "runs below 0", "k, g > 0", "k, g < 0", "ratio"),
            f"theta at the end, and mean net update factors k per unit of the rate {RATE:g}, which SGD divides by the "
            "gradients' root mean square",
        ),
    }


def hand(result: HandResult, step: int | None = None) -> dict[str, str]:
    """The calculation up to a step."""
    step = min(step or FIRST_STEP, len(result.rows))
    s = result.settings
    seen = "g_(t−n), into v" if s.rule == ADASHIFT else "g_t, into v"
    holds = "; r_t holds the correction of m_t" if s.rule != ADASHIFT and s.beta1 else ""
    return {
        "words": pieces.paragraph(figures.hand_words(result, step)),
        "table": _table(
            figures.hand_rows(result, step), ("t", "g_t", seen, "v_t", "m_t", "r_t", "step", "theta"),
            f"{s.rule} with rate 1: the step is −r_t m_t{holds}",
        ),
        "spent": pieces.picture(figures.spent(result, step)),
        "factors": _table(
            figures.factor_rows(result, step), ("gradient", "k so far", "moved theta", "k in the end"),
            f"Net update factors after step {step}",
        ),
    }  # fmt: skip


def digits(result: TrainingResult) -> dict[str, str]:
    """The training as far as it came."""
    if not result.curves:
        return {"losses": "", "accuracy": "", "verdict": pieces.paragraph(BEGUN), "table": ""}
    return {
        "losses": pieces.picture(figures.losses(result)),
        "accuracy": pieces.picture(figures.accuracy(result)),
        "verdict": pieces.paragraph(figures.training_verdict(result)),
        "table": _table(
            figures.training_rows(result), ("optimiser", "rate", "epochs", "loss", "largest loss", "right, %"),
            "Loss is the last epoch's mean; the largest one is of a single batch; right are test digits",
        ),
    }  # fmt: skip


PARTS = {"walk": walk, "hand": hand, "digits": digits}


def everything(part: str, result: Result) -> list[str]:
    """All of the part's SEEN."""
    found = PARTS[part](result)
    return [found[name] for name in SEEN[part]]

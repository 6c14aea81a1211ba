"""The MASFormer page's parts by name: what follows from the plan alone, and what a run adds."""

from __future__ import annotations

from functools import lru_cache
from html import escape

from apps import masformer_figures as figures
from apps.masformer_run import Result
from apps.masformer_settings import Settings, price
from zq_lib.ui import pieces

PLANNED = ("masks", "cone", "left", "price", "sentence", "code")
ASKED = ("digits", "verdict", "full", "plan", "measured")
SEEN = (*PLANNED, *ASKED)
WRITES = {"full": "Full attention answers", "plan": "The plan answers"}
BOX = (
    "border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .4rem .8rem; "
    "background: var(--block-background-fill)"
)


def everything(result: Result) -> dict[str, str]:
    """All of SEEN."""
    return {**planned(result.settings), **asked(result)}


def planned(settings: Settings) -> dict[str, str]:
    """What follows from the controls without the model."""
    s = settings
    return {**_priced(Settings(s.full, s.window, s.kind, s.sinks, s.length)), "code": s.python()}


@lru_cache(maxsize=64)
def _priced(settings: Settings) -> dict[str, str]:
    """What does not depend on document and code."""
    counted = price(settings.plan, settings.length)
    return {
        "masks": pieces.picture(figures.masks(settings)),
        "cone": pieces.picture(figures.cone(settings, counted)),
        "left": pieces.picture(figures.left(settings, counted)),
        "price": pieces.table(
            figures.price_rows(counted), ("count", "full attention", settings.label, "times less"),
            f"Counted for a text of {settings.length} tokens",
        ),
        "sentence": pieces.paragraph(figures.price_sentence(settings, counted)),
    }  # fmt: skip


def asked(result: Result) -> dict[str, str]:
    """What a run gives."""
    return {
        "digits": pieces.picture(figures.digits(result)),
        "verdict": pieces.paragraph(figures.verdict(result)),
        **{side: _box(side, getattr(result, side).answer) for side in WRITES},
        "measured": pieces.table(
            figures.run_rows(result), ("measure", "full attention", result.settings.label),
            f"Measured on this document, {result.tokens} tokens",
        ),
    }  # fmt: skip


def _box(side: str, answer: str) -> str:
    """An answer in a frame, as text whatever it contains."""
    return (
        f'<section aria-label="{WRITES[side]}" style="{BOX}"><strong>{WRITES[side]}</strong>'
        f'<p style="white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0">{escape(answer)}</p></section>'
    )

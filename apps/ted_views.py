"""The TED page's three parts by name: what each shows of a result, as HTML. Nothing of gradio."""

from __future__ import annotations

from apps import ted_figures as figures
from apps.ted_run import DigitsResult, QuestionResult, Result, TrainingResult
from zq_lib.ui import pieces

SEEN = {
    "digits": ("pair", "said", "verdict", "kept", "widths"),
    "training": ("terms", "curves", "verdict", "outcome", "table"),
    "sentences": ("answers", "layers", "verdict", "table"),
}
PLACES = ("said", "verdict", "kept", "widths")  # what depends on the chosen width and layer
ALL_TRAINED = "The comparison comes when all students have been trained."


def digits(result: DigitsResult) -> dict[str, str]:
    """A pair, what is read of it, and what filters keep in general."""
    return {"pair": pieces.picture(figures.pair(result)), **look(result, result.settings.dim, result.settings.layer)}


def look(result: DigitsResult, dim: int, layer: int) -> dict[str, str]:
    """What depends on the place that is looked at: PLACES."""
    return {
        "said": pieces.picture(figures.said(result, dim, layer)),
        "verdict": pieces.paragraph(figures.digits_verdict(result, dim, layer)),
        "kept": pieces.picture(figures.kept(result, dim, layer)),
        "widths": pieces.picture(figures.widths(result, layer)),
    }


def training(result: TrainingResult) -> dict[str, str]:
    """A distillation as far as it came; the comparison once all students are there."""
    return {
        "terms": pieces.picture(figures.terms(result)),
        "curves": pieces.picture(figures.curves(result)),
        "verdict": pieces.paragraph(figures.training_verdict(result) if result.complete else ALL_TRAINED),
        "outcome": pieces.picture(figures.outcome(result)),
        "table": pieces.table(
            figures.outcome_rows(result), ("model", "right, %", "gap closed, %"),
            "Test pairs: right answers, and how much of the way from start to teacher",
        ),
    }  # fmt: skip


def sentences(result: QuestionResult) -> dict[str, str]:
    """A question, and what everybody says to it."""
    return {
        "answers": pieces.picture(figures.answers(result)),
        "layers": pieces.picture(figures.layers(result)),
        "verdict": pieces.paragraph(figures.sentences_verdict(result)),
        "table": pieces.table(
            figures.answer_rows(result), ("model", "answer", "sure, %", "in test, %"),
            f"“{result.settings.question}”",
        ),
    }  # fmt: skip


PARTS = {"digits": digits, "training": training, "sentences": sentences}


def everything(part: str, result: Result) -> list[str]:
    """All of the part's SEEN."""
    found = PARTS[part](result)
    return [found[name] for name in SEEN[part]]

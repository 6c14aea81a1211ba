"""The LoSparse page's three parts by name: what each shows of a result, as HTML. Nothing of gradio."""

from __future__ import annotations

from apps import losparse_figures as figures
from apps.losparse_run import LanguageResult, MatrixResult, Result, TrainingResult
from zq_lib.ui import pieces

SEEN = {
    "matrix": ("verdict", "parts", "spectrum", "errors", "gains", "sizes", "timing"),
    "training": ("map", "share", "verdict", "outcome", "losses", "table", "answers"),
    "language": ("verdict", "texts", "survivors", "numbers"),
}
UNTIMED = "Press “Time this layer” to measure it here."
ALL_TRAINED = "The comparison comes when all ways have been trained."


def matrix(result: MatrixResult) -> dict[str, str]:
    """One matrix in parts, its error and its speed."""
    timed = bool(result.timing)
    return {
        "verdict": pieces.paragraph(figures.matrix_verdict(result)),
        "parts": pieces.picture(figures.parts(result)),
        "spectrum": pieces.picture(figures.spectrum(result)),
        "errors": pieces.picture(figures.errors(result)),
        "gains": pieces.picture(figures.gains(result)) if timed else pieces.paragraph(UNTIMED),
        "sizes": pieces.table(
            figures.size_rows(result), ("way", "rank", "rows", "numbers", "error"),
            f"{result.outputs} × {result.inputs}, and three ways to one size; error is relative and squared",
        ),
        "timing": pieces.table(
            figures.timing_rows(result), ("a call with", "dense, ms", "shrunk, ms", "times as fast"),
            "Measured on one machine, in processor time",
        ) if timed else "",
    }  # fmt: skip


def training(result: TrainingResult) -> dict[str, str]:
    """A pruning run as far as it came; the comparison once all ways are there."""
    done = len(result.rows) == len(figures.WAYS)
    return {
        **look(result, len(result.steps)),
        "verdict": pieces.paragraph(figures.training_verdict(result) if done else ALL_TRAINED),
        "outcome": pieces.picture(figures.outcome(result)) if result.rows else "",
        "losses": pieces.picture(figures.losses(result)),
        "table": pieces.table(
            figures.outcome_rows(result), ("way", "left, %", "rate", "loss", "right, %"),
            "Test questions: weights left, learning rate, loss and right answers",
        ),
        "answers": pieces.table(
            figures.answer_rows(result), ("question", "before: dense", "after: LoSparse"), "The kind of answer it wants"
        ) if result.answers else "",
    }  # fmt: skip


def look(result: TrainingResult, event: int) -> dict[str, str]:
    """The map after some masks, and where that is on p(t)."""
    pair = {"map": figures.density, "share": figures.share}
    return {name: pieces.picture(draw(result, int(event))) for name, draw in pair.items()}


def language(result: LanguageResult) -> dict[str, str]:
    """What the compressed model writes, and what it costs."""
    label, prompt = result.settings.label, result.settings.prompt
    written = [("dense", prompt + result.dense.text), (label, prompt + result.ours.text)]
    return {
        "verdict": pieces.paragraph(figures.language_verdict(result)),
        "texts": pieces.table(written, ("model", "goes on with your beginning"), "What both write"),
        "survivors": pieces.picture(figures.survivors(result)),
        "numbers": pieces.table(figures.language_rows(result), ("measured", "dense", label), "Before and after"),
    }


PARTS = {"matrix": matrix, "training": training, "language": language}


def everything(part: str, result: Result) -> list[str]:
    """All of the part's SEEN."""
    found = PARTS[part](result)
    return [found[name] for name in SEEN[part]]

"""What the AdaLoRA page says about a result, part by part: pictures, tables and links as HTML. Nothing of gradio."""

from __future__ import annotations

import base64
from typing import Any

from apps import adalora_figures as figures
from apps import adalora_run as run
from apps.adalora_run import Moment, Result
from apps.adalora_settings import KINDS, names
from zq_lib.adalora import lab
from zq_lib.ui import pieces

LATER = "The comparison comes when all methods have been trained."
NOT_YET = "Train once, and the adapter itself can be downloaded as well."
DATA = {"zip": "application/zip", "npz": "application/octet-stream"}
LABELS = {
    "peft_lora.zip": "PEFT LoRA adapter (.zip)",
    "peft_adalora.zip": "PEFT AdaLoRA adapter (.zip)",
    "trace.npz": "Rank trace (trace.npz)",
}
LINK = (
    "display: inline-block; margin: .2rem .4rem .2rem 0; padding: .35rem .8rem; border-radius: 6px; "
    "border: 1px solid var(--button-secondary-border-color)"
)
COMPARED = ("bars", "table", "found", "precision", "files")


def news(moment: Moment, layer: int, kind: str, draw: bool) -> dict[str, Any]:
    """What a moment adds to the page; costly pictures of a training only where `draw` says so."""
    result, method = moment.result, moment.result.rows[-1]["method"] if moment.result.rows else None
    curves = {"budget": figures.budget, "losses": lambda r, _: figures.losses(r)}
    if moment.news == "begun":
        empty = dict.fromkeys(COMPARED, "")
        return {**training(result, layer, kind), **empty, "verdict": pieces.paragraph(LATER)}
    if moment.news == "row":
        after = {**training(result, layer, kind), "files": files(moment.files)} if method == lab.ADALORA else {}
        return after | compared(result)
    now = {"map": figures.theatre(result)} if moment.news == "cut" else {}
    if draw and method is None:
        now |= {name: pieces.picture(made(result, result.events)) for name, made in curves.items()}
    return now


def everything(result: Result, layer: int, kind: str) -> dict[str, Any]:
    """Everything of a stored result."""
    links = files({"trace.npz": run.trace_file(result.trace)}) + pieces.paragraph(NOT_YET)
    return {**training(result, layer, kind), **compared(result), "files": links}


def training(result: Result, layer: int, kind: str) -> dict[str, Any]:
    """The map, the curves, one matrix and the program."""
    pictures = zip(("budget", "values", "scores"), look(result, result.events, layer, kind), strict=True)
    return {
        "map": figures.theatre(result),
        "losses": pieces.picture(figures.losses(result)),
        "code": result.settings.python(),
        **dict(pictures),
    }


def compared(result: Result) -> dict[str, Any]:
    """Errors so far; the verdict once all rivals are there."""
    parts = {
        "bars": pieces.picture(figures.bars(result)),
        "table": pieces.table(
            figures.table(result), figures.table_head(result.settings), "At the same final budget, and LoRA uncut"
        ),
        "found": pieces.table(figures.found(result), ("matrix", "hidden", "found"), "Ranks of the matrices"),
        "precision": pieces.paragraph(figures.precision(result)),
    }
    if result.row(lab.CUT):
        parts["verdict"] = pieces.paragraph(figures.verdict(result))
    return parts


def look(shown: Result, event: int, layer: int, kind: str) -> list[str]:
    """Where an allocation is on the budget, and one matrix's triplets."""
    every = names(shown.settings.problem)
    matrix = every[min(int(layer) * len(KINDS), len(every) - len(KINDS)) + list(KINDS).index(kind)]
    made = [figures.budget(shown, int(event))]
    made += [draw(shown, matrix, int(event)) for draw in (figures.values, figures.scores)]
    return [pieces.picture(figure) for figure in made]


def files(contents: dict[str, bytes]) -> str:
    """Links that carry their files, so that nothing is left on the server's disk."""
    links = [
        f'<a style="{LINK}" download="adalora_{name}" '
        f'href="data:{DATA[name.rpartition(".")[2]]};base64,{base64.b64encode(content).decode()}">{LABELS[name]}</a>'
        for name, content in contents.items()
    ]
    return f"<p><strong>Download</strong></p>{''.join(links)}"

"""Slides from the cells of a notebook, by their slideshow metadata.

    python -m zq_lib.nb.slides notebooks/01_pasta.ipynb pasta.html

A cell with `slide` or `subslide` opens a slide, `-` and `fragment` continue it, `skip` and `notes` leave the cell out.
"""

from __future__ import annotations

import argparse
import base64
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbconvert.exporters import SlidesExporter
from nbformat import NotebookNode

from zq_lib.core.figures import markup
from zq_lib.nb.canonical import WIDGET_VIEW

MOST, FEWEST, CODE_LINES = 25, 12, 12  # slides per notebook, and lines of code that can be read from the last row


def slides(nb: NotebookNode) -> list[list[NotebookNode]]:
    """The cells of each slide, stacked slides counted one by one, as the exporter splits them."""
    found: list[list[NotebookNode]] = []
    for cell in nb.cells:
        kind = _kind(cell)
        if kind in ("skip", "notes"):
            continue
        if kind in ("slide", "subslide") or not found:
            found.append([])
        found[-1].append(cell)
    return found


def code_lines(slide: list[NotebookNode]) -> int:
    """Lines of code on a slide, blank ones included."""
    return sum(len(cell.source.splitlines()) for cell in slide if cell.cell_type == "code")


def problems(nb: NotebookNode) -> list[str]:
    """Why the notebook would not make a good set of slides; empty if it does."""
    found, deck = [], slides(nb)
    if not FEWEST <= len(deck) <= MOST:
        found.append(f"{len(deck)} slides, expected {FEWEST} to {MOST}")
    for i, slide in enumerate(deck, 1):
        if code_lines(slide) > CODE_LINES:
            title = slide[0].source.strip().split("\n")[0]
            found.append(f"slide {i} ({title!r}) has {code_lines(slide)} lines of code, at most {CODE_LINES}")
    return found


def export(nb: NotebookNode, title: str) -> str:
    """The slides as one HTML page. Pictures carry their descriptions; widgets are shown as their stored picture."""
    nb = copy.deepcopy(nb)
    nb.metadata.pop("widgets", None)
    nb.metadata.title = title
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                # The exporter's template drops alternative texts, so the picture goes in as HTML.
                page = markup(base64.b64decode(data.pop("image/png")), alt)
                shown_below = WIDGET_VIEW not in data  # `show` puts its caption in the next output
                data["text/html"] = page.split("<figcaption>")[0] + "</figure>" if shown_below else page
            data.pop(WIDGET_VIEW, None)
    return SlidesExporter().from_notebook_node(nb)[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zq_lib.nb.slides", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    nb = nbformat.read(arguments.notebook, as_version=4)
    arguments.out.write_text(export(nb, arguments.notebook.stem), encoding="utf-8")
    print(f"{arguments.out}: {len(slides(nb))} slides")
    return 0


def _kind(cell: NotebookNode) -> str:
    return cell.metadata.get("slideshow", {}).get("slide_type", "-")


if __name__ == "__main__":
    sys.exit(main())

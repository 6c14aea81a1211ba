"""The frame that all demos share: claim above, controls left, result right, explanation and code below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import gradio as gr

from zq_lib.registry import METHODS, Method
from zq_lib.ui.pieces import paragraph


@dataclass(frozen=True)
class Frame:
    """The two columns and the places below them. Use `controls` and `result` as context managers."""

    controls: gr.Column
    result: gr.Column
    numbers: gr.Column
    code: gr.Code


@contextmanager
def page(slug: str, claim: str, about: Sequence[str], code: str) -> Iterator[tuple[gr.Blocks, Frame]]:
    """A page for the method `slug`. `claim` is one sentence, `about` says what one is looking at, `code` is Python.

    with page("pasta", "…", ["…"], "…") as (blocks, frame):
        with frame.controls:
            ...
    """
    method = METHODS[slug]
    with gr.Blocks(title=f"{method.title} · zq_lib", analytics_enabled=False) as blocks:
        header(method, claim)
        with gr.Row(equal_height=False):
            controls = gr.Column(scale=5, min_width=320)
            result = gr.Column(scale=8, min_width=320)
        numbers = gr.Column()
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                gr.Markdown("## What am I looking at?\n\n" + " ".join(about))
                gr.Markdown(
                    f"## Open in the notebook\n\nThe same library, step by step, in `{method.notebook}`. "
                    "In a clone of the repository, `make lab` opens JupyterLab; then choose that file.\n\n"
                    f"Paper: {method.paper}, arXiv {method.arxiv}."
                )
            with gr.Column(scale=7, min_width=320):
                gr.Markdown("## Copy as Python")
                shown = gr.Code(
                    code,
                    language="python",
                    interactive=False,
                    show_line_numbers=False,
                    label="These settings as a program",
                    elem_classes="zq-code",
                )
        yield blocks, Frame(controls, result, numbers, shown)


def header(method: Method, claim: str) -> None:
    """Title and claim."""
    title = escape(f"{method.title}: {method.asks[0].lower()}{method.asks[1:]}")
    gr.HTML(f"<h1>{title}</h1>{paragraph(claim)}", elem_classes="zq-head")


def note(text: str = "") -> gr.Markdown:
    """A quiet line of the page's own words. Never give it what a user typed."""
    return gr.Markdown(text, elem_classes="zq-note")


def side_by_side(html: str, classes: str | None = None) -> gr.HTML:
    """A piece of a row that takes a line of its own where the window is narrow."""
    with gr.Column(min_width=280):
        return gr.HTML(html, elem_classes=classes)

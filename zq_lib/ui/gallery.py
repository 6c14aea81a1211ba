"""The gallery: a home page with a card for every built method, and a page for each, in one server with one queue."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import gradio as gr

from zq_lib.registry import METHODS, Method, built
from zq_lib.ui import serve


def build(methods: Sequence[Method] | None = None) -> gr.Blocks:
    """Home page and demo pages of `methods`, by default all that are built."""
    methods = built() if methods is None else methods
    with gr.Blocks(title="zq_lib demos", analytics_enabled=False) as home:
        gr.HTML(
            "<h1>zq_lib: methods you can see, change and use</h1>"
            "<p>Each page shows one paper's method on a small model that runs on this machine. "
            "The first result is there before you click.</p>",
            elem_classes="zq-head",
        )
        gr.HTML(f'<div class="zq-cards">{"".join(map(card, methods))}</div>')
        gr.Markdown("To take a method apart step by step, run `make lab` in a clone of the repository.")
    for method in methods:
        with home.route(method.title, f"/{method.slug}"):
            method.load("app").build()  # a Blocks made inside another renders itself there
    return home


def card(method: Method) -> str:
    """What a method does, a picture of its first result, and the link to its page."""
    title = escape(method.title)
    return (
        f'<article class="zq-card"><h2>{title}</h2><p class="asks">{escape(method.asks)}</p>'
        f"{method.load('app').thumbnail()}<p>{escape(method.sentence)}</p>"
        f'<p class="paper">{escape(method.paper)}</p>'
        f'<a class="go" href="{method.slug}">Open the {title} demo</a></article>'
    )


def launch_demo(
    slug: str | None = None, port: int | None = serve.PORT, open_browser: bool = True, share: bool = False
) -> None:
    """Serve one method's demo, or the gallery, until Ctrl+C. Raises ValueError for a method that is not built."""
    available = {m.slug: m for m in built()}
    if slug is not None and slug not in available:
        raise ValueError(f"slug={slug!r} has no demo; choose one of {', '.join(available)}")
    chosen = list(available.values()) if slug is None else [METHODS[slug]]
    serve.in_background(*(m.load("app").warm for m in chosen))
    blocks = build() if slug is None else chosen[0].load("app").build()
    serve.launch(blocks, port=port, open_browser=open_browser, share=share)

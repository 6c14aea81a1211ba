"""Running a demo: the shared language model, one queue, errors as one sentence, and the address it listens on."""

from __future__ import annotations

import argparse
import contextlib
import html
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import models
from zq_lib.ui.theme import CSS, theme

PORT = 7860
QUEUE = 16  # waiting requests; more are turned away with a sentence
# For every event that runs a model: one at a time across all demos of a server.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_LOADING = threading.Lock()
_LOADED: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = []


def language_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model and its tokenizer, loaded once for all demos; a second caller waits for the first."""
    with _LOADING:
        if not _LOADED:
            _LOADED.append(models.load())
        return _LOADED[0]


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn the library's explained errors into a message on the page. Gradio reads messages as HTML, so they are
    escaped."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(html.escape(str(error), quote=False), title="This cannot run", print_exception=False) from error


def launch(
    blocks: gr.Blocks,
    *,
    port: int | None = PORT,
    open_browser: bool = False,
    share: bool = False,
    wait: bool = True,
    host: str = "127.0.0.1",
) -> str:
    """Serve `blocks` and return the address: on this machine only unless `share` or `host` says otherwise.

    `port=None` takes the first free one. With `wait` it returns when the server is stopped.
    """
    blocks.queue(max_size=QUEUE, default_concurrency_limit=4)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=share,
        prevent_thread_lock=True,
        ssr_mode=False,
        quiet=True,
        theme=theme(),
        css=CSS,
        footer_links=["api", "settings"],
        max_file_size="1kb",  # no demo takes files
    )
    if wait:
        print(f"Open {address} (Ctrl+C stops it)", flush=True)
        if blocks.share_url:
            print(f"Public link: {blocks.share_url}", flush=True)
        blocks.block_thread()
    return address


def in_background(*work: Callable[[], object]) -> None:
    """Start slow first loads while the page is already being read; their errors come back on first use."""

    def run() -> None:
        for load in work:
            with contextlib.suppress(ValueError, OSError):
                load()

    threading.Thread(target=run, daemon=True, name="zq-warm").start()


def main(build: Callable[[], gr.Blocks], warm: Callable[[], object], write: Callable[[], object]) -> None:
    """The command line of one app: `python -m apps.<slug> [--port N] [--no-browser] [--share] [--write-first-view]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public link")
    parser.add_argument("--write-first-view", action="store_true", help="run the examples again and store the results")
    given = parser.parse_args()
    if given.write_first_view:
        write()
        return
    in_background(warm)
    launch(build(), port=given.port, open_browser=not given.no_browser, share=given.share)

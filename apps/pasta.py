"""PASTA's demo: mark words, and see what the model says and looks at without and with steering.

`python -m apps.pasta` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log10
from typing import Any

import gradio as gr

from apps import pasta_figures as figures
from apps import pasta_words
from apps.pasta_comparison import MOST_NEW, Comparison, Moment, Settings, compare, store, stored, watch
from zq_lib.pasta import MarkupError
from zq_lib.pasta.config import PROTECT
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = "Mark some words: a few attention heads then look almost only at them, and the answer follows. No training."
ABOUT = (
    "Both answers come from the same model with the same weights; for the steered one, the chosen attention heads (ten "
    "of 270 in the shipped profile) give every unmarked prompt token only alpha times its weight.",
    "The maps show how much of the last prompt token's attention falls on the marked words, head by head, and the bars "
    "what that does to the next word.",
    "The numbers tell the price: attention given to the marks is taken from the rest of the prompt, so answers may "
    "repeat themselves or forget the question.",
)
READY = "Stored result of this example. Change anything and press Steer."


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Settings
    notice: str


EXAMPLES = {
    "New fact": Example(
        Settings(
            "Previously, the capital of France was Paris. *Currently, the capital of France is Rome.* "
            "The capital of France is"
        ),
        "Unsteered, the model trusts what it learnt; steered, it trusts the marked sentence.",
    ),
    "Two pets": Example(
        Settings("Alice has a snake. *Bruno has a duck.* The animal in the house is a"),
        "Both sentences answer the question; the mark decides. Mark the first one instead and press Steer.",
    ),
    "Keyword": Example(
        Settings("How do you make a cup of tea? *Your answer must include the word garden.*", chat=True, new_tokens=24),
        "A trade-off: the marked word arrives, and the question that was not marked is forgotten.",
    ),
    "It loses": Example(
        Settings(
            "How many legs does a spider have? *Write your answer in capital letters only.*", chat=True, new_tokens=24
        ),
        "A loss: this small model cannot write in capitals, marked or not, and now it loses the right answer as well.",
    ),
}
FIRST = next(iter(EXAMPLES))
CHOOSE = "Or choose the words"
OPEN = "To choose words, close the mark that is open in the text"
RUNS = Runs("Stopped. The pictures still show the previous run.")
warm = serve.language_model


def steer(
    text: str,
    chat: bool = False,
    alpha: float = 0.01,
    heads: str = "profile",
    layer: int = 23,
    head: int = 4,
    protect: str = "none",
    new_tokens: int = 12,
) -> dict[str, Any]:
    """Both answers to a prompt with *stars*, next tokens, attention shares and price, as JSON."""
    with serve.readable():
        settings = Settings(text, chat, alpha, heads, int(layer), int(head), protect, int(new_tokens))
        return compare(*serve.language_model(), settings).to_data()


def examples() -> dict[str, Any]:
    """The named examples: settings for `steer`, and what to notice."""
    return {name: {"settings": vars(e.settings), "notice": e.notice} for name, e in EXAMPLES.items()}


def thumbnail() -> str:
    """The first result's picture for the gallery."""
    return pieces.picture(figures.next_tokens(stored()[FIRST]))


def write_first_view() -> None:
    """Run every example and store the results that the page opens with."""
    model = serve.language_model()
    store({name: compare(*model, e.settings) for name, e in EXAMPLES.items()})


def build() -> gr.Blocks:
    """The page, complete with the first example's stored result."""
    results = stored()
    first = results[FIRST]
    answers, views = _answers(first), _views(first)
    with page("pasta", CLAIM, ABOUT, first.settings.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            text = gr.Textbox(
                first.settings.text,
                label="Prompt, with *stars* around what matters",
                lines=3,
                max_lines=8,
                max_length=2000,
            )
            words = gr.CheckboxGroup(**_choices(first.settings.text), elem_classes="zq-words")
            power = gr.Slider(-3, 0, _power(first.settings.alpha), step=0.25, label=_alpha_label(-2))
            with gr.Row():
                go = gr.Button("Steer", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            with gr.Accordion("More settings", open=False):
                form = gr.Radio(["plain text", "chat"], value="plain text", label="Prompt as")
                heads = gr.Radio(
                    [("shipped profile", "profile"), ("all 270", "all"), ("one", "one")], value="profile", label="Heads"
                )
                with gr.Row():
                    layer = gr.Number(23, precision=0, label="Layer, if one", min_width=100)
                    head = gr.Number(4, precision=0, label="Head, if one", min_width=100)
                protect = gr.Radio(list(PROTECT), value="none", label="Tokens that are never scaled down")
                new_tokens = gr.Slider(1, MOST_NEW, first.settings.new_tokens, step=1, label="Answer length, in tokens")
        with frame.result:
            notice = gr.Markdown(EXAMPLES[FIRST].notice)
            state = note(READY)
            with gr.Row():
                plain = gr.Textbox(
                    answers[0], label="Unsteered answer", lines=4, max_lines=8, interactive=False, min_width=240
                )
                steered = gr.Textbox(
                    answers[1], label="Steered answer", lines=4, max_lines=8, interactive=False, min_width=240
                )
            with gr.Row(equal_height=False):
                bars, maps = (side_by_side(view, "zq-figure") for view in views[:2])
        with frame.numbers:
            heat = gr.HighlightedText(
                views[2], label="What the steered heads look at, with steering (deeper is more)",
                combine_adjacent=False, show_legend=False, show_whitespaces=False, interactive=False,
            )  # fmt: skip
            with gr.Row(equal_height=False):
                tables = [side_by_side(view) for view in views[3:6]]
        controls = [text, power, form, heads, layer, head, protect, new_tokens]
        seen = [plain, steered, bars, maps, heat, *tables, frame.code]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        RUNS.connect([go.click, power.release], stop, _run, controls, [state, *seen])
        # gradio's `input` misses what is pasted or deleted, so the words follow every change
        text.change(_read_words, text, words, queue=False, trigger_mode="always_last", **private)
        words.input(_write_words, [text, words], [text], queue=False, **private)
        power.change(lambda p: gr.update(label=_alpha_label(p)), power, power, queue=False, **private)

        def show(name: str, request: gr.Request) -> list[Any]:
            RUNS.end(request)
            result, chosen = results[name], EXAMPLES[name]
            s = chosen.settings
            shown = [s.text, _power(s.alpha), _form(s), s.heads, s.layer, s.head, s.protect, s.new_tokens]
            above = [chosen.notice, gr.update(**_choices(s.text)), READY]
            return [*above, *shown, *_answers(result), *_views(result)]

        outputs = [notice, words, state, *controls, *seen]
        example.input(show, example, outputs, queue=False, **private)
        gr.api(steer, api_name="steer", **serve.ONE_AT_A_TIME)
        gr.api(examples, api_name="pasta_examples", queue=False)
    return blocks


def _run(
    ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the page's outputs while both answers grow."""
    yield from RUNS.follow(ticket, 10, _pages(progress, *controls))


def _pages(
    progress: gr.Progress, text: str, power: float, form: str, heads: str, layer: int, head: int, protect: str,
    new_tokens: int,
) -> Iterator[list[Any]]:  # fmt: skip
    progress(0, desc="Loading the model")
    settings = Settings(text, form == "chat", 10**power, heads, _whole(layer), _whole(head), protect, int(new_tokens))
    for moment in watch(*serve.language_model(), settings):
        views = _views(moment.result) if moment.result else [gr.skip()] * 7
        progress(_done(moment, settings), desc=moment.said)
        yield [f"{moment.said}.", moment.answers["plain"], moment.answers["steered"], *views]


def _done(moment: Moment, settings: Settings) -> float:
    words = sum(len(a.split()) for a in moment.answers.values())
    return 1.0 if moment.result else min(0.95, 0.1 + words / (2 * settings.new_tokens))


def _whole(value: float | None) -> int:
    return -1 if value is None else int(value)


def _answers(result: Comparison) -> list[str]:
    return [result.plain.answer, result.steered.answer]


def _views(result: Comparison) -> list[Any]:
    row = result.steered.row
    return [
        pieces.picture(figures.next_tokens(result)),
        pieces.picture(figures.attention_map(result)),
        [(token, share / max(row)) for token, share in zip(result.tokens, row, strict=True)],
        pieces.table(
            figures.attended(result), ("token", "marked", "unsteered", "steered"), "Most attended prompt tokens"
        ),
        pieces.table(figures.numbers(result), ("measure", "unsteered", "steered"), "What changed, and the price"),
        pieces.table(
            [(figures.printable(t), b, a) for t, b, a in result.following],
            ("next token", "unsteered", "steered"),
            "Probability of the next token",
        ),
        result.settings.python(),
    ]


def _choices(text: str) -> dict[str, Any]:
    read = pasta_words.read(text)
    return {
        "label": CHOOSE,
        "choices": [(word, str(i)) for i, word in enumerate(read.words)],
        "value": [str(i) for i in sorted(read.chosen)],
    }


def _read_words(text: str) -> Any:
    try:
        return gr.update(**_choices(text))
    except MarkupError:
        return gr.update(label=OPEN)


def _write_words(text: str, chosen: list[str]) -> str:
    try:
        return pasta_words.write(pasta_words.read(text).plain, {int(i) for i in chosen})
    except MarkupError:
        return text


def _power(alpha: float) -> float:
    return round(log10(alpha), 2)


def _alpha_label(power: float) -> str:
    return f"alpha = 10^{power:g} = {10**power:.2g}"


def _form(settings: Settings) -> str:
    return "chat" if settings.chat else "plain text"


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

"""MASFormer's demo: choose which layers see the whole text, and what the model still finds in it.

`python -m apps.masformer` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from apps import masformer_figures as figures
from apps import masformer_run as run
from apps.masformer_settings import (
    KINDS,
    LAYERS,
    LENGTHS,
    LIMITS,
    MOST_CHARACTERS,
    MOST_TOKENS,
    PLACES,
    Settings,
    layers_of,
    place_of,
    price,
)
from apps.masformer_text import story
from apps.masformer_views import ASKED, PLANNED, SEEN, WRITES, asked, everything, planned
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = (
    "A few layers see the whole text, all others a short window: choose the right few, and the model still finds what "
    "was said long ago."
)
ABOUT = (
    "A pass code is hidden in a document and asked for at its end. The same model, with the same weights, answers "
    "twice: with full attention in every layer, and with your plan, in which the other layers see a window (or their "
    "own block) and the first few tokens, the sinks.",
    "Profiled layers were chosen by measurement on other texts: those whose absence cost most. Perplexity tells how "
    "well the document itself is predicted, after its first 128 tokens; it hardly notices when a plan forgets.",
    "Mask, cone and price are counted, not timed: the end-to-end gain (Amdahl) is what is left when everything but "
    "attention stays as it was. No training is done here; the paper trains on after the change.",
)
READY = "Stored result of this example. Change anything and press Ask for the code."
CHANGED = "Masks, cone and price follow your plan. The answers are of the previous run: press Ask for the code."


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Settings
    notice: str


EXAMPLES = {
    "Profiled 8": Example(
        Settings(),
        "Eight layers of thirty, chosen by measurement, find the code as full attention does.",
    ),
    "Bottom 8": Example(
        Settings(full=layers_of("bottom", 8)),
        "The same cost with the eight lowest layers full: the code is forgotten, and perplexity hardly tells.",
    ),
    "No sinks": Example(
        Settings(sinks=0),
        "The first four tokens out of sight: the code survives here, but the text itself is predicted far worse.",
    ),
    "Blocks": Example(
        Settings(kind="block"),
        "Block-local layers see nothing before their block: cheaper still, and paid for at every block's beginning.",
    ),
    "It loses": Example(
        Settings(words=1550, code="961540", depth=0.3),
        "A loss: over this longer document full attention finds the code and the eight profiled layers do not. "
        "Try 15 full layers.",
    ),
}
FIRST = next(iter(EXAMPLES))
RUNS = Runs("Stopped. The answers are of the previous run.")
warm = serve.language_model


def ask(
    full: list[int] | None = None,
    window: int = 64,
    kind: str = "window",
    sinks: int = 4,
    document: str = "",
    words: int = 450,
    code: str = "482913",
    depth: float = 0.2,
) -> dict[str, Any]:
    """Hide a code in a document and ask for it under full attention and under a plan; `full` None is profiled 8."""
    with serve.readable():
        layers = layers_of("profiled", 8) if full is None else tuple(full)
        settings = Settings(layers, window, kind, sinks, words=words, document=document, code=code, depth=depth)
        result = run.ask(*serve.language_model(), settings)
        return {**result.to_data(), "verdict": figures.verdict(result)}


def plan(
    placement: str = "profiled", count: int = 8, window: int = 64, kind: str = "window", sinks: int = 4,
    length: int = 8192,
) -> dict[str, Any]:  # fmt: skip
    """The layers of a placement, and its price on a text of `length` tokens by count, without the model."""
    with serve.readable():
        settings = Settings(layers_of(placement, count), window, kind, sinks, length)
        return {**settings.plan.to_dict(), "full": list(settings.full), **asdict(price(settings.plan, length))}


def examples() -> dict[str, Any]:
    """The named examples: settings for `masformer_ask`, and what to notice."""
    return {
        name: {
            "settings": {k: list(v) if k == "full" else v for k, v in vars(e.settings).items() if k != "length"},
            "notice": e.notice,
        }
        for name, e in EXAMPLES.items()
    }


def thumbnail() -> str:
    """The first result's picture for the gallery."""
    return pieces.picture(figures.digits(run.stored()[FIRST]))


def write_first_view() -> None:
    """Run every example and store the results that the page opens with."""
    model = serve.language_model()
    run.store({name: run.ask(*model, e.settings) for name, e in EXAMPLES.items()})


def build() -> gr.Blocks:
    """The page, complete with the first example's stored result."""
    results = run.stored()
    first = results[FIRST]
    s, views = first.settings, everything(first)
    drawn = {FIRST: views}
    with page("masformer", CLAIM, ABOUT, s.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            place = gr.Radio(list(PLACES), value=place_of(s.full), label="Full layers", elem_classes="zq-few")
            count = gr.Slider(0, LAYERS, len(s.full), step=1, label="How many")
            full = gr.CheckboxGroup(
                list(range(LAYERS)), value=list(s.full), label="Layers that stay full, 0 is the lowest",
                elem_classes="zq-words",
            )  # fmt: skip
            with gr.Row():
                window, sinks = (
                    gr.Slider(*LIMITS[name], getattr(s, name), step=step, label=said, min_width=140)
                    for name, step, said in (("window", 4, "Span"), ("sinks", 1, "Sinks"))
                )
            with gr.Row():
                go = gr.Button("Ask for the code", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            sentence = gr.HTML(views["sentence"], elem_classes="zq-note")
            kind = gr.Radio(list(KINDS), value=s.kind, label="The span is a", elem_classes="zq-few")
            length = gr.Radio(LENGTHS, value=s.length, label="Price at so many tokens", elem_classes="zq-few")
            with gr.Accordion("The document and its code", open=True):
                with gr.Row():
                    code = gr.Textbox(s.code, label="Code, 3 to 8 digits", max_length=8, min_width=120)
                    depth = gr.Slider(0, 100, 100 * s.depth, step=5, label="Depth, %", min_width=140)
                words = gr.Slider(*LIMITS["words"], s.words, step=50, label="Take so many words of the story")
                document = gr.Textbox(
                    story(s.words), label=f"Document, yours or the story; the code comes in by itself "
                    f"(at most {MOST_TOKENS} tokens)", lines=6, max_lines=10, max_length=MOST_CHARACTERS,
                )  # fmt: skip
        with frame.result:
            notice = gr.Markdown(EXAMPLES[FIRST].notice)
            state = note(READY)
            seen: dict[str, Any] = {"verdict": gr.HTML(views["verdict"])}
            with gr.Row(equal_height=False):
                for name in ("digits", "cone"):
                    seen[name] = side_by_side(views[name], "zq-figure")
            with gr.Row(equal_height=False):
                for name in WRITES:
                    seen[name] = side_by_side(views[name])
            with gr.Row(equal_height=False):
                for name in ("left", "masks"):
                    seen[name] = side_by_side(views[name], "zq-figure")
            for name in ("measured", "price"):
                seen[name] = gr.HTML(views[name])
        seen["code"], seen["sentence"] = frame.code, sentence
        planning = [full, window, kind, sinks, length]
        asking = [words, document, code, depth]
        controls = [*planning, *asking]
        parts = [seen[name] for name in SEEN]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        RUNS.connect(go.click, stop, _run, controls, [state, *(seen[name] for name in ASKED)])
        looked = [state, *(seen[name] for name in PLANNED)]
        look: dict[str, Any] = {"fn": _look, "inputs": controls, "outputs": looked, **quick}
        read: dict[str, Any] = {"fn": _read, "inputs": controls, "outputs": [sentence, frame.code], **quick}
        for control in (place, count):
            control.input(_fill, [place, count], [place, count, full], trigger_mode="always_last", **quick).then(**look)
        full.input(_named, full, [place, count], **quick).then(**look)
        gr.on([control.input for control in planning[1:]], trigger_mode="always_last", **look)
        words.input(story, words, document, trigger_mode="always_last", **quick).then(**read)
        gr.on([depth.input, code.blur, document.blur], trigger_mode="always_last", **read)

        def show(name: str, request: gr.Request) -> list[Any]:
            RUNS.end(request)
            result, chosen = results[name], EXAMPLES[name]
            if name not in drawn:
                drawn[name] = everything(result)
            views, s = drawn[name], result.settings
            above = [chosen.notice, READY, place_of(s.full), len(s.full)]
            return [*above, *_controls(s), *(views[n] for n in SEEN)]

        example.input(show, example, [notice, state, place, count, *controls, *parts], **quick)
        gr.api(ask, api_name="masformer_ask", **serve.ONE_AT_A_TIME)
        gr.api(plan, api_name="masformer_plan", queue=False)
        gr.api(examples, api_name="masformer_examples", queue=False)
    return blocks


def _run(
    ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the page's answers while the model reads, first with full attention and then with the plan."""
    yield from RUNS.follow(ticket, 1 + len(ASKED), _pages(progress, *controls))


def _pages(progress: gr.Progress, *controls: Any) -> Iterator[list[Any]]:
    """What is counted stays with the controls, which may have moved on."""
    settings = _settings(*controls)
    progress(0, desc="Loading the model")
    for moment in run.watch(*serve.language_model(), settings):
        progress(moment.done, desc=moment.said)
        views = asked(moment.result) if moment.result else {}
        yield [f"{moment.said}.", *(views.get(name, gr.skip()) for name in ASKED)]


def _fill(place: str | None, count: int) -> tuple[str, int, list[int]]:
    """The layers of a placement. Asking for some layers where there are none, or for more of one's own, takes the
    profiled ones."""
    count = _whole(count, 0)
    if place is None or (place == "none" and count):
        place = "profiled"
    layers = list(layers_of(place, count))
    return place, len(layers), layers


def _named(full: list[int]) -> tuple[str | None, int]:
    return place_of(tuple(sorted(full))), len(full)


def _look(*controls: Any) -> list[Any]:
    """What can be said of the plan without the model."""
    try:
        views = planned(_settings(*controls))
    except ValueError as error:  # on the way to a setting, so no alarm yet
        views = {"sentence": pieces.paragraph(str(error))}
    state = CHANGED if "cone" in views else gr.skip()
    return [state, *(views.get(name, gr.skip()) for name in PLANNED)]


def _read(*controls: Any) -> list[Any]:
    """The program for another document or code, or what is wrong with it."""
    _, *parts = _look(*controls)
    views = dict(zip(PLANNED, parts, strict=True))
    return [views["sentence"], views["code"]]


def _settings(
    full: list[int], window: int, kind: str, sinks: int, length: int, words: int, document: str, code: str, depth: float
) -> Settings:
    """What the controls say. Raises ValueError for an empty document."""
    if not document.strip():
        raise ValueError("document='' has no words; write one, or move the story's slider to get it back")
    return Settings(
        tuple(full), _whole(window), kind, _whole(sinks), length, _whole(words), document, code.strip(),
        (depth or 0) / 100,
    )  # fmt: skip


def _whole(value: float | None, otherwise: int = -1) -> int:
    return otherwise if value is None else int(value)


def _controls(settings: Settings) -> list[Any]:
    s = settings
    document = s.document or story(s.words)
    return [list(s.full), s.window, s.kind, s.sinks, s.length, s.words, document, s.code, 100 * s.depth]


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

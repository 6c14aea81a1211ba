"""GEAR's demo: choose how a KV cache is stored, and see its bytes, its errors and what the model then says.

`python -m apps.gear` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from apps import gear_figures as figures
from apps import gear_run as run
from apps.gear_run import Look, Moment, Result
from apps.gear_settings import (
    BEGINS,
    CONFIGS,
    HEADS,
    LAYERS,
    LIMITS,
    MORE,
    MOST_CHARACTERS,
    MOST_NEW,
    PLAIN,
    PROMPT,
    SIDES,
    STEPS,
    WHOLE,
    Settings,
)
from zq_lib.gear.config import BITS, SCHEMES
from zq_lib.gear.measure import TEXTS, Score
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = "A text remembered in two to eight bits a number: what each part of GEAR costs in bytes, and what it repairs."
ABOUT = (
    f"The model has read {PROMPT} tokens of a text; their keys and values are then stored as low-bit codes and, as "
    "you choose, a low-rank residual, outliers and exact first tokens (sinks).",
    "KL says how far the next-token distribution is from full precision, a mean over the text's next "
    f"{STEPS} tokens: 0 is the same. The map shows one head's error, and the spectrum whether that error has a "
    "structure that a low rank can hold.",
    "The chart of same bytes is the fair question: plain quantisation with more bits may cost as much and be closer. "
    "On this small model, with heads only 64 wide, it often is.",
)
READY = "Stored result of this example. Change anything and press Compress."
WRITES = {"full": "Full precision writes", "compressed": "The compressed cache writes"}
BOX = (
    "border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .4rem .8rem; min-height: 5rem; "
    "background: var(--block-background-fill)"
)
MARK = "background: var(--color-accent-soft); color: inherit; border-bottom: 2px solid var(--link-text-color)"


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Settings
    notice: str


EXAMPLES = {
    "Paper, 2 bits": Example(
        Settings.of("paper_2bit"),
        "The paper's recipe, codes, low rank and outliers: the name that the text told survives. Compare Codes alone.",
    ),
    "Codes alone": Example(
        Settings.of("plain 2 bit"),
        "The same codes without repair: the fewest bytes, and the model remembers a wrong name.",
    ),
    "Three bits": Example(
        Settings.of("balanced"),
        "Plain 3 bits with four exact first tokens: cheaper than the paper's recipe and closer to full precision.",
    ),
    "Eight bits": Example(
        Settings.of("plain 8 bit"),
        "Nearly nothing is lost: the same words, in little more than half the bytes.",
    ),
    "It loses": Example(
        Settings.of("paper_2bit", text="reasoning"),
        "A loss: at the same bytes plain quantisation with more bits is far closer to full precision than GEAR at 2 "
        "bits, on this text as on the others.",
    ),
}
FIRST = next(iter(EXAMPLES))
RUNS = Runs("Stopped. What was not measured yet still shows the previous run.")
SEEN = ("verdict", "sizes", "same", "full", "compressed", "parting", "map", "spectrum", "growth", "quality", "code")


def warm() -> None:
    """Load the model and read the first text."""
    run.remember(*serve.language_model(), EXAMPLES[FIRST].settings.text)


def compress(
    key_bits: int = 2,
    value_bits: int = 2,
    scheme: str = "kivi",
    group: int = 64,
    key_outliers: float = 0.02,
    value_outliers: float = 0.02,
    rank: int = 4,
    rank_decode: int = 2,
    buffer: int = 64,
    sinks: int = 0,
    clip: bool = False,
    factor_bits: int = 16,
    text: str = "encyclopedia",
    more: str = "",
    new_tokens: int = 24,
    side: str = "values",
    layer: int = 10,
    head: int = 0,
) -> dict[str, Any]:
    """Sizes, distance from full precision, one head's error and both answers of a setting, as JSON."""
    with serve.readable():
        settings = Settings(
            key_bits, value_bits, scheme, group, key_outliers, value_outliers, rank, rank_decode, buffer, sinks,
            clip, factor_bits, text,
            more, new_tokens, side, layer, head,
        )  # fmt: skip
        result = run.compress(*serve.language_model(), settings)
        beside = run.rival(result.score, run.stored()[1][text])
        return {**result.to_data(), "rival": beside.name, "verdict": figures.verdict(settings, result.score, beside)}


def inspect(
    preset: str = "paper_2bit", text: str = "encyclopedia", side: str = "values", layer: int = 10, head: int = 0
) -> dict[str, Any]:
    """One head's error map and residual spectrum under a preset, as JSON."""
    with serve.readable():
        if preset not in CONFIGS:
            raise ValueError(f"preset={preset!r} is not offered here; choose one of {', '.join(CONFIGS)}")
        settings = Settings.of(preset, text=text, side=side, layer=layer, head=head)
        return asdict(run.look(run.remember(*serve.language_model(), text), settings))


def examples() -> dict[str, Any]:
    """The named examples: settings for `compress`, and what to notice."""
    return {name: {"settings": vars(e.settings), "notice": e.notice} for name, e in EXAMPLES.items()}


def thumbnail() -> str:
    """The first result's picture for the gallery."""
    return pieces.picture(figures.sizes(run.stored()[0][FIRST].settings))


def write_first_view() -> None:
    """Run every example and the plain settings on every text, and store what the page opens with."""
    model = serve.language_model()
    plain = {text: run.plain_scores(*model, text) for text in TEXTS}
    run.store({name: run.compress(*model, e.settings) for name, e in EXAMPLES.items()}, plain)


def build() -> gr.Blocks:
    """The page, complete with the first example's stored result."""
    results = run.stored()[0]
    first = results[FIRST]
    s, views = first.settings, _views(first)
    drawn = {FIRST: views}
    with page("gear", CLAIM, ABOUT, s.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            names = [(name.replace("_", " "), name) for name in CONFIGS]
            preset = gr.Radio(names, value=s.preset, label="Preset", elem_classes="zq-few")
            with gr.Row():
                bits = [
                    gr.Radio(list(BITS), value=b, label=f"Bits of {side}", elem_classes="zq-few", min_width=140)
                    for side, b in zip(SIDES, (s.key_bits, s.value_bits), strict=True)
                ]
            with gr.Row():
                outliers = [
                    gr.Slider(0, 5, 100 * share, step=0.5, label=f"Outliers {side}, %", min_width=140)
                    for side, share in (("K", s.key_outliers), ("V", s.value_outliers))
                ]
            rank = gr.Slider(0, LIMITS["rank"], s.rank, step=1, label="Rank of the low-rank part, in a prompt")
            with gr.Row():
                go = gr.Button("Compress", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            size = gr.HTML(pieces.paragraph(figures.size_sentence(s)), elem_classes="zq-note")
            text = gr.Radio(list(TEXTS), value=s.text, label="Text", elem_classes="zq-few")
            begins = gr.HTML(_begins(s.text), elem_classes="zq-note")
            more = gr.Textbox(s.more, label="Let it go on with", lines=2, max_lines=6, max_length=MOST_CHARACTERS)
            with gr.Accordion("More settings", open=False):
                scheme = gr.Radio(list(SCHEMES), value=s.scheme, label="Who shares a scale", elem_classes="zq-few")
                group, buffer = (
                    gr.Radio(list(WHOLE[name]), value=getattr(s, name), label=said, elem_classes="zq-few")
                    for name, said in (("group", "Elements in a group"), ("buffer", "Tokens in the buffer"))
                )
                with gr.Row():
                    sinks = gr.Slider(0, LIMITS["sinks"], s.sinks, step=1, label="Exact first tokens", min_width=140)
                    rank_decode = gr.Slider(
                        0, LIMITS["rank_decode"], s.rank_decode, step=1, label="Rank, buffer", min_width=140
                    )
                clip = gr.Checkbox(s.clip, label="Search for clipped ranges")
                int8 = gr.Checkbox(s.factor_bits == 8, label="Low-rank factors in int8")
                new_tokens = gr.Slider(1, MOST_NEW, s.new_tokens, step=1, label="Answer length, in tokens")
        with frame.result:
            notice = gr.Markdown(EXAMPLES[FIRST].notice)
            state = note(READY)
            seen: dict[str, Any] = {}
            with gr.Row(equal_height=False):
                for name in ("sizes", "same"):
                    seen[name] = side_by_side(views[name], "zq-figure")
            seen["verdict"] = gr.HTML(views["verdict"])
            with gr.Row(equal_height=False):
                for name in WRITES:
                    seen[name] = side_by_side(views[name])
            with gr.Row(equal_height=False):
                for name in ("quality", "parting"):
                    seen[name] = side_by_side(views[name])
        with frame.numbers:
            with gr.Row():
                side = gr.Radio(list(SIDES), value=s.side, label="Map of", min_width=160)
                layer = gr.Slider(0, LAYERS - 1, s.layer, step=1, label="Layer", min_width=160)
                head = gr.Radio(list(range(HEADS)), value=s.head, label="Head", min_width=160)
            with gr.Row(equal_height=False):
                for name in ("map", "spectrum", "growth"):
                    seen[name] = side_by_side(views[name], "zq-figure")
        seen["code"] = frame.code
        shown = gr.State(vars(s))
        library = [*bits, scheme, group, *outliers, rank, rank_decode, buffer, sinks, clip, int8]
        controls = [*library, text, more, new_tokens, side, layer, head]
        parts = [seen[name] for name in SEEN]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        RUNS.connect(go.click, stop, _run, controls, [state, shown, *parts])
        preset.input(_fill, preset, [*library, size], **quick)
        for control in library:
            if control in (group, buffer):
                # key groups of KIVI must divide a buffer, so the other one follows
                grown = max if control is group else min
                other = buffer if control is group else group
                control.input(lambda a, b, grown=grown: grown(a, b), [control, other], other, **quick).then(
                    _weigh, library, [size, preset], **quick
                )
            else:
                control.input(_weigh, library, [size, preset], trigger_mode="always_last", **quick)
        text.input(lambda name: [MORE[name], _begins(name)], text, [more, begins], **quick)
        for picker in (side.input, layer.input, head.input):
            picker(
                _inspect, [shown, side, layer, head], [seen["map"], seen["spectrum"]], trigger_mode="always_last",
                **private, **serve.ONE_AT_A_TIME,
            )  # fmt: skip

        def show(name: str, request: gr.Request) -> list[Any]:
            RUNS.end(request)
            result, chosen = results[name], EXAMPLES[name]
            if name not in drawn:
                drawn[name] = _views(result)
            views, s = drawn[name], result.settings
            above = [chosen.notice, READY, vars(s), s.preset, _begins(s.text)]
            return [*above, *_controls(s), _size(s), *(views[n] for n in SEEN)]

        example.input(show, example, [notice, state, shown, preset, begins, *controls, size, *parts], **quick)
        gr.api(compress, api_name="compress", **serve.ONE_AT_A_TIME)
        gr.api(inspect, api_name="inspect", **serve.ONE_AT_A_TIME)
        gr.api(examples, api_name="gear_examples", queue=False)
    return blocks


def _run(
    ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the page's outputs as they are measured."""
    yield from RUNS.follow(ticket, 2 + len(SEEN), _pages(progress, *controls))


def _pages(
    progress: gr.Progress, key_bits: int, value_bits: int, scheme: str, group: int, key_outliers: float,
    value_outliers: float, rank: int, rank_decode: int, buffer: int, sinks: int, clip: bool, int8: bool, text: str,
    more: str, new_tokens: int, side: str, layer: int, head: int,
) -> Iterator[list[Any]]:  # fmt: skip
    progress(0, desc="Loading the model")
    settings = Settings(
        key_bits, value_bits, scheme, group, key_outliers / 100, value_outliers / 100, rank, rank_decode, buffer,
        sinks, clip, 8 if int8 else 16, text, more, new_tokens, side, layer, head,
    )  # fmt: skip
    for moment in run.watch(*serve.language_model(), settings):
        progress(moment.done, desc=moment.said)
        news = _news(settings, moment)
        yield [f"{moment.said}.", vars(settings), *(news.get(name, gr.skip()) for name in SEEN)]


def _news(settings: Settings, moment: Moment) -> dict[str, Any]:
    """What a moment adds to the page."""
    if moment.news == "sizes":
        return {"code": settings.python()}
    if moment.news == "look":
        return _head_views(settings, moment.look)
    if moment.news == "score":
        return _score_views(settings, moment.score)
    if moment.news == "answers":
        return {side: _box(side, [answer]) for side, answer in moment.answers.items()}
    return _answer_views(moment.result)


def _views(result: Result) -> dict[str, Any]:
    """Everything."""
    return {
        **_head_views(result.settings, result.look),
        **_score_views(result.settings, result.score),
        **_answer_views(result),
        "code": result.settings.python(),
    }


def _head_views(settings: Settings, seen: Look) -> dict[str, Any]:
    return {
        "map": pieces.picture(figures.error_map(seen)),
        "spectrum": pieces.picture(figures.spectrum(seen, settings.rank)),
    }


def _score_views(settings: Settings, score: Score) -> dict[str, Any]:
    plain = run.stored()[1][settings.text]
    beside = run.rival(score, plain)
    name = figures.label(settings)
    return {
        "sizes": pieces.picture(figures.sizes(settings, beside.name)),
        "growth": pieces.picture(figures.growth(settings, beside.name)),
        "same": pieces.picture(figures.same_bytes(settings, score, plain)),
        "verdict": pieces.paragraph(figures.verdict(settings, score, beside)),
        "quality": pieces.table(
            figures.quality(settings, score, beside),
            ("measure", name, beside.name if PLAIN[beside.name] != settings.config else "the same"),
            "Bytes and distance from full precision",
        ),
    }


def _answer_views(result: Result) -> dict[str, Any]:
    return {
        "full": _box("full", result.full.pieces),
        "compressed": _box("compressed", result.compressed.pieces),
        "parting": pieces.table(
            figures.answers(result), ("", "full precision", "compressed"), "Where the two texts part"
        ),
    }


def _box(side: str, parts: list[str]) -> str:
    """An answer in a frame, as text whatever it contains; the second of its parts is marked."""
    shown = [escape(part) for part in parts]
    if len(parts) > 1 and parts[1]:
        marked = escape(figures.visible(parts[1]))
        shown[1] = f'<mark style="{MARK}">{marked}</mark><small> (first difference) </small>'
    return (
        f'<section aria-label="{WRITES[side]}" style="{BOX}"><strong>{WRITES[side]}</strong>'
        f'<p style="white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0">{"".join(shown)}</p></section>'
    )


def _inspect(shown: dict[str, Any], side: str, layer: int, head: int) -> list[Any]:
    """Another head of the setting that the page shows."""
    with serve.readable():
        settings = replace(Settings(**shown), side=side, layer=layer, head=head)
        views = _head_views(settings, run.look(run.remember(*serve.language_model(), settings.text), settings))
        return [views["map"], views["spectrum"]]


def _library(settings: Settings) -> list[Any]:
    s = settings
    return [
        s.key_bits, s.value_bits, s.scheme, s.group, 100 * s.key_outliers,
        100 * s.value_outliers, s.rank, s.rank_decode, s.buffer, s.sinks, s.clip,
        s.factor_bits == 8,
    ]  # fmt: skip


def _controls(settings: Settings) -> list[Any]:
    s = settings
    return [*_library(s), s.text, s.more, s.new_tokens, s.side, s.layer, s.head]


def _fill(preset: str) -> list[Any]:
    settings = Settings.of(preset)
    return [*_library(settings), _size(settings)]


def _weigh(*library: Any) -> list[Any]:
    """The size of what the controls say, and the preset that it is."""
    *most, key_outliers, value_outliers, rank, rank_decode, buffer, sinks, clip, int8 = library
    with serve.readable():
        shares = key_outliers / 100, value_outliers / 100
        settings = Settings(*most, *shares, rank, rank_decode, buffer, sinks, clip, 8 if int8 else 16)
        return [_size(settings), settings.preset]


def _begins(text: str) -> str:
    return pieces.paragraph(f"The model has read {PROMPT} tokens: {BEGINS[text]} …")


def _size(settings: Settings) -> str:
    return pieces.paragraph(figures.size_sentence(settings))


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

"""TED's demo: what a filter keeps of two digits, a distillation live, and questions for teacher and students.

`python -m apps.ted` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gradio as gr

from apps import ted_figures as figures
from apps import ted_run as run
from apps.ted_settings import (
    COLUMNS,
    KD_WEIGHTS,
    LAYER_WEIGHTS,
    MOST_PICTURES,
    MOST_QUESTION,
    MOST_SEED,
    QUESTION,
    ROWS,
    Digits,
    Question,
    Training,
)
from apps.ted_views import PLACES, SEEN, everything, look
from zq_lib.ted.digits import CLASSES, DIMS, LAYERS, load_images
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = (
    "A filter that is trained on the task and narrow enough keeps what the task needs of a teacher's hidden state and "
    "lets go of the rest; whether that makes a better student is another question."
)
ABOUT = (
    "A linear filter and a head are fitted behind every layer of a frozen teacher. The student then learns from "
    "labels, from the teacher's output (KD) and from its filtered states (TED); LWD copies the states as they are.",
    "The teacher of digits was trained on both digits of a pair, and the task asks for the left one alone: what a "
    "linear probe still reads of the right one is what a student would copy for nothing. A filter as wide as the state "
    "cannot drop anything.",
    "The questions are TREC's: which of six kinds of answer is asked for? The teacher is MiniLM-L6, fine-tuned on 480 "
    "of them, the students have three layers of width 96. Everything is small, and most differences between students "
    "are inside the noise: the page says where.",
)
CHANGED = "Not run yet with these settings: the results below are of the previous run."
FOLLOWED = "The pictures follow your choice."
OFTEN, SELDOM = 0.3, 1.5  # seconds between two messages of a run, and between two drawings


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Digits | Training | Question
    notice: str


EXAMPLES = {
    "The filter drops the right digit": Example(
        Digits(),
        "The teacher's state names both digits. Behind a filter of width 8 the left one, the task's, is still there, "
        "and of the right one little is left.",
    ),
    "Full width drops nothing": Example(
        Digits(dim=64),
        "A filter as wide as the state is trained on the left digit alone, and still shows the right one: a square "
        "matrix turns a state, it does not forget.",
    ),
    "TED helps": Example(
        Training(seed=5),
        "A student whose start knows next to nothing: TED ends clearly above LWD and labels alone, and level with KD. "
        "The seed was picked for that; one seed is no proof.",
    ),
    "It loses": Example(
        Training(layer_weight=10.0, seed=0),
        "A loss: another start and a strong weight. Both ways of matching states end below labels alone, which cost "
        "nothing; plain KD does as well as those.",
    ),
    "A question": Example(
        Question(),
        "The start is wrong, its students come round, less sure than the teacher; the head behind the teacher's first "
        "layer is wrong, the next ones are not. Between the students there is no difference to speak of.",
    ),
}
FIRST = next(iter(EXAMPLES))
LABELS = {"digits": "Two digits", "training": "Training", "sentences": "Sentences"}
FIRSTS = {part: next(n for n, e in EXAMPLES.items() if run.PARTS[type(e.settings)] == part) for part in LABELS}
BUTTONS = {"digits": "Show this pair", "training": "Train", "sentences": "Ask"}
READY = {
    "digits": "Stored result. Width and layer follow at once; the first other pair trains the teacher, half a minute.",
    "training": "Stored result. A run takes about a quarter of a minute, the first one twice that.",
    "sentences": "Stored result. The first question trains teacher and students, about a minute; then answers come at "
    "once.",
}
RUNS = {part: Runs("Stopped. What is below is as far as it came.") for part in LABELS}


def warm() -> None:
    """Read the digits."""
    load_images()


def read(
    dim: int = 8, layer: int = LAYERS, left: int = 3, right: int = 7, picture: int = 0, drawing: str = ""
) -> dict[str, Any]:
    """What readers of all states and filtered states say of a pair of digits, and how often they are right."""
    with serve.readable():
        result = run.finish(Digits(dim, layer, left, right, picture, drawing))
        return {**result.to_data(), "verdict": figures.digits_verdict(result, dim, layer)}


def train(
    kd_weight: float = 5.0, layer_weight: float = 1.0, dim: int = 8,
    layers: list[int] = list(range(1, LAYERS + 1)),  # noqa: B006, B008 - the endpoint's documented default
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Distil a reader of digits with TED, LWD and KD, and train it on labels alone: terms, accuracies, results."""
    with serve.readable():
        result = run.finish(Training(kd_weight, layer_weight, dim, layers, seed))
        return {**result.to_data(), "verdict": figures.training_verdict(result)}


def ask(question: str = QUESTION) -> dict[str, Any]:
    """What teacher, start and students say to a question, and the heads behind the teacher's layers."""
    with serve.readable():
        result = run.finish(Question(question))
        return {**result.to_data(), "verdict": figures.sentences_verdict(result)}


ENDPOINTS = {"digits": read, "training": train, "sentences": ask}


def examples() -> dict[str, Any]:
    """The named examples: the endpoint, its settings, and what to notice."""
    found = {}
    for name, e in EXAMPLES.items():
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e.settings).items()}
        endpoint = f"ted_{ENDPOINTS[run.PARTS[type(e.settings)]].__name__}"
        found[name] = {"endpoint": endpoint, "settings": settings, "notice": e.notice}
    return found


def thumbnail() -> str:
    """What filters keep, for the gallery."""
    first = run.stored()[FIRST]
    return pieces.picture(figures.widths(first, first.settings.layer))


def write_first_view() -> None:
    """Run every example and store the results that the page opens with."""
    run.store({name: run.finish(e.settings) for name, e in EXAMPLES.items()})


def build() -> gr.Blocks:
    """The page, with a stored result in each of its three parts."""
    results = run.stored()
    drawn = {name: everything(part, results[name]) for part, name in FIRSTS.items()}
    chosen = run.PARTS[type(EXAMPLES[FIRST].settings)]
    controls: dict[str, list[Any]] = {}
    columns: dict[str, gr.Column] = {}
    heads: dict[str, list[Any]] = {}  # notice and state
    seen: dict[str, dict[str, Any]] = {}
    buttons: dict[str, tuple[gr.Button, gr.Button]] = {}
    tabs: dict[str, gr.Tab] = {}
    with page("ted", CLAIM, ABOUT, results[FIRST].settings.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            with gr.Tabs(selected=chosen) as switch:
                for part, make in MAKERS.items():
                    with gr.Tab(LABELS[part], id=part) as tabs[part]:
                        controls[part] = make(results[FIRSTS[part]].settings)
                        with gr.Row():
                            go = gr.Button(BUTTONS[part], variant="primary", min_width=80)
                            buttons[part] = go, gr.Button("Stop", min_width=80)
                        if part == "digits":
                            copy = _canvas(controls[part])
        with frame.result:
            for part, name in FIRSTS.items():
                with gr.Column(visible=part == chosen) as columns[part]:
                    heads[part] = [gr.Markdown(EXAMPLES[name].notice), note(READY[part])]
                    seen[part] = _places(part, dict(zip(SEEN[part], drawn[name], strict=True)))
        shown = gr.State(results[FIRSTS["digits"]])
        extras: dict[str, list[Any]] = {part: [shown] if part == "digits" else [] for part in LABELS}
        outputs = {part: [seen[part][name] for name in SEEN[part]] for part in LABELS}
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        for part in LABELS:
            RUNS[part].connect(
                buttons[part][0].click, buttons[part][1], partial(_run, part), controls[part],
                [heads[part][1], *extras[part], *outputs[part]],
            )  # fmt: skip
            fn, filled = partial(_changed, part), []
            if part == "digits":
                fn, filled = _pair, [shown, *outputs[part]]
            gr.on(
                [c.input for c in controls[part][2 * (part == "digits") :]], fn, controls[part],
                [heads[part][1], frame.code, *filled], trigger_mode="always_last", **quick,
            )  # fmt: skip
            tabs[part].select(partial(_open, part), controls[part], [*columns.values(), frame.code], **quick)
        gr.on(
            [c.input for c in controls["digits"][:2]], _at, [shown, *controls["digits"]],
            [frame.code, *(seen["digits"][name] for name in PLACES)], trigger_mode="always_last", **quick,
        )  # fmt: skip
        copy.click(run.as_text, shown, controls["digits"][-1], **quick)

        def show(name: str, request: gr.Request) -> list[Any]:
            result, part = results[name], run.PARTS[type(results[name].settings)]
            RUNS[part].end(request)
            if name not in drawn:
                drawn[name] = everything(part, result)
            found = [
                gr.update(selected=part),
                *(gr.update(visible=p == part) for p in LABELS),
                result.settings.python(),
            ]
            for p in LABELS:
                if p != part:
                    found += [gr.skip()] * (2 + len(controls[p]) + len(extras[p]) + len(outputs[p]))
                    continue
                found += [EXAMPLES[name].notice, READY[p], *_controls(result.settings), *_extras(result), *drawn[name]]
            return found

        every = [c for p in LABELS for c in (*heads[p], *controls[p], *extras[p], *outputs[p])]
        example.input(show, example, [switch, *columns.values(), frame.code, *every], **quick)
        for fn in ENDPOINTS.values():
            gr.api(fn, api_name=f"ted_{fn.__name__}", **serve.ONE_AT_A_TIME)
        gr.api(examples, api_name="ted_examples", queue=False)
    return blocks


# --- what the parts' controls are -------------------------------------------------------------------------------------
def _widths(dim: int, label: str) -> gr.Radio:
    return gr.Radio(list(DIMS), value=dim, label=label, elem_classes="zq-few", scale=3, min_width=160)


def _digits_controls(s: Digits) -> list[Any]:
    with gr.Row():
        places = [
            _widths(s.dim, "Width of the filter, d_f"),
            gr.Radio(list(range(1, LAYERS + 1)), value=s.layer, label="Layer", elem_classes="zq-few", scale=2,
                     min_width=120),
        ]  # fmt: skip
    with gr.Row():
        sides = [
            gr.Slider(0, CLASSES - 1, value, step=1, label=said, min_width=140)
            for value, said in ((s.left, "Left digit"), (s.right, "Right digit"))
        ]
    return [
        *places,
        *sides,
        gr.Slider(0, MOST_PICTURES - 1, s.picture, step=1, label="Which drawing of them"),
    ]


def _canvas(controls: list[Any]) -> gr.Button:
    """A drawing of one's own, added to the controls, and the button that begins it."""
    with gr.Accordion(f"Draw a pair yourself, {ROWS} lines of {COLUMNS}", open=False):
        drawing = gr.Code(
            "", language=None, interactive=True, lines=ROWS, max_lines=ROWS, show_line_numbers=False,
            label="# is ink, + half, . none; empty: the digits above",
        )  # fmt: skip
        copy = gr.Button("Begin with the pair that is shown", size="sm")
    controls.append(drawing)
    return copy


def _training_controls(s: Training) -> list[Any]:
    weights = [
        gr.Radio([(f"{w:g}", w) for w in offered], value=value, label=f"Weight of the {what}", elem_classes="zq-few")
        for offered, value, what in (
            (KD_WEIGHTS, s.kd_weight, "output (KD)"), (LAYER_WEIGHTS, s.layer_weight, "matched states")
        )
    ]  # fmt: skip
    with gr.Row():
        dim = _widths(s.dim, "Width of TED's filters")
        layers = gr.CheckboxGroup(list(range(1, LAYERS + 1)), value=list(s.layers), label="Matched layers",
                                  elem_classes="zq-few", scale=2, min_width=120)  # fmt: skip
    return [*weights, dim, layers, gr.Slider(0, MOST_SEED, s.seed, step=1, label="Seed of the student")]


def _sentences_controls(s: Question) -> list[Any]:
    return [gr.Textbox(s.question, label="Your question", lines=2, max_length=MOST_QUESTION)]


MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    "digits": _digits_controls,
    "training": _training_controls,
    "sentences": _sentences_controls,
}


def _places(part: str, views: dict[str, str]) -> dict[str, Any]:
    """A part's results where they stand."""
    placed: dict[str, Any] = {}

    def pair(*names: str) -> None:
        with gr.Row(equal_height=False):
            for name in names:
                placed[name] = side_by_side(views[name], "zq-figure" if views[name].startswith("<figure") else None)

    pair(*SEEN[part][:2])
    placed["verdict"] = gr.HTML(views["verdict"])
    if len(SEEN[part]) > 4:
        pair(*SEEN[part][3:])
    else:
        placed[SEEN[part][3]] = gr.HTML(views[SEEN[part][3]])
    return placed


def _controls(settings: Digits | Training | Question) -> list[Any]:
    """Values of the part's controls."""
    s = settings
    if isinstance(s, Digits):
        return [s.dim, s.layer, s.left, s.right, s.picture, s.drawing]
    if isinstance(s, Training):
        return [s.kd_weight, s.layer_weight, s.dim, list(s.layers), s.seed]
    return [s.question]


def _settings(part: str, *controls: Any) -> Digits | Training | Question:
    """What the controls say. Raises ValueError for what cannot run."""
    if part == "digits":
        dim, layer, *whole, drawing = controls
        return Digits(dim, layer, *(int(value or 0) for value in whole), drawing or "")
    if part == "training":
        *rest, seed = controls
        return Training(*rest, int(seed or 0))
    return Question(*controls)


# --- what happens -----------------------------------------------------------------------------------------------------
def _run(
    part: str, ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the part's outputs while it runs."""
    many = 1 + (part == "digits") + len(SEEN[part])
    yield from RUNS[part].follow(ticket, many, _pages(part, progress, many, *controls))


def _pages(part: str, progress: gr.Progress, many: int, *controls: Any) -> Iterator[list[Any]]:
    progress(0, desc="Beginning")
    told = seen = 0.0
    for moment in run.watch(_settings(part, *controls)):
        now, last = time.monotonic(), moment.done == 1.0
        if now - told < OFTEN and not last:
            yield []
            continue
        told = now
        progress(moment.done, desc=moment.said)
        if moment.result is None or (now - seen < SELDOM and not last):
            yield [f"{moment.said}.", *[gr.skip()] * (many - 1)]
        else:
            shown = [f"{moment.said}.", *_extras(moment.result), *everything(part, moment.result)]
            seen = time.monotonic()  # after the drawing, which a busy machine takes its time for
            yield shown


def _extras(result: run.Result) -> list[Any]:
    return [result] if isinstance(result, run.DigitsResult) else []


def _pair(*controls: Any) -> list[Any]:
    """Another pair at once if teacher and filters are there; what cannot be is explained where the verdict stands."""
    skipped = [gr.skip()] * len(SEEN["digits"])
    try:
        settings = _settings("digits", *controls)
    except ValueError as error:  # on the way to a drawing, so no alarm yet
        skipped[SEEN["digits"].index("verdict")] = pieces.paragraph(str(error))
        return [gr.skip(), gr.skip(), gr.skip(), *skipped]
    if not run.ready():
        return [CHANGED, settings.python(), gr.skip(), *skipped]
    result = run.finish(settings)
    return [FOLLOWED, settings.python(), result, *everything("digits", result)]


def _at(shown: run.DigitsResult, dim: int, layer: int, *others: Any) -> list[str]:
    """Another width or layer of the pair that is shown."""
    return [_changed("digits", dim, layer, *others)[1], *look(shown, dim, layer).values()]


def _changed(part: str, *controls: Any) -> list[Any]:
    """The program for other settings; impossible ones are explained when they are run."""
    try:
        return [CHANGED, _settings(part, *controls).python()]
    except ValueError:
        return [CHANGED, gr.skip()]


def _open(part: str, *controls: Any) -> list[Any]:
    """A part's results and its program."""
    return [*(gr.update(visible=p == part) for p in LABELS), _changed(part, *controls)[1]]


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

"""LoSparse's demo: split one matrix, watch rows go while a model learns, compress a language model at once.

`python -m apps.losparse` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gradio as gr

from apps import losparse_figures as figures
from apps import losparse_run as run
from apps.losparse_settings import (
    INITS,
    MODELS,
    MOST_PROMPT,
    MOST_QUESTION,
    MOST_QUESTIONS,
    PROMPT,
    QUESTIONS,
    RATES,
    RATIOS,
    SHARES,
    TOTALS,
    Language,
    Matrix,
    Training,
)
from apps.losparse_views import SEEN, everything, look
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = (
    "Keep a few directions of every weight and the few rows that the loss needs: the rest is really gone, so the layer "
    "is smaller and faster."
)
ABOUT = (
    "Each weight W becomes U V + S: U V is a low-rank part that all neurons share, and S keeps whole rows, those of "
    "the neurons that matter most; a neuron without its row still has its part of U V.",
    "One matrix alone is judged by its squared error, and there plain low rank always wins. Loss and perplexity are "
    "what counts, and they can rank the ways otherwise: rows are chosen by what their absence would do to the loss.",
    "In the training all rows compete under one threshold that falls along p(t). The language model is compressed "
    "without any training, on 1,024 tokens of Python's help for the factors and 512 for the rows; perplexity is of "
    "three other windows of it. Times are processor time, of the machine that ran them.",
)
CHANGED = "Not run yet with these settings: the results below are of the previous run."


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Matrix | Training | Language
    notice: str


EXAMPLES = {
    "One matrix": Example(
        Matrix(),
        "A fifth of a feed-forward matrix: the rows alone miss more than rows and low rank together. Move the sliders.",
    ),
    "It loses: squared error": Example(
        Matrix("smollm2", 0, "query", 0.05, 0.25),
        "A loss: this matrix has a steep spectrum, and at the same size plain low rank misses much less.",
    ),
    "A training": Example(
        Training(),
        "Rows go while two layers learn to tell questions apart; at one learning rate for all, the sum of both has the "
        "smallest test loss.",
    ),
    "It loses: own rates": Example(
        Training(own_rates=True),
        "A loss: when every way has the learning rate that suits it best, rows alone win in this short training.",
    ),
    "A language model": Example(
        Language(),
        "Compressed at once, without training: perplexity rises by half, and what it writes is visibly poorer.",
    ),
}
FIRST = next(iter(EXAMPLES))
LABELS = {"matrix": "Matrix", "training": "Training", "language": "Language"}
FIRSTS = {part: next(n for n, e in EXAMPLES.items() if run.PARTS[type(e.settings)] == part) for part in LABELS}
BUTTONS = {"matrix": "Time this layer", "training": "Train", "language": "Compress and write"}
READY = {
    "matrix": "Stored result; its times are of the machine that stored it. The pictures follow the sliders.",
    "training": "Stored result. A run trains four models and takes about half a minute.",
    "language": "Stored result. The first run takes about a minute, the next ones a third of it.",
}
RUNS = {part: Runs("Stopped. What is below is as far as it came.") for part in LABELS}
warm = run.warm


def split(
    model: str = "minilm-l6", layer: int = 0, matrix: str = "FFN in", low_rank: float = 0.05, remaining: float = 0.15,
    timed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One matrix as U V and the kept rows of S, beside both alone at the same size; `timed` adds its speed."""
    with serve.readable():
        settings = Matrix(model, layer, matrix, low_rank, remaining)
        result = run.finish(settings) if timed else run.split(settings)
        return {**result.to_data(), "verdict": figures.matrix_verdict(result)}


def train(
    ratio: float = 0.15, own_rates: bool = False,
    questions: list[str] = list(QUESTIONS),  # noqa: B006 - the endpoint's documented default
) -> dict[str, Any]:  # fmt: skip
    """Train a classifier and compress it in three ways: masks, losses, rows of results, and answers to questions."""
    with serve.readable():
        result = run.finish(Training(ratio, own_rates, questions))
        return {**result.to_data(), "verdict": figures.training_verdict(result)}


def compress(
    total: float = 0.9, low_rank: float = 0.05, init: str = "activation", prompt: str = PROMPT
) -> dict[str, Any]:
    """Compress SmolLM2 once, without training: perplexity, size and text before and after."""
    with serve.readable():
        result = run.finish(Language(total, low_rank, init, prompt))
        return {**result.to_data(), "verdict": figures.language_verdict(result)}


ENDPOINTS = {"matrix": split, "training": train, "language": compress}


def examples() -> dict[str, Any]:
    """The named examples: the endpoint, its settings, and what to notice."""
    found = {}
    for name, e in EXAMPLES.items():
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e.settings).items()}
        endpoint = f"losparse_{ENDPOINTS[run.PARTS[type(e.settings)]].__name__}"
        found[name] = {"endpoint": endpoint, "settings": settings, "notice": e.notice}
    return found


def thumbnail() -> str:
    """A pruning run's map for the gallery."""
    return pieces.picture(figures.density(run.stored()[FIRSTS["training"]]))


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
    with page("losparse", CLAIM, ABOUT, results[FIRST].settings.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            with gr.Tabs(selected=chosen) as switch:
                for part, make in MAKERS.items():
                    with gr.Tab(LABELS[part], id=part) as tabs[part]:
                        controls[part] = make(results[FIRSTS[part]].settings)
                        with gr.Row():
                            go = gr.Button(BUTTONS[part], variant="primary", min_width=80)
                            buttons[part] = go, gr.Button("Stop", min_width=80)
        with frame.result:
            for part, name in FIRSTS.items():
                with gr.Column(visible=part == chosen) as columns[part]:
                    heads[part] = [gr.Markdown(EXAMPLES[name].notice), note(READY[part])]
                    seen[part], scrub = _places(part, dict(zip(SEEN[part], drawn[name], strict=True)), results[name])
                    extras = scrub or []
                    seen[part]["extras"] = [gr.State(results[name]), *extras] if extras else []
        outputs = {part: [seen[part][name] for name in SEEN[part]] for part in LABELS}
        extras = {part: seen[part]["extras"] for part in LABELS}
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        for part in LABELS:
            RUNS[part].connect(
                buttons[part][0].click, buttons[part][1], partial(_run, part), controls[part],
                [heads[part][1], *extras[part], *outputs[part]],
            )  # fmt: skip
            fn, shown = (_split, outputs[part]) if part == "matrix" else (partial(_changed, part), [])
            changed: dict[str, Any] = {"inputs": controls[part], "outputs": [heads[part][1], frame.code, *shown]}
            gr.on([c.input for c in controls[part][part == "matrix" :]], fn, trigger_mode="always_last",
                  **changed, **quick)  # fmt: skip
            tabs[part].select(partial(_open, part), controls[part], [*columns.values(), frame.code], **quick)
        model, layer, kind = controls["matrix"][:3]
        model.input(_switch, [model, layer, kind], [layer, kind], **quick).then(
            _split, controls["matrix"], [heads["matrix"][1], frame.code, *outputs["matrix"]], **quick
        )
        shown, scrub = extras["training"]
        at = [seen["training"][name] for name in ("map", "share")]
        scrub.input(_at, [shown, scrub], at, trigger_mode="always_last", **quick)

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
            gr.api(fn, api_name=f"losparse_{fn.__name__}", **serve.ONE_AT_A_TIME)
        gr.api(examples, api_name="losparse_examples", queue=False)
    return blocks


# --- what the parts' controls are -------------------------------------------------------------------------------------
def _matrix_controls(s: Matrix) -> list[Any]:
    model = gr.Radio([("MiniLM-L6", "minilm-l6"), ("SmolLM2", "smollm2")], value=s.model, label="Model",
                     elem_classes="zq-few")  # fmt: skip
    _, layers, kinds = MODELS[s.model]
    layer = gr.Slider(0, layers - 1, s.layer, step=1, label="Layer")
    kind = gr.Radio(list(kinds), value=s.matrix, label="Matrix", elem_classes="zq-few")
    with gr.Row():
        shares = [
            gr.Slider(0, most, 100 * value, step=1, label=said, min_width=140)
            for most, value, said in ((40, s.low_rank, "Low-rank share, %"), (60, s.remaining, "Remaining rows, %"))
        ]
    return [model, layer, kind, *shares]


def _training_controls(s: Training) -> list[Any]:
    return [
        gr.Radio([(f"{r:.0%}", r) for r in RATIOS], value=s.ratio, label="Weights left", elem_classes="zq-few"),
        gr.Radio(list(RATES), value=_rates(s), label="Learning rate", elem_classes="zq-few"),
        gr.Textbox(
            "\n".join(s.questions), lines=3, max_lines=5, max_length=MOST_QUESTIONS * (MOST_QUESTION + 1),
            label=f"Your questions, one a line (at most {MOST_QUESTIONS})",
        ),
    ]  # fmt: skip


def _language_controls(s: Language) -> list[Any]:
    return [
        gr.Radio([(f"{t:.0%}", t) for t in TOTALS], value=s.total, label="Weights left", elem_classes="zq-few"),
        gr.Radio(
            [("none: rows only", 0.0), *((f"{r:.0%}", r) for r in SHARES[1:])], value=s.low_rank,
            label="Of these as low rank", elem_classes="zq-few",
        ),
        gr.Radio(list(INITS.items()), value=s.init, label="Low rank that fits", elem_classes="zq-few"),
        gr.Textbox(s.prompt, label="A text begins", lines=2, max_length=MOST_PROMPT),
    ]  # fmt: skip


MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    "matrix": _matrix_controls,
    "training": _training_controls,
    "language": _language_controls,
}


def _places(part: str, views: dict[str, str], result: run.Result) -> tuple[dict[str, Any], list[Any]]:
    """A part's results where they stand, and the slider of the training's map."""
    placed: dict[str, Any] = {}

    def pair(*names: str) -> None:
        with gr.Row(equal_height=False):
            for name in names:
                placed[name] = side_by_side(views[name], "zq-figure" if views[name].startswith("<figure") else None)

    scrub: list[Any] = []
    if part == "training":
        pair("map", "share")
        scrub = [gr.Slider(0, len(result.steps), len(result.steps), step=1, label="Scrub through the masks")]
    placed["verdict"] = gr.HTML(views["verdict"])
    for names in {
        "matrix": (("parts", "errors"), ("spectrum", "gains")),
        "training": (("outcome", "losses"),),
        "language": (("texts", "survivors"),),
    }[part]:
        pair(*names)
    for name in SEEN[part]:
        if name not in placed:
            placed[name] = gr.HTML(views[name])
    return placed, scrub


def _rates(settings: Training) -> str:
    return next(name for name, own in RATES.items() if own == settings.own_rates)


def _controls(settings: Matrix | Training | Language) -> list[Any]:
    """Values of the part's controls."""
    s = settings
    if isinstance(s, Matrix):
        _, layers, kinds = MODELS[s.model]
        shares = (round(100 * s.low_rank), round(100 * s.remaining))
        return [
            s.model, gr.update(maximum=layers - 1, value=s.layer), gr.update(choices=list(kinds), value=s.matrix),
            *shares,
        ]  # fmt: skip
    if isinstance(s, Training):
        return [s.ratio, _rates(s), "\n".join(s.questions)]
    return [s.total, s.low_rank, s.init, s.prompt]


def _settings(part: str, *controls: Any) -> Matrix | Training | Language:
    """What the controls say. Raises ValueError for what cannot run."""
    if part == "matrix":
        model, layer, kind, low_rank, remaining = controls
        return Matrix(model, int(layer or 0), kind, (low_rank or 0) / 100, (remaining or 0) / 100)
    if part == "training":
        ratio, rates, questions = controls
        return Training(ratio, RATES[rates], tuple(questions.split("\n")))
    return Language(*controls)


# --- what happens -----------------------------------------------------------------------------------------------------
def _run(
    part: str, ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the part's outputs while it runs."""
    many = 1 + (2 if part == "training" else 0) + len(SEEN[part])
    yield from RUNS[part].follow(ticket, many, _pages(part, progress, many, *controls))


def _pages(part: str, progress: gr.Progress, many: int, *controls: Any) -> Iterator[list[Any]]:
    progress(0, desc="Beginning")
    for moment in run.watch(_settings(part, *controls)):
        progress(moment.done, desc=moment.said)
        if moment.result is None:
            yield [f"{moment.said}.", *[gr.skip()] * (many - 1)]
        else:
            yield [f"{moment.said}.", *_extras(moment.result), *everything(part, moment.result)]


def _extras(result: run.Result) -> list[Any]:
    if not isinstance(result, run.TrainingResult):
        return []
    masks = len(result.steps)
    return [result, gr.update(maximum=max(1, masks), value=masks)]


def _split(*controls: Any) -> list[Any]:
    """The matrix at once, untimed; a setting that is not possible is explained where the verdict stands."""
    skipped = [gr.skip()] * len(SEEN["matrix"])
    try:
        settings = _settings("matrix", *controls)
        result = run.split(settings)
    except ValueError as error:  # on the way to a setting, so no alarm yet
        return [gr.skip(), gr.skip(), pieces.paragraph(str(error)), *skipped[1:]]
    return ["The pictures follow your sliders; press the button for its speed.", settings.python(),
            *everything("matrix", result)]  # fmt: skip


def _changed(part: str, *controls: Any) -> list[Any]:
    """The program for other settings; impossible ones are explained when they are run."""
    try:
        return [CHANGED, _settings(part, *controls).python()]
    except ValueError:
        return [CHANGED, gr.skip()]


def _open(part: str, *controls: Any) -> list[Any]:
    """A part's results and its program."""
    return [*(gr.update(visible=p == part) for p in LABELS), _changed(part, *controls)[1]]


def _switch(model: str, layer: int, kind: str) -> list[Any]:
    """Layers and matrices of another model."""
    _, layers, kinds = MODELS[model]
    kept = kind if kind in kinds else next(iter(kinds))
    return [
        gr.update(maximum=layers - 1, value=min(int(layer), layers - 1)),
        gr.update(choices=list(kinds), value=kept),
    ]


def _at(shown: run.TrainingResult, event: int) -> list[str]:
    return list(look(shown, event).values())


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

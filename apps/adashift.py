"""AdaShift's demo: watch which way four rules walk, follow one of them by hand, train on digits.

`python -m apps.adashift` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gradio as gr

from apps import adashift_figures as figures
from apps import adashift_run as run
from apps.adashift_settings import (
    BY_HAND,
    DELTAS,
    DRAWN,
    EPOCHS,
    EPSILONS,
    FEW,
    IDENTITY,
    LANES,
    MOST_BETA1,
    MOST_BETA2,
    MOST_C,
    MOST_D,
    MOST_GRADIENTS,
    MOST_N,
    MOST_OPTIMISERS,
    MOST_SEED,
    NAMES,
    OWN,
    RATES,
    SEQUENTIAL,
    STEPS,
    STOCHASTIC,
    Hand,
    Training,
    Walk,
    numbers,
    typed,
)
from apps.adashift_views import FIRST_STEP, SEEN, everything, hand
from zq_lib.adashift.counterexamples import ADASHIFT
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = (
    "Adam divides a gradient by a number that already contains it, and so can walk the wrong way; AdaShift divides it "
    "by one from n steps ago."
)
ABOUT = (
    "Every step has a linear loss with gradient C or -1. Their mean is positive, so theta should go down. Adam gives "
    "the rare large gradient a small step and the small ones a large step: the net update factor k, how far a gradient "
    "moves theta over all time per unit of itself, is not the same for both.",
    "In theory Adam goes the wrong way where delta, the mean gradient, is below delta_c = (1 - beta2) C / 2. The bands "
    f"hold {LANES} runs with their own draws. In a sequence that repeats itself nothing is independent, and a shift of "
    "a whole period changes nothing.",
    "The digits are scikit-learn's, the network has two hidden layers of 256 ReLU units. All optimisers start alike "
    "and see the same batches. At this size nobody wins: choose AdaShift for the argument, not for a better accuracy.",
)
CHANGED = "Not run yet with these settings: the results below are of the previous run."
FOLLOWED = "The pictures follow your settings."
OFTEN, SELDOM = 0.3, 1.5  # seconds between two messages of a run, and between two drawings


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Walk | Hand | Training
    notice: str


EXAMPLES = {
    "Adam walks away": Example(
        Walk(),
        "The mean gradient is +1, so down is right. Adam goes up in every run: see how little k it gives the gradient "
        "101. AdaShift gives both the same and goes down.",
    ),
    "Same period: AdaShift fails": Example(
        Walk(SEQUENTIAL, C=3.0, beta2=0.1, n=3, steps=1_000),
        "A loss: the gradients 3, -1, -1 repeat, and n = 3 looks back one whole period. AdaShift is then Adam, and "
        "both walk the wrong way. With n = 1 or 2 it is right.",
    ),
    "AMSGrad creeps": Example(
        Walk(delta=2.0, beta2=0.8, steps=10_000),
        "AMSGrad goes the right way too, for it divides by the largest v so far. That is safe, and slow: compare how "
        "far it comes with AdaShift, which divides by a typical v.",
    ),
    "No difference": Example(
        Walk(C=11.0, delta=2.0, beta2=0.99),
        "delta is far above delta_c: all four go the right way, nearly equally fast. This is the usual case, in which "
        "AdaShift gains nothing over Adam.",
    ),
    "Sparse gradients: the identity diverges": Example(
        Training(eps=1e-10, seed=1),
        "A loss: with one v for every weight (none) and the published eps, weights whose gradient was almost zero n "
        "steps ago make huge steps. Adam and one v per layer (max) learn. Try eps 1e-5.",
    ),
}
FIRST = next(iter(EXAMPLES))
PREPARED = "By hand"  # computed when the page is built: it takes milliseconds
OPENINGS = EXAMPLES | {
    PREPARED: Example(
        Hand(),
        "Go through the steps. AdaShift only remembers g_1; when 3 comes again, v has just seen a small gradient, not "
        "this one. Then take n = 3: what goes into v equals g_t, as for Adam.",
    )
}
LABELS = {"walk": "Walk", "hand": "By hand", "digits": "Digits"}
FIRSTS = {part: next(n for n, e in OPENINGS.items() if run.PARTS[type(e.settings)] == part) for part in LABELS}
READY = {
    "walk": "Stored result. The pictures follow your settings.",
    "hand": "Everything here is computed at once.",
    "digits": "Stored result. A run takes a few seconds.",
}
RUNS = Runs("Stopped. What is below is as far as it came.")
PROBLEMS = {"stochastic": STOCHASTIC, "sequential": SEQUENTIAL, "own": OWN, "own, drawn": DRAWN}
warm = run.warm


def walk(
    problem: str = STOCHASTIC, C: float = 101.0, delta: float = 1.0, d: int = 3,
    gradients: list[float] = [3.0, -1.0, -1.0],  # noqa: B006 - the endpoint's documented default
    beta2: float = 0.9, n: int = 1, beta1: float = 0.0, steps: int = 5_000,
) -> dict[str, Any]:  # fmt: skip
    """Adam, AMSGrad, AdaShift and SGD on one problem: theta, net update factors, and who goes the wrong way."""
    with serve.readable():
        result = run.walk(Walk(problem, C, delta, d, gradients, beta2, n, beta1, steps))
        return {**result.to_data(), "verdict": figures.walk_verdict(result)}


def by_hand(
    rule: str = ADASHIFT,
    gradients: list[float] = [3.0, -1.0, -1.0, 3.0, -1.0, -1.0, 3.0, -1.0, -1.0],  # noqa: B006 - the same
    n: int = 1, beta1: float = 0.0, beta2: float = 0.1,
) -> dict[str, Any]:  # fmt: skip
    """A short sequence step by step at rate 1: v, m, step, theta, and every gradient's net update factor so far."""
    with serve.readable():
        result = run.by_hand(Hand(rule, gradients, n, beta1, beta2))
        return {**result.to_data(), "verdict": figures.hand_words(result, len(result.rows))}


def train(
    optimizers: list[str] = ["Adam", "AdaShift max", IDENTITY],  # noqa: B006 - the same
    rate: float | None = None, eps: float = 1e-5, epochs: int = 10, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train a network on handwritten digits with some optimisers, at one rate or each at its own (None)."""
    with serve.readable():
        result = run.finish(Training(optimizers, rate, eps, epochs, seed))
        return {**result.to_data(), "verdict": figures.training_verdict(result)}


ENDPOINTS = {"walk": walk, "hand": by_hand, "digits": train}


def examples() -> dict[str, Any]:
    """The named examples: the endpoint, its settings, and what to notice."""
    found = {}
    for name, e in EXAMPLES.items():
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e.settings).items()}
        endpoint = f"adashift_{ENDPOINTS[run.PARTS[type(e.settings)]].__name__}"
        found[name] = {"endpoint": endpoint, "settings": settings, "notice": e.notice}
    return found


def thumbnail() -> str:
    """The first walk, for the gallery."""
    return pieces.picture(figures.paths(run.stored()[FIRST]))


def write_first_view() -> None:
    """Run every example and store the results that the page opens with."""
    run.store({name: run.finish(e.settings) for name, e in EXAMPLES.items()})


def build() -> gr.Blocks:
    """The page, with a result in each of its three parts."""
    results = {**run.stored(), PREPARED: run.finish(OPENINGS[PREPARED].settings)}
    drawn = {name: everything(part, results[name]) for part, name in FIRSTS.items()}
    chosen = run.PARTS[type(EXAMPLES[FIRST].settings)]
    controls: dict[str, list[Any]] = {}
    columns: dict[str, gr.Column] = {}
    heads: dict[str, list[Any]] = {}  # notice and state
    seen: dict[str, dict[str, Any]] = {}
    tabs: dict[str, gr.Tab] = {}
    views = {part: dict(zip(SEEN[part], drawn[name], strict=True)) for part, name in FIRSTS.items()}
    mark = gr.HTML(views["walk"]["mark"], render=False)
    with page("adashift", CLAIM, ABOUT, results[FIRST].settings.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            with gr.Tabs(selected=chosen) as switch:
                for part, make in MAKERS.items():
                    with gr.Tab(LABELS[part], id=part) as tabs[part]:
                        if part == "digits":  # above its many controls, so that it is seen without scrolling
                            with gr.Row():
                                go = gr.Button("Train", variant="primary", min_width=80)
                                stop = gr.Button("Stop", min_width=80)
                        controls[part] = make(results[FIRSTS[part]].settings, mark)
        with frame.result:
            for part, name in FIRSTS.items():
                with gr.Column(visible=part == chosen) as columns[part]:
                    heads[part] = [gr.Markdown(OPENINGS[name].notice), note(READY[part])]
                    if part == "hand":
                        at, back, onward = _steps(len(results[name].rows))
                    seen[part] = _places(part, views[part])
        seen["walk"]["mark"] = mark
        outputs = {part: [seen[part][name] for name in SEEN[part]] for part in LABELS}
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        latest: dict[str, Any] = {"trigger_mode": "always_last", **quick}
        walked = [heads["walk"][1], frame.code, *outputs["walk"]]
        problem, *others = controls["walk"]
        gr.on(_edits(others), _walk, controls["walk"], walked, **latest)
        problem.input(_switch, problem, others[:4], **quick).then(_walk, controls["walk"], walked, **quick)

        stepped = [frame.code, at, *outputs["hand"]]
        gr.on(_edits([at, *controls["hand"]]), _hand, [at, *controls["hand"]], stepped, **latest)
        for button, by in ((back, -1), (onward, 1)):
            button.click(partial(_hand, by=by), [at, *controls["hand"]], stepped, trigger_mode="multiple", **quick)

        RUNS.connect(go.click, stop, _run, controls["digits"], [heads["digits"][1], *outputs["digits"]])
        gr.on([c.input for c in controls["digits"]], _changed, controls["digits"], [heads["digits"][1], frame.code],
              **latest)  # fmt: skip
        for part in LABELS:
            tabs[part].select(partial(_open, part), controls[part], [*columns.values(), frame.code], **quick)

        def show(name: str, request: gr.Request) -> list[Any]:
            result, part = results[name], run.PARTS[type(results[name].settings)]
            RUNS.end(request)
            if name not in drawn:
                drawn[name] = everything(part, result)
            found = [gr.update(selected=part), *_visible(part), result.settings.python()]
            for p in LABELS:
                if p == part:
                    found += [EXAMPLES[name].notice, READY[p], *_controls(result.settings), *drawn[name]]
                else:
                    found += [gr.skip()] * (2 + len(controls[p]) + len(outputs[p]))
            return found

        every = [c for p in LABELS for c in (*heads[p], *controls[p], *outputs[p])]
        example.input(show, example, [switch, *columns.values(), frame.code, *every], **quick)
        for fn in ENDPOINTS.values():
            gr.api(fn, api_name=f"adashift_{fn.__name__}", **serve.ONE_AT_A_TIME)
        gr.api(examples, api_name="adashift_examples", queue=False)
    return blocks


# --- what the parts' controls are -------------------------------------------------------------------------------------
def _walk_controls(s: Walk, mark: gr.HTML) -> list[Any]:
    problem = gr.Radio(list(PROBLEMS.items()), value=s.problem, label="Gradients", elem_classes="zq-few")
    half: dict[str, Any] = {"min_width": 140}
    with gr.Row():
        with gr.Column(**half):
            size = gr.Slider(2, MOST_C, s.C, step=1, label="Gradient C")
        with gr.Column(**half):
            delta = gr.Slider(*DELTAS, s.delta, step=0.05, label="delta")
            mark.render()
            period = gr.Slider(2, MOST_D, s.d, step=1, label="Period d", visible=False)
    own = gr.Textbox(typed(s.gradients), label=f"Your gradients (2 to {MOST_GRADIENTS} numbers)", visible=False,
                     max_length=20 * MOST_GRADIENTS)  # fmt: skip
    with gr.Row():
        beta2 = gr.Slider(0, MOST_BETA2, s.beta2, step=0.001, label="beta2", **half)
        beta1 = gr.Slider(0, MOST_BETA1, s.beta1, step=0.01, label="beta1", **half)
    with gr.Row():
        n = gr.Slider(1, MOST_N, s.n, step=1, label="Shift n", **half)
        steps = gr.Slider(*STEPS, s.steps, step=500, label="Steps", **half)
    return [problem, size, delta, period, own, beta2, n, beta1, steps]


def _hand_controls(s: Hand, _: gr.HTML) -> list[Any]:
    rule = gr.Radio(list(BY_HAND), value=s.rule, label="Rule", elem_classes="zq-few")
    gradients = gr.Textbox(typed(s.gradients), label=f"Gradients (2 to {FEW} numbers)", max_length=20 * FEW)
    n = gr.Slider(1, FEW - 1, s.n, step=1, label="Shift n")
    with gr.Row():
        beta1 = gr.Slider(0, MOST_BETA1, s.beta1, step=0.01, label="beta1", min_width=140)
        beta2 = gr.Slider(0, MOST_BETA2, s.beta2, step=0.001, label="beta2", min_width=140)
    return [rule, gradients, n, beta1, beta2]


def _digits_controls(s: Training, _: gr.HTML) -> list[Any]:
    few: dict[str, Any] = {"elem_classes": "zq-few"}
    rates = [("each its best", 0.0), *((f"{r:g}", r) for r in RATES)]
    optimizers = gr.CheckboxGroup(
        list(NAMES), value=list(s.optimizers), label=f"Optimisers (up to {MOST_OPTIMISERS})", **few
    )
    rate = gr.Radio(rates, value=s.rate or 0.0, label="Learning rate", **few)
    eps = gr.Radio([(f"{e:.0e}", e) for e in EPSILONS], value=s.eps, label=f"eps of {IDENTITY}", **few)
    with gr.Row():
        epochs = gr.Slider(*EPOCHS, s.epochs, step=1, label="Epochs", min_width=140)
        seed = gr.Slider(0, MOST_SEED, s.seed, step=1, label="Seed", min_width=140)
    return [optimizers, rate, eps, epochs, seed]


MAKERS: dict[str, Callable[[Any, gr.HTML], list[Any]]] = {
    "walk": _walk_controls,
    "hand": _hand_controls,
    "digits": _digits_controls,
}


def _steps(many: int) -> tuple[gr.Slider, gr.Button, gr.Button]:
    """Where the calculation by hand is, and the two ways on."""
    with gr.Row(equal_height=True):
        at = gr.Slider(1, many, FIRST_STEP, step=1, label="Step", min_width=160, scale=3)
        return at, gr.Button("Back", min_width=60), gr.Button("Next", variant="primary", min_width=60)


def _places(part: str, views: dict[str, str]) -> dict[str, Any]:
    """A part's results where they stand; the mark stands below its slider."""
    placed: dict[str, Any] = {}
    for names in {
        "walk": (("paths", "factors"), "verdict", "table"),
        "hand": ("words", "table", ("spent", "factors")),
        "digits": (("losses", "accuracy"), "verdict", "table"),
    }[part]:
        if isinstance(names, str):
            placed[names] = gr.HTML(views[names])
            continue
        with gr.Row(equal_height=False):
            for name in names:
                placed[name] = side_by_side(views[name], "zq-figure" if views[name].startswith("<figure") else None)
    return placed


def _edits(controls: list[Any]) -> list[Any]:
    """What happens when a control is used. A text box tells of keys alone by `input`, not of what is pasted."""
    return [c.change if isinstance(c, gr.Textbox) else c.input for c in controls]


def _switch(problem: str) -> list[Any]:
    """Of C, delta, d and one's own gradients what belongs to a problem."""
    known = {STOCHASTIC: (1, 1, 0, 0), SEQUENTIAL: (1, 0, 1, 0)}.get(problem, (0, 0, 0, 1))
    return [gr.update(visible=bool(shown)) for shown in known]


def _visible(part: str) -> list[Any]:
    return [gr.update(visible=p == part) for p in LABELS]


def _controls(settings: Walk | Training) -> list[Any]:
    """Values of the part's controls."""
    s = settings
    if isinstance(s, Training):
        return [list(s.optimizers), s.rate or 0.0, s.eps, s.epochs, s.seed]
    values = (s.C, s.delta, s.d, typed(s.gradients))
    shown = [{**update, "value": value} for update, value in zip(_switch(s.problem), values, strict=True)]
    return [s.problem, *shown, s.beta2, s.n, s.beta1, s.steps]


def _settings(part: str, *controls: Any) -> Walk | Hand | Training:
    """What the controls say. Raises ValueError for what cannot run."""
    if part == "walk":
        problem, size, delta, period, own, beta2, n, beta1, steps = controls
        gradients = numbers(own) if problem in (OWN, DRAWN) else Walk.gradients
        rest = (beta2 or 0, int(n or 0), beta1 or 0, int(steps or 0))
        return Walk(problem, size or 0, delta or 0, int(period or 0), gradients, *rest)
    if part == "hand":
        rule, gradients, n, beta1, beta2 = controls
        return Hand(rule, numbers(gradients), int(n or 0), beta1 or 0, beta2 or 0)
    optimizers, rate, eps, epochs, seed = controls
    return Training(optimizers, rate or None, eps, int(epochs or 0), int(seed or 0))


# --- what happens -----------------------------------------------------------------------------------------------------
def _walk(*controls: Any) -> list[Any]:
    """The walk at once; a setting that is not possible is explained where the verdict stands."""
    try:
        settings = _settings("walk", *controls)
        result = run.walk(settings)
    except ValueError as error:  # on the way to a setting, so no alarm yet
        return [gr.skip(), gr.skip(), *_instead("walk", "verdict", error)]
    return [FOLLOWED, settings.python(), *everything("walk", result)]


def _hand(step: int, *controls: Any, by: int = 0) -> list[Any]:
    """The calculation up to a step, or `by` steps on."""
    try:
        settings = _settings("hand", *controls)
        result = run.by_hand(settings)
    except ValueError as error:
        return [gr.skip(), gr.skip(), *_instead("hand", "words", error)]
    many = len(result.rows)
    step = min(max(int(step or 1) + by, 1), many)
    return [settings.python(), gr.update(value=step, maximum=many), *hand(result, step).values()]


def _instead(part: str, place: str, error: ValueError) -> list[Any]:
    """The error as words in one place, and the rest as it is."""
    return [pieces.paragraph(str(error)) if name == place else gr.skip() for name in SEEN[part]]


def _run(
    ticket: list[str], *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the training's outputs while it runs."""
    yield from RUNS.follow(ticket, 1 + len(SEEN["digits"]), _pages(progress, *controls))


def _pages(progress: gr.Progress, *controls: Any) -> Iterator[list[Any]]:
    progress(0, desc="Beginning")
    told = seen = 0.0
    for moment in run.watch_training(_settings("digits", *controls)):
        now, last = time.monotonic(), moment.done == 1.0
        if now - told < OFTEN and not last:
            yield []
            continue
        told = now
        progress(moment.done, desc=moment.said)
        if now - seen < SELDOM and not last:
            yield [f"{moment.said}.", *[gr.skip()] * len(SEEN["digits"])]
        else:
            seen = now
            yield [f"{moment.said}.", *everything("digits", moment.result)]


def _changed(*controls: Any) -> list[Any]:
    """The program for another training; an impossible one is explained when it is run."""
    return [CHANGED, _program("digits", *controls)]


def _program(part: str, *controls: Any) -> Any:
    try:
        return _settings(part, *controls).python()
    except ValueError:
        return gr.skip()


def _open(part: str, *controls: Any) -> list[Any]:
    """A part's results and its program."""
    return [*_visible(part), _program(part, *controls)]


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

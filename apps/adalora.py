"""AdaLoRA's demo, the rank-allocation theatre: hide needs or take real text, and watch a budget find its place.

`python -m apps.adalora` opens it; `--write-first-view` stores the examples' results again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps import adalora_figures as figures
from apps import adalora_run as run
from apps.adalora_run import Moment, Result
from apps.adalora_settings import KINDS, LIMITS, MOST_PLANTED, MOST_STEPS, PLANTS, PROBLEMS, RATES, Settings
from apps.adalora_views import everything, look, news
from zq_lib.adalora.config import SCORES
from zq_lib.adalora.figures import rank_map
from zq_lib.ui import pieces, serve
from zq_lib.ui.page import note, page, side_by_side
from zq_lib.ui.runs import Runs

CLAIM = (
    "Every matrix begins with the same rank; while the budget shrinks, AdaLoRA lets go of what the loss needs least."
)
ABOUT = (
    "Adapters in SVD form, W + s P diag(λ) Q, are trained on all matrices of a small encoder; at every allocation the "
    "triplets with the smallest scores lose their λ, all matrices competing, until the budget is met.",
    "With planted needs the truth is known: a teacher differs from the model by hidden low-rank changes, and the model "
    "learns its hidden states from film review snippets. TREC questions are real text, where nobody knows.",
    "The fair comparison is at the same final budget and scale: LoRA of equal ranks, and a LoRA of the initial rank "
    "that is cut afterwards by SVD. The latter is a strong rival, and where all matrices need alike, equal ranks win.",
)
READY = "Stored result of this example. Change anything and press Train."
OFTEN, SELDOM = 0.3, 1.5  # seconds between two updates of the page, and between two drawings, of a training


@dataclass(frozen=True)
class Example:
    """A named setting and what to notice in its result."""

    settings: Settings
    notice: str


EXAMPLES = {
    "Four hidden needs": Example(
        Settings(),
        "Four of twelve matrices hide a need of rank 8. Most of the budget finds its way there.",
    ),
    "Feed-forward": Example(
        Settings(plant=PLANTS["feed-forward"]),
        "All needs are in three feed-forward matrices: uneven needs are where uneven ranks pay.",
    ),
    "Score by |λ|": Example(
        Settings(score="magnitude"),
        "The same needs, with triplets ranked by the size of λ alone: the simple score finds them at least as well.",
    ),
    "It loses": Example(
        Settings(plant=PLANTS["everywhere"]),
        "A loss: all matrices need the same, so equal ranks are right from the first step, and moving them only costs.",
    ),
    "Real questions": Example(
        Settings(problem="questions"),
        "Real text, 80 steps: λ begin at zero, so AdaLoRA starts slowly and equal ranks win. The wide LoRA, cut or "
        "not, learns nothing at this learning rate; try 0.001.",
    ),
}
FIRST = next(iter(EXAMPLES))
MATRIX = (1, "query")  # whose triplets are shown first
RUNS = Runs("Stopped. The map shows this run as far as it came.", "Nothing was trained.")
SEEN = (
    "map",
    "budget",
    "losses",
    "verdict",
    "bars",
    "table",
    "found",
    "precision",
    "values",
    "scores",
    "files",
    "code",
)


def warm() -> None:
    """Build the first example's problem."""
    s = EXAMPLES[FIRST].settings
    run.problem(s.problem, s.plant, s.seed, s.rate)


def train(
    problem: str = "planted",
    plant: list[int] = list(PLANTS["four matrices"]),  # noqa: B006 - the endpoint's documented default
    init_rank: int = 8,
    target_rank: int = 2,
    steps: int | None = None,
    warmup: float = 0.1,
    final: float = 0.35,
    interval: int = 10,
    penalty: float = 0.01,
    score: str = "adalora",
    rate: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train AdaLoRA and its rivals: rows, ranks, the whole trace and losses, as JSON."""
    with serve.readable():
        s = Settings(
            problem, plant, init_rank, target_rank, steps, warmup, final, interval, penalty, score, rate, seed
        )  # fmt: skip
        result = run.train(s)
        return {**result.to_data(), "ranks": result.ranks(), "verdict": figures.verdict(result)}


def plan(
    problem: str = "planted", init_rank: int = 8, target_rank: int = 2, steps: int | None = None, warmup: float = 0.1,
    final: float = 0.35, interval: int = 10,
) -> dict[str, Any]:  # fmt: skip
    """What a setting would do, without training: budgets, allocation steps, parameters and warnings, as JSON."""
    with serve.readable():
        made = Settings(
            problem, init_rank=init_rank, target_rank=target_rank, steps=steps, warmup=warmup, final=final,
            interval=interval,
        ).plan  # fmt: skip
        return {
            "budgets": [list(pair) for pair in made.budgets()],
            "allocations": made.schedule.allocation_steps(),
            "parameters_at_start": made.parameters_at_start,
            "parameters": list(made.parameters),
            "warnings": list(made.warnings),
        }


def examples() -> dict[str, Any]:
    """The named examples: settings for `adalora_train`, and what to notice."""
    return {
        name: {"settings": {**vars(e.settings), "plant": list(e.settings.plant)}, "notice": e.notice}
        for name, e in EXAMPLES.items()
    }


def thumbnail() -> str:
    """The first result's map for the gallery."""
    first = run.stored()[FIRST]
    return pieces.picture(rank_map(first.ranks(), first.settings.init_rank, list(first.settings.planted)))


def write_first_view() -> None:
    """Run every example and store the results that the page opens with."""
    run.store({name: run.train(e.settings) for name, e in EXAMPLES.items()})


def build() -> gr.Blocks:
    """The page, complete with the first example's stored result."""
    results = run.stored()
    first = results[FIRST]
    s, views = first.settings, everything(first, *MATRIX)
    drawn = {FIRST: views}
    with page("adalora", CLAIM, ABOUT, s.python()) as (blocks, frame):
        with frame.controls:
            example = gr.Radio(list(EXAMPLES), value=FIRST, label="Examples", elem_classes="zq-few")
            problem = gr.Radio(list(PROBLEMS.items()), value=s.problem, label="Problem", elem_classes="zq-few")
            with gr.Row():
                init_rank, target_rank = (
                    gr.Slider(*LIMITS[name], getattr(s, name), step=1, label=said, min_width=140)
                    for name, said in (("init_rank", "Initial rank"), ("target_rank", "Target rank"))
                )
            with gr.Row():
                go = gr.Button("Train", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            planned = gr.HTML(_planned(s), elem_classes="zq-note")
            with gr.Accordion("Where should rank go? Your own needs", open=False) as needs:
                plants = gr.Radio(list(PLANTS), value=_plant_name(s.plant), label="Hidden ranks", elem_classes="zq-few")
                sliders = []
                for kind in KINDS:
                    with gr.Row():
                        sliders += [
                            gr.Slider(0, MOST_PLANTED, step=1, label=f"{kind}, layer {layer}", min_width=140)
                            for layer in (0, 1)
                        ]
                plant = [*sliders[::2], *sliders[1::2]]  # layer by layer
                for slider, rank in zip(plant, s.plant, strict=True):
                    slider.value = rank
            with gr.Accordion("More settings", open=False):
                score = gr.Radio(list(SCORES), value=s.score, label="Score of a triplet", elem_classes="zq-few")
                steps = gr.Slider(20, MOST_STEPS[s.problem], s.steps, step=1, label="Steps")
                with gr.Row():
                    warmup, final = (
                        gr.Slider(0, 100 * LIMITS[name][1], 100 * getattr(s, name), step=5, label=said, min_width=140)
                        for name, said in (("warmup", "Warm-up, % of steps"), ("final", "Final phase, %"))
                    )
                interval = gr.Slider(*LIMITS["interval"], s.interval, step=1, label="Steps between allocations")
                penalty = gr.Slider(*LIMITS["penalty"], s.penalty, step=0.01, label="Weight of the penalty")
                rate = gr.Radio(list(RATES), value=s.rate, label="Learning rate", elem_classes="zq-few")
                seed = gr.Slider(*LIMITS["seed"], s.seed, step=1, label="Seed")
        with frame.result:
            notice = gr.Markdown(EXAMPLES[FIRST].notice)
            state = note(READY)
            seen: dict[str, Any] = {"map": gr.HTML(views["map"])}
            scrub = gr.Slider(0, first.events, first.events, step=1, label="Scrub through the allocations")
            with gr.Row(equal_height=False):
                for name in ("budget", "losses"):
                    seen[name] = side_by_side(views[name], "zq-figure")
            seen["verdict"] = gr.HTML(views["verdict"])
        with frame.numbers:
            with gr.Row(equal_height=False):
                seen["bars"] = side_by_side(views["bars"], "zq-figure")
                for name in ("table", "found"):
                    with gr.Column(min_width=280):
                        seen[name] = gr.HTML(views[name])
                        if name == "found":
                            seen["precision"] = gr.HTML(views["precision"])
            with gr.Row(equal_height=False):
                with gr.Column(min_width=280):
                    layer = gr.Radio([0, 1], value=MATRIX[0], label="Triplets of layer", elem_classes="zq-few")
                    kind = gr.Radio(list(KINDS), value=MATRIX[1], label="and matrix", elem_classes="zq-few")
                    seen["files"] = gr.HTML(views["files"])
                for name in ("values", "scores"):
                    seen[name] = side_by_side(views[name], "zq-figure")
        seen["code"] = frame.code
        shown = gr.State(first)
        schedule = [problem, init_rank, target_rank, steps, warmup, final, interval]
        controls = [*schedule, penalty, score, rate, seed, *plant]
        parts = [seen[name] for name in SEEN]
        moving = [state, shown, scrub, layer]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, **private}
        RUNS.connect(go.click, stop, _run, [layer, kind, *controls], [*moving, *parts])
        problem.input(_switch, problem, [steps, rate, needs], **quick).then(_plan, schedule, planned, **quick)
        for control in schedule[1:]:
            control.input(_plan, schedule, planned, trigger_mode="always_last", **quick)
        plants.input(lambda name: list(PLANTS[name]), plants, plant, **quick)
        gr.on([slider.input for slider in plant], lambda *r: _plant_name(r), plant, plants, **quick)
        scrub.input(_at, [shown, scrub], seen["map"], trigger_mode="always_last", **quick)
        gr.on(
            [scrub.input, layer.input, kind.input], look, [shown, scrub, layer, kind],
            [seen[name] for name in ("budget", "values", "scores")], trigger_mode="always_last", **quick,
        )  # fmt: skip

        def show(name: str, request: gr.Request) -> list[Any]:
            RUNS.end(request)
            result, chosen = results[name], EXAMPLES[name]
            if name not in drawn:
                drawn[name] = everything(result, *MATRIX)
            s = result.settings
            moved = [READY, result, _scrubber(result), _layers(s, MATRIX[0])]
            above = [chosen.notice, MATRIX[1], _plant_name(s.plant), *_switch(s.problem)[2:], _planned(s)]
            return [*above, *moved, *_controls(s), *(drawn[name][n] for n in SEEN)]

        above = [notice, kind, plants, needs, planned]
        example.input(show, example, [*above, *moving, *controls, *parts], **quick)
        gr.api(train, api_name="adalora_train", **serve.ONE_AT_A_TIME)
        gr.api(plan, api_name="adalora_plan", queue=False)
        gr.api(examples, api_name="adalora_examples", queue=False)
    return blocks


def _run(
    ticket: list[str], layer: int, kind: str, *controls: Any,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[list[Any]]:  # fmt: skip
    """Yield the page's outputs while AdaLoRA and its rivals train."""
    yield from RUNS.follow(ticket, 4 + len(SEEN), _pages(progress, layer, kind, *controls))


def _pages(progress: gr.Progress, layer: int, kind: str, *controls: Any) -> Iterator[list[Any]]:
    progress(0, desc="Building the problem")
    for moment, outputs in _watched(_settings(*controls), layer, kind):
        if outputs:
            progress(moment.done, desc=moment.said)
        yield [f"{moment.said}.", *outputs] if outputs else []


def _watched(settings: Settings, layer: int, kind: str) -> Iterator[tuple[Moment, list[Any]]]:
    """Every moment of a training, with the page's outputs where it is time to show some."""
    shown = drawn = 0.0
    for moment in run.watch(settings):
        now = time.monotonic()
        if moment.news == "step" and now - shown < OFTEN:
            yield moment, []
            continue
        draw = now - drawn >= SELDOM
        parts, shown, drawn = news(moment, layer, kind, draw), now, now if draw else drawn
        moved = [gr.skip()] * 3
        if moment.news == "begun":
            moved = [moment.result, _scrubber(moment.result), _layers(settings, layer)]
        elif "map" in parts:
            moved[1] = _scrubber(moment.result)
        yield moment, [*moved, *(parts.get(name, gr.skip()) for name in SEEN)]


def _at(shown: Result, event: int) -> str:
    return figures.theatre(shown, int(event))


def _scrubber(result: Result) -> Any:
    return gr.update(maximum=max(1, result.events), value=result.events)


def _layers(settings: Settings, layer: int) -> Any:
    many = settings.size.layers
    return gr.update(choices=list(range(many)), value=min(int(layer), many - 1))


def _settings(
    problem: str, init_rank: int, target_rank: int, steps: int, warmup: float, final: float, interval: int,
    penalty: float = 0.01, score: str = "adalora", rate: float | None = None, seed: int = 0, *plant: int,
) -> Settings:  # fmt: skip
    """What the controls say."""
    hidden = tuple(map(int, plant)) or PLANTS["four matrices"]
    return Settings(
        problem, hidden, int(init_rank), int(target_rank), int(steps), warmup / 100, final / 100, int(interval),
        penalty, score, rate, int(seed),
    )  # fmt: skip


def _controls(settings: Settings) -> list[Any]:
    s = settings
    steps = gr.update(maximum=MOST_STEPS[s.problem], value=s.steps)
    schedule = [s.problem, s.init_rank, s.target_rank, steps, 100 * s.warmup, 100 * s.final, s.interval]
    return [*schedule, s.penalty, s.score, s.rate, s.seed, *s.plant]


def _switch(problem: str) -> list[Any]:
    """Steps and learning rate of another problem, and whether needs can be hidden in it."""
    s = Settings(problem)
    return [gr.update(maximum=MOST_STEPS[problem], value=s.steps), s.rate, gr.update(visible=s.is_planted)]


def _plan(*schedule: Any) -> str:
    try:
        return _planned(_settings(*schedule))
    except ValueError as error:  # on the way to a setting, so no alarm yet
        return pieces.paragraph(str(error))


def _planned(settings: Settings) -> str:
    return pieces.paragraph(figures.plan_sentence(settings))


def _plant_name(plant: tuple[int, ...]) -> str | None:
    return next((name for name, ranks in PLANTS.items() if ranks == tuple(plant)), None)


if __name__ == "__main__":
    serve.main(build, warm, write_first_view)

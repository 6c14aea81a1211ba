"""What the TED page's three parts compute, step by step so that Stop is heard. Library calls only."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.ted_settings import COLUMNS, INK, ROWS, Digits, Question, Training
from zq_lib.core.lab import Row
from zq_lib.ted import arms, digits, lab, text
from zq_lib.ted.arms import START, Arm, Problem
from zq_lib.ted.cache import StateCache
from zq_lib.ted.config import TedConfig
from zq_lib.ted.digits import CLASSES, DIMS, LAYERS, SIDES
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.stage_one import fit
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "ted.json"
WIDTHS = (0, *DIMS)  # 0 is the teacher's state itself
TEACHER = "teacher"
STUDENTS = (text.PLAIN, text.KD, text.LWD, text.PCA, text.TED)  # on sentences
KINDS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "thing", "HUM": "person", "LOC": "place",
         "NUM": "number"}  # fmt: skip
KEPT = 12  # trained arms that are remembered
Say = Callable[[str], None]
T = TypeVar("T")


class _Stored:
    """A result whose data are JSON types, floats to four digits; its `settings` are of the class `kind`."""

    kind: type

    def to_data(self) -> dict[str, Any]:
        return rounded(asdict(self))

    @classmethod
    def from_data(cls, found: dict[str, Any]) -> Self:
        """What `to_data` gave."""
        return cls(**{**found, "settings": cls.kind(**found["settings"])})


@dataclass
class Moment:
    """How far a run is, and its result as far as there is something new to see."""

    said: str
    done: float = 0.0
    result: Any = None


class Once(Generic[T]):
    """Something slow that is made once, by the first who asks.

    It is made in a thread, so that one who waits is told how it goes, and can leave. Leaving, closing the iterator,
    takes until it is made: then it is there for the next, and nothing runs beside the next run.
    """

    def __init__(self, make: Callable[[Say], T], seconds: float) -> None:
        self.make, self.seconds = make, seconds
        self.found: list[T] = []

    def wait(self) -> Iterator[tuple[str, float]]:
        """What is being done and the share of the time that it usually takes, until it is made."""
        if self.found:
            return
        said, job = [""], Future()
        threading.Thread(target=self._work, args=(job, said.append), daemon=True).start()
        looks = 0
        try:
            while not wait([job], timeout=0.25).done:
                looks += 1
                yield said[-1], min(0.95, 0.25 * looks / self.seconds)
        finally:
            self.found.append(job.result())

    def get(self) -> T:
        """It, after all of `wait`."""
        return self.found[0]

    def _work(self, job: Future[T], say: Say) -> None:
        try:
            job.set_result(self.make(say))
        except Exception as error:  # noqa: BLE001 - it is raised again where it is waited for
            job.set_exception(error)


# --- two digits -------------------------------------------------------------------------------------------------------
DIGITS = Once(lambda say: digits.digits(digits.SIZES["quick"], 0, say), 15)


@dataclass
class Reader:
    """Logistic regression on standardised states: what `zq_lib.ted.probe` fits, with the probabilities it gives."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Probabilities [n, 10] of the digits for states [n, d]."""
        return F.linear((states.double() - self.mean) / self.std, self.weight, self.bias).softmax(-1)

    @classmethod
    def of(cls, states: Tensor, labels: Tensor, penalty: float = 1e-3, steps: int = 100) -> Self:
        """Fit states [n, d] to labels [n]."""
        states = states.detach().double()
        mean, std = states.mean(0), states.std(0, correction=0).clamp_min(1e-12)
        weight = states.new_zeros(CLASSES, states.shape[1], requires_grad=True)
        bias = states.new_zeros(CLASSES, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = F.linear((states - mean) / std, weight, bias)
            loss = F.cross_entropy(logits, labels) + penalty * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(mean, std, weight.detach(), bias.detach())


@dataclass
class Known:
    """Filters of every width, a reader for each width, layer and side, and the accuracies of these."""

    filters: dict[int, TaskFilters] = field(default_factory=dict)
    readers: dict[tuple[int, int, str], Reader] = field(default_factory=dict)
    kept: list[Row] = field(default_factory=list)


_KNOWN: list[Known] = []


@dataclass
class DigitsResult(_Stored):
    """`pixels` of the pair [8, 16] from 0 to 1, and the two `labels`, none of a drawing. `kept` has a row per width,
    layer and side with the reader's accuracy on test pairs; `said` the same with its probabilities for this pair."""

    settings: Digits
    pixels: list[list[float]]
    labels: dict[str, int]
    kept: list[Row]
    said: list[dict[str, Any]]
    kind = Digits

    def accuracy(self, dim: int, layer: int, side: str) -> float:
        """How often a reader of this state names the digit of a test pair."""
        return self._row(self.kept, dim, layer, side)["accuracy"]

    def shares(self, dim: int, layer: int, side: str) -> list[float]:
        """Its probabilities for this pair."""
        return self._row(self.said, dim, layer, side)["shares"]

    @staticmethod
    def _row(rows: list[Row], *where: Any) -> Row:
        return next(r for r in rows if (r["dim"], r["layer"], r["side"]) == where)


def watch_digits(settings: Digits) -> Iterator[Moment]:
    """Show one pair to the teacher. Teacher, filters and readers are made once."""
    yield from _teacher(0.6)
    found = DIGITS.get()
    if not _KNOWN:
        made = Known()
        yield from _know(found, made)
        _KNOWN.append(made)
    known, s = _KNOWN[0], settings
    pair = drawn(s) if s.lines else chosen(found.test, s)
    states = digits.class_states(found.teacher, pair)
    said = [
        {"dim": dim, "layer": layer, "side": side, "shares": reader(filtered(known, dim, layer, states))[0].tolist()}
        for (dim, layer, side), reader in known.readers.items()
    ]
    labels = {} if s.lines else {"left": s.left, "right": s.right}
    yield Moment("Done", 1.0, DigitsResult(s, pixels(pair), labels, known.kept, rounded(said)))


def _teacher(part: float) -> Iterator[Moment]:
    """Make the teacher of digits if it is not there, which is `part` of a run."""
    for _, share in DIGITS.wait():
        yield Moment("Training the teacher on both digits", part * share)


def ready() -> bool:
    """Whether another pair can be shown at once."""
    return bool(_KNOWN)


def _know(found: digits.Digits, known: Known) -> Iterator[Moment]:
    yield Moment("Reading the teacher's states", 0.6)
    train, test = (digits.class_states(found.teacher, pairs) for pairs in (found.train, found.test))
    for i, dim in enumerate(WIDTHS):
        if dim:
            for step, filters in digits.fit_filters(found, dim, found.seed):
                known.filters[dim] = filters
                if step.step % 20 == 0:
                    yield Moment(f"Filters of width {dim}: step {step.step}", 0.6 + 0.08 * i)
        for layer, side in product(range(1, LAYERS + 1), SIDES):
            yield Moment(f"Probing width {dim or 'of the state'}: layer {layer}, {side} digit", 0.64 + 0.08 * i)
            own, other = (filtered(known, dim, layer, states) for states in (train, test))
            reader = known.readers[dim, layer, side] = Reader.of(own, found.train.labels[side])
            right = reader(other).argmax(1) == found.test.labels[side]
            row = {"dim": dim, "layer": layer, "side": side, "accuracy": float(right.double().mean())}
            known.kept.append(row)


@torch.no_grad()
def filtered(known: Known, dim: int, layer: int, states: list[Tensor]) -> Tensor:
    """The class token's state [n, d] behind a layer, through the filter of a width."""
    return known.filters[dim].filters[layer - 1](states[layer - 1]) if dim else states[layer - 1]


def chosen(pairs: digits.Pairs, settings: Digits) -> digits.Pairs:
    """The wanted digits side by side, each from a test pair that has it on its side."""
    halves, grid = [], pairs.rows["inputs_embeds"][:, 1:].unflatten(1, (2, 4))  # [n, 2, 4, 16]
    for place, side in enumerate(SIDES):
        rows = (pairs.labels[side] == getattr(settings, side)).nonzero()[:, 0]
        halves.append(grid[rows[settings.picture], :, 2 * place : 2 * place + 2])
    return _as_pairs(torch.cat(halves, 1).flatten(0, 1))


def drawn(settings: Digits) -> digits.Pairs:
    """What was typed, as a pair."""
    lines = [line.ljust(COLUMNS) for line in settings.lines]
    lines += [" " * COLUMNS] * (ROWS - len(lines))
    image = torch.tensor([[INK[c] for c in line] for line in lines])
    return _as_pairs(image.unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 16))


def _as_pairs(patches: Tensor) -> digits.Pairs:
    """One pair of patches [8, 16], its labels unknown."""
    rows = {"inputs_embeds": F.pad(patches, (0, 0, 1, 0))[None], "labels": torch.zeros(1, dtype=torch.long)}
    return digits.Pairs({**rows, digits.EXAMPLE: torch.zeros(1, dtype=torch.long)}, torch.zeros(1, dtype=torch.long))


def pixels(pair: digits.Pairs) -> list[list[float]]:
    """The pair as an image [8, 16]."""
    grid = pair.rows["inputs_embeds"][0, 1:].reshape(2, 4, 4, 4)  # rows and columns of patches, and in them
    return rounded(grid.transpose(1, 2).reshape(ROWS, COLUMNS), 2)


def as_text(result: DigitsResult) -> str:
    """The pair as a drawing to go on with."""
    return "\n".join("".join("#" if x > 0.7 else "+" if x > 0.3 else "." for x in row) for row in result.pixels)


# --- a training -------------------------------------------------------------------------------------------------------
@dataclass
class TrainingResult(_Stored):
    """It grows while the arms train: `levels` are the accuracies of teacher and start, `terms` the weighted terms of
    every step of the first arm's loss, `curves` by arm the accuracy on test pairs as the epochs end, `rows` the results
    of the arms that are done. `steps` is how many updates an epoch has."""

    settings: Training
    levels: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    epochs: int = 0
    terms: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    kind = Training

    @property
    def names(self) -> list[str]:
        """Of the arms, in the order of their training."""
        return [arm.name for arm in self.settings.arms]

    @property
    def complete(self) -> bool:
        """Whether all arms are done."""
        return len(self.rows) == len(self.names)

    def row(self, arm: str) -> Row | None:
        """What was measured of an arm, if it was."""
        return next((r for r in self.rows if r["arm"] == arm), None)


@dataclass
class Paired(Problem):
    """A problem whose arms match chosen pairs of layers (student's, teacher's)."""

    layers: tuple[tuple[int, int], ...] = ()

    def settings(self, arm: Arm, weight: float) -> TedConfig:
        """The config of an arm, with the chosen layers."""
        return replace(super().settings(arm, weight), layers=self.layers)


@lru_cache(maxsize=4)
def _start(seed: int) -> Problem:
    """The student of a seed, trained on labels alone; the teacher must be there."""
    return replace(DIGITS.get(), seed=seed).problem()


@lru_cache(maxsize=7)
def _states(layers: tuple[int, ...]) -> StateCache:
    found = DIGITS.get()
    return arms.keep_states(found.teacher, found.teacher, found.train.rows, layers)


_ARMS: dict[tuple[Any, ...], tuple[list[Row], list[float], Row]] = {}  # terms, curve and row of a trained arm


def watch_training(settings: Training) -> Iterator[Moment]:
    """Train all arms from one start; what was trained with the same weights, layers and seed is not trained again."""
    s, result = settings, TrainingResult(settings)
    yield Moment("Beginning", 0.0, result)
    yield from _teacher(0.3)
    yield Moment("Training the student's start on labels", 0.3)
    start, found = _start(s.seed), DIGITS.get()
    problem = Paired(**{**vars(start), "cache": _states(s.layers), "kd_weight": s.kd_weight, "layers": s.pairs})
    result.steps, result.epochs = problem.steps // problem.epochs, problem.epochs
    models = {TEACHER: found.teacher, START: problem.student}
    result.levels = {name: arms.judge(model, found.test.rows)["accuracy"] for name, model in models.items()}
    for i, arm in enumerate(s.arms):
        key = (arm, s.seed, s.kd_weight if arm.kd else 0, (s.layer_weight, s.layers) if arm.target else 0)
        if key not in _ARMS:
            began = 0.35 + 0.65 * i / len(s.arms)
            yield from _train(result, problem, arm, began, 0.65 / len(s.arms), key)
        terms, curve, row = _ARMS[key]
        result.curves[arm.name] = curve
        result.rows.append(row)
        if not i:
            result.terms = terms
        yield Moment(f"{arm.name}: trained", 0.35 + 0.65 * (i + 1) / len(s.arms), result)
    yield Moment("Done", 1.0, result)


def _train(
    result: TrainingResult, problem: Paired, arm: Arm, began: float, part: float, key: tuple[Any, ...]
) -> Iterator[Moment]:
    s, terms, curve = result.settings, [], [result.levels[START]]
    config = replace(s.config, **{} if arm.target else {"layer_weight": 0.0}, **{} if arm.kd else {"kd_weight": 0.0})
    result.curves[arm.name] = curve
    if not result.rows:
        result.terms = terms
    yield Moment(f"{arm.name}: " + ("fitting the filters" if arm.target == "trained" else "beginning"), began, result)
    for moment in arms.watch(problem, {arm: s.layer_weight}, s.seed):
        if moment.row is not None:
            curve.append(moment.row["accuracy"])
            while len(_ARMS) >= KEPT:
                _ARMS.pop(next(iter(_ARMS)))
            _ARMS[key] = terms, curve, {k: moment.row[k] for k in ("arm", "accuracy", "nll")}
            return
        terms.append(lab.term_row(moment, config))
        if moment.step % result.steps == 0 and moment.step < problem.steps:
            curve.append(arms.judge(moment.student, problem.test)["accuracy"])
            moment.student.train()
        yield Moment(f"{arm.name}: step {moment.step} of {problem.steps}", began + part * moment.step / problem.steps,
                     result)  # fmt: skip


# --- sentences --------------------------------------------------------------------------------------------------------
SETTING = Once(lambda say: text.setting(text.SIZES["quick"], 0, say), 40)


@dataclass
class Asked:
    """Teacher, start and students, their accuracy on test questions, and the teacher's filters with their heads."""

    models: dict[str, nn.Module] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    filters: TaskFilters | None = None


_ASKED: list[Asked] = []


@dataclass
class QuestionResult(_Stored):
    """`answers` has a row per model and kind of answer with its probability, `layers` the same per layer of the
    teacher. `accuracy` is that of the models on `tested` test questions."""

    settings: Question
    answers: list[Row]
    layers: list[Row]
    accuracy: dict[str, float]
    tested: int
    kind = Question

    @property
    def models(self) -> list[str]:
        """Teacher, start and students."""
        return list(self.accuracy)

    def table(self, of: str, name: Any) -> dict[str, float]:
        """Probability by kind, of a `model` or behind a `layer`."""
        rows = self.answers if of == "model" else self.layers
        return {KINDS[r["kind"]]: r["probability"] for r in rows if r[of] == name}

    def best(self, of: str, name: Any) -> str:
        """The likeliest kind."""
        shares = self.table(of, name)
        return max(shares, key=shares.__getitem__)


def watch_question(settings: Question) -> Iterator[Moment]:
    """Ask the teacher and its students, which are trained once."""
    if not _ASKED:
        for said, share in SETTING.wait():
            yield Moment(f"Fine-tuning the teacher{f' ({said})' if said else ''}", 0.6 * share)
        made = Asked()
        yield from _learn(SETTING.get(), made)
        _ASKED.append(made)
    asked, found = _ASKED[0], SETTING.get().found
    answers = lab.answers(asked.models, found, settings.question)
    layers = lab.layer_answers(asked.filters, found, settings.question)
    yield Moment(
        "Done", 1.0,
        QuestionResult(settings, answers, layers, asked.accuracy, len(found.test["labels"])),
    )  # fmt: skip


def _learn(setting: text.Setting, asked: Asked) -> Iterator[Moment]:
    """The heads behind the teacher's layers, the start, and the students."""
    teacher, train = setting.teacher, setting.found.train
    yield Moment("Reading the teacher's states", 0.6)
    layers = range(1, teacher.config.num_hidden_layers + 1)
    cache = arms.keep_states(teacher, teacher, train, layers)
    yield Moment("Training the students' start on labels", 0.66)
    problem = setting.problem(0)
    for name, model in ((TEACHER, teacher), (START, problem.student)):
        asked.models[name] = model
        asked.accuracy[name] = arms.judge(model, problem.test)["accuracy"]
    torch.manual_seed(0)
    asked.filters = TaskFilters(teacher, TedConfig(filter_dim=text.DIM), layers)
    batches = arms.Shuffled(train, problem.batch, 0)
    for step in fit(asked.filters, batches, epochs=problem.filter_epochs, cache=cache,
                    learning_rate=problem.filter_rate):  # fmt: skip
        if step.step % 10 == 0:
            yield Moment(f"A head behind every layer: step {step.step}", 0.72)
    for moment in arms.watch(problem, {arm: text.WEIGHTS[arm] for arm in STUDENTS}, 0):
        if moment.row is not None:
            asked.models[moment.arm] = moment.student
            asked.accuracy[moment.arm] = moment.row["accuracy"]
        share = (len(asked.models) - 2 + moment.step / problem.steps * (moment.row is None)) / len(STUDENTS)
        yield Moment(f"{moment.arm}: step {moment.step} of {problem.steps}", 0.78 + 0.2 * share)


# --- all --------------------------------------------------------------------------------------------------------------
Result = DigitsResult | TrainingResult | QuestionResult
RESULTS: dict[str, tuple[type, Any]] = {
    "digits": (DigitsResult, watch_digits),
    "training": (TrainingResult, watch_training),
    "sentences": (QuestionResult, watch_question),
}
PARTS = {made.kind: part for part, (made, _) in RESULTS.items()}


def watch(settings: Digits | Training | Question) -> Iterator[Moment]:
    """The run of whichever part these are settings of; the last moment has the result."""
    return RESULTS[PARTS[type(settings)]][1](settings)


def finish(settings: Digits | Training | Question) -> Result:
    """The result alone."""
    *_, last = watch(settings)
    return last.result


def forget() -> None:
    """Drop all that was trained."""
    for made in (DIGITS.found, SETTING.found, _KNOWN, _ASKED, _ARMS):
        made.clear()
    _start.cache_clear()
    _states.cache_clear()


@lru_cache(maxsize=1)
def stored() -> dict[str, Result]:
    """The examples' results: `python -m apps.ted --write-first-view`."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    return {name: RESULTS[d.pop("part")][0].from_data(d) for name, d in found.items()}


def store(results: dict[str, Result]) -> None:
    """Write them, one part per line."""
    write(STORED, {name: {"part": PARTS[type(r.settings)], **r.to_data()} for name, r in results.items()})
    stored.cache_clear()

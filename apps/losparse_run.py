"""What the LoSparse page's three parts compute, step by step so that Stop is heard. Library calls only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apps.losparse_settings import (
    CALIBRATED,
    SCORED,
    STEPS,
    TIMED,
    WRITTEN,
    Language,
    Matrix,
    Training,
)
from zq_lib.core import data, models
from zq_lib.core.blocks import grid
from zq_lib.core.lab import Row
from zq_lib.core.language import perplexity
from zq_lib.core.timing import cpu_seconds
from zq_lib.losparse import LoSparseConfig, attach, lab
from zq_lib.losparse.calibration import row_scores
from zq_lib.losparse.compression import Compression
from zq_lib.losparse.factors import Batch, Factors, covariances, cut, factorise, matrix
from zq_lib.losparse.oneshot import LOW_RANK, ROWS, TESTS, help_text, windows
from zq_lib.losparse.prices import time_layer
from zq_lib.losparse.targets import find_layers
from zq_lib.ui import serve
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "losparse.json"
PATCH = 40  # neurons and inputs of a matrix that are drawn
POINTS = 96  # of a curve with a point per neuron or singular value
GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))  # sizes at which the error is drawn
KEPT = 2  # trainings whose models are remembered, for other questions
OURS = lab.LOSPARSE


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


# --- one matrix -------------------------------------------------------------------------------------------------------
@dataclass
class MatrixResult(_Stored):
    """`size` numbers remain of N x K. `errors` are relative squared errors by method at this size, `curves` at GRID's
    sizes (None where a method has none); `weight` and `product` are the first PATCH neurons and inputs of W and U V,
    `kept` the neurons of these that keep their row of S. `values` are singular values and `norms` of S's rows, both
    falling, at up to POINTS places. `timing` has a row of `time_layer` per number of tokens, or none yet."""

    settings: Matrix
    outputs: int
    inputs: int
    rank: int
    rows: int
    size: int
    rivals: dict[str, int]  # rank of low rank only and number of rows of rows only, at no more than this size
    errors: dict[str, float]
    curves: dict[str, list[float | None]]
    weight: list[list[float]]
    product: list[list[float]]
    kept: list[int]
    values: list[float]
    norms: list[float]
    timing: list[Row] = field(default_factory=list)
    kind = Matrix


@lru_cache(maxsize=1)
def _encoder() -> nn.Module:
    return models.load("minilm-l6")[0]


@lru_cache(maxsize=8)
@torch.no_grad()
def _decomposed(model: str, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [N, K], U sigma [N, m], V^T [m, K], and what the first r triplets explain of each row's square [N, m + 1]."""
    found = _encoder() if model == "minilm-l6" else serve.language_model()[0]
    w = found.get_submodule(name).weight.detach()
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    scaled = left * values
    explained = torch.cat([torch.zeros(len(w), 1), scaled.square().cumsum(1)], 1)
    return w, scaled, right, explained


def split(settings: Matrix) -> MatrixResult:
    """W as U V and the rows of S that U V leaves most of, and both alone at the same size; nothing is timed."""
    s = settings
    w, scaled, right, explained = _decomposed(s.model, s.name)
    (n, k), total = w.shape, float(w.square().sum())
    whole = w.square().sum(1)

    def error(rank: int, rows: int) -> float:
        rest = (whole - explained[:, rank]).clamp_min(0).sort().values
        return float(rest[: n - rows].sum()) / total

    def alone(size: float) -> dict[str, int]:
        return {LOW_RANK: min(int(size / (n + k)), n, k), ROWS: min(int(size / k), n)}

    def rivals(size: float) -> dict[str, float]:
        found = alone(size)
        return {LOW_RANK: error(found[LOW_RANK], 0), ROWS: error(0, found[ROWS])}

    rank, rows = s.config.rank(n, k), round(s.remaining * n)
    size = rank * (n + k) + rows * k
    curves: dict[str, list[float | None]] = {OURS: [], LOW_RANK: [], ROWS: []}
    for ratio in GRID:
        left = int((ratio * n * k - rank * (n + k)) / k)
        for name, value in (rivals(ratio * n * k) | {OURS: error(rank, min(left, n)) if left >= 0 else None}).items():
            curves[name].append(value)
    rest = (whole - explained[:, rank]).clamp_min(0)
    alive = set(rest.topk(rows).indices.tolist())
    return MatrixResult(
        s, n, k, rank, rows, size, alone(size), {OURS: error(rank, rows), **rivals(size)}, curves,
        _short(w[:PATCH, :PATCH]), _short((scaled[:PATCH, :rank] @ right[:rank])[:, :PATCH]),
        [i for i in range(PATCH) if i in alive], _few(scaled.norm(dim=0)),
        _few(rest.sqrt().sort(descending=True).values),
    )  # fmt: skip


def _short(patch: Tensor) -> list[list[float]]:
    return rounded(patch, 2)


def _few(values: Tensor) -> list[float]:
    at = torch.linspace(0, len(values) - 1, min(POINTS, len(values))).round().long()
    return values[at].tolist()


def time_matrix(settings: Matrix) -> Iterator[Moment]:
    """Split the matrix and time it, dense and shrunk, on this machine."""
    result = split(settings)
    for i, tokens in enumerate(TIMED):
        yield Moment(f"Timing {tokens} token{'s' if tokens > 1 else ''}", i / len(TIMED))
        result.timing.append(time_layer(result.outputs, result.inputs, result.rank, result.rows, tokens))
    yield Moment("Done", 1.0, result)


# --- a training -------------------------------------------------------------------------------------------------------
@dataclass
class TrainingResult(_Stored):
    """It grows while the ways train: `names` and `outputs` of the matrices, `steps`, p(t) (`shares`) and `kept` rows
    per mask, `losses` per step and way, a row of results per way, and per question the kind and its probability as
    the dense and our model see it."""

    settings: Training
    names: list[str] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    answers: list[dict[str, list[Any]]] = field(default_factory=list)
    kind = Training

    def densities(self, event: int) -> dict[str, float]:
        """Share of its rows that each matrix kept after the first `event` masks."""
        kept = self.kept[event - 1] if event else self.outputs
        return {n: rows / most for n, rows, most in zip(self.names, kept, self.outputs, strict=True)}

    def row(self, method: str) -> Row | None:
        """What was measured of a way, if it was."""
        return next((r for r in self.rows if r["method"] == method), None)


_TRAINED: dict[tuple[float, bool], tuple[TrainingResult, dict[str, nn.Module]]] = {}


@lru_cache(maxsize=1)
def _questions() -> tuple[lab.Problem, PreTrainedTokenizerBase, list[str]]:
    """The problem, its tokenizer and the names of its classes."""
    names = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "thing", "HUM": "person", "LOC": "place",
             "NUM": "number"}  # fmt: skip
    return lab.questions(), models.load("minilm-l6")[1], [names[k] for k in sorted({q.coarse for q in data.trec()})]


def watch_training(settings: Training) -> Iterator[Moment]:
    """Train the dense model and all ways to the ratio; a run with the same ratio and rates only answers anew."""
    s = settings
    known = _TRAINED.get((s.ratio, s.own_rates))
    if known is None:
        result, trained = TrainingResult(s), {}
        yield Moment("Reading the questions", 0.0, result)
        yield from _train(result, trained)
        while len(_TRAINED) >= KEPT:
            _TRAINED.pop(next(iter(_TRAINED)))
        known = _TRAINED[s.ratio, s.own_rates] = result, trained
    found, trained = known
    yield Moment("Done", 1.0, replace(found, settings=s, answers=[_answer(trained, text) for text in s.questions]))


def _train(result: TrainingResult, trained: dict[str, nn.Module]) -> Iterator[Moment]:
    s, (problem, *_) = result.settings, _questions()
    ways = (lab.DENSE, *lab.METHODS)

    def moment(method: str, step: int, new: bool) -> Moment:
        share = (ways.index(method) + (step + 1) / STEPS) / len(ways)
        return Moment(f"{method}: step {step + 1} of {STEPS}", 0.98 * share, result if new else None)

    own, rate = problem.copy(), lab.OWN_RATES[lab.DENSE] if s.own_rates else lab.RATE
    torch.manual_seed(0)  # as `watch` begins each way
    for step, loss in lab.training(own, STEPS, rate):
        result.losses.setdefault(lab.DENSE, []).append(loss)
        yield moment(lab.DENSE, step, False)
    nll, accuracy = own.judge()
    result.rows.append({"method": lab.DENSE, "rate": rate, "kept": 1.0, "nll": nll, "accuracy": accuracy})
    trained[lab.DENSE] = own.model.eval()
    for now in lab.watch(problem, s.ratio, STEPS, lab.METHODS, lab.OWN_RATES if s.own_rates else None):
        masked = now.method == OURS and _masks(result, now.handle)
        if now.row is None:
            result.losses.setdefault(now.method, []).append(now.loss)
        else:
            result.rows.append({k: now.row[k] for k in ("method", "rate", "kept", "nll", "accuracy")})
            if now.method == OURS:
                trained[OURS] = now.handle.model.eval()
        yield moment(now.method, now.step, masked or now.row is not None)


def _masks(result: TrainingResult, handle: Compression) -> bool:
    """Take over what is new of the trace."""
    trace, had = handle.trace, (len(result.steps), bool(result.names))
    result.names, result.outputs = list(trace.names), list(trace.outputs)
    result.steps, result.shares, result.kept = list(trace.steps), list(trace.shares), list(trace.rows)
    return (len(result.steps), True) != had


@torch.no_grad()
def _answer(trained: dict[str, nn.Module], text: str) -> dict[str, list[Any]]:
    """The likeliest kind of answer and its probability, by model."""
    _, tokenizer, kinds = _questions()
    inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    found = {name: model(**inputs)[0].softmax(-1) for name, model in trained.items()}
    return {name: [kinds[int(p.argmax())], float(p.max())] for name, p in found.items()}


# --- a language model -------------------------------------------------------------------------------------------------
@dataclass
class Side:
    """A language model on three windows of text it has not seen, and what it writes. `seconds` are CPU time to read."""

    parameters: int
    perplexity: float
    text: str
    seconds: float


@dataclass
class LanguageResult(_Stored):
    """The model before and after. `ratio` is what is left of the replaced weights, `densities` what of the rows of S in
    each block (a row) and kind of matrix (a column), `dense_layers` how many matrices are cheaper dense."""

    settings: Language
    dense: Side
    ours: Side
    ratio: float
    dense_layers: int
    densities: list[list[float]]
    kind = Language

    @classmethod
    def from_data(cls, found: dict[str, Any]) -> Self:
        made = super().from_data(found)
        return replace(made, dense=Side(**found["dense"]), ours=Side(**found["ours"]))


_FACTORS: dict[str, Factors] = {}  # by init, at the largest rank that is offered


@lru_cache(maxsize=1)
def _texts() -> tuple[Batch, list[Batch], list[Tensor]]:
    """What scores the rows, what the factors see, and what perplexity is measured on."""
    ids = help_text(serve.language_model()[1])
    pair = torch.stack(windows(ids, 0, SCORED))
    inputs = [{"input_ids": w[None]} for w in windows(ids, 512, CALIBRATED)]
    return {"input_ids": pair, "labels": pair}, inputs, [w for start in TESTS for w in windows(ids, start)]


def watch_language(settings: Language) -> Iterator[Moment]:
    """Compress a copy of the language model once, and let both read and write. Factors are found once per `init`."""
    s, config = settings, settings.config
    yield Moment("Loading the model", 0.0)
    model, tokenizer = serve.language_model()
    batch, inputs, test = _texts()
    layers, _ = find_layers(model)
    if s.init not in _FACTORS:
        yield Moment("Reading the calibration text (Stop waits for its end)", 0.02)
        most = LoSparseConfig(low_rank=0.4, remaining=0, init=s.init)
        seen = covariances(model, layers, inputs) if s.init == "activation" else ((n, None) for n in layers)
        known: Factors = {}
        for name, covariance in seen:
            weight = matrix(layers[name]).detach()
            known[name] = factorise(weight, most.rank(*weight.shape), covariance)
            yield Moment(f"Factors: {len(known)} of {len(layers)} matrices", 0.2 + 0.4 * len(known) / len(layers))
        _FACTORS[s.init] = known
    factors = cut(_FACTORS[s.init], config)
    yield Moment("Scoring the rows by their loss", 0.62)
    scores = row_scores(model, layers, factors, [batch])
    yield Moment("Cutting", 0.75)
    own = copy.deepcopy(model)
    handle = attach(own, config, factors=factors)
    handle.shrink(scores)
    report = handle.finish()
    sides = []
    for i, (said, one) in enumerate((("The dense model", model), ("The compressed model", own))):
        found = _DENSE.get(s.prompt) if one is model else None
        if found is None:
            yield Moment(f"{said} reads", 0.78 + 0.1 * i)
            values: list[float] = []
            seconds = cpu_seconds(lambda one=one, values=values: values.append(perplexity(one, test)))
            yield Moment(f"{said} writes", 0.83 + 0.1 * i)
            found = Side(sum(p.numel() for p in one.parameters()), values[0], _text(one, tokenizer, s.prompt), seconds)
        sides.append(found)
    _DENSE.clear()
    _DENSE[s.prompt] = sides[0]
    blocks, kinds, places = grid([r.name for r in report.layers])
    table = [[0.0] * len(kinds) for _ in blocks]
    for r in report.layers:
        row, column = places[r.name]
        table[row][column] = r.density
    dense = sum(r.state == "dense" for r in report.layers)
    yield Moment("Done", 1.0, LanguageResult(s, *sides, report.ratio, dense, table))


_DENSE: dict[str, Side] = {}  # the dense model's side for the latest prompt


@torch.no_grad()
def _text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the model goes on with, always its likeliest token."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=WRITTEN)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- all --------------------------------------------------------------------------------------------------------------
Result = MatrixResult | TrainingResult | LanguageResult
RESULTS: dict[str, tuple[type, Any]] = {
    "matrix": (MatrixResult, time_matrix),
    "training": (TrainingResult, watch_training),
    "language": (LanguageResult, watch_language),
}
PARTS = {made.kind: part for part, (made, _) in RESULTS.items()}


def watch(settings: Matrix | Training | Language) -> Iterator[Moment]:
    """The run of whichever part these are settings of; the last moment has the result."""
    return RESULTS[PARTS[type(settings)]][1](settings)


def finish(settings: Matrix | Training | Language) -> Result:
    """The result alone."""
    *_, last = watch(settings)
    return last.result


def warm() -> None:
    """Load both models."""
    _encoder()
    serve.language_model()


@lru_cache(maxsize=1)
def stored() -> dict[str, Result]:
    """The examples' results: `python -m apps.losparse --write-first-view`."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    return {name: RESULTS[d.pop("part")][0].from_data(d) for name, d in found.items()}


def store(results: dict[str, Result]) -> None:
    """Write them, one part per line."""
    write(STORED, {name: {"part": PARTS[type(r.settings)], **r.to_data()} for name, r in results.items()})
    stored.cache_clear()

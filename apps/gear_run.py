"""What the GEAR page shows: a setting's errors, distance from full precision and answer. Library calls only."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from apps.gear_settings import PLAIN, PROMPT, SIDES, STEPS, WIDTH, Settings, Weight, weigh
from zq_lib.gear import GearCache, GearConfig, measure
from zq_lib.gear.cache import GearLayer
from zq_lib.gear.measure import TEXTS, Score
from zq_lib.gear.outliers import outlier_mask
from zq_lib.gear.view import NAME
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "gear.json"
MAP = 128  # tokens of the error map
RANKS = 16  # of the spectrum
CHUNK = 4  # new tokens between two looks at the page's Stop button
KEPT = 32  # full-precision answers that a text remembers


@dataclass(frozen=True)
class Look:
    """One head of one layer, after the prompt. `shade` is the absolute error of the first MAP tokens, a byte each in
    base64, 255 for `largest`; `outliers` are (token, channel) among them; `spectrum` and `noise` are the share of the
    residual's energy, and of white noise of the same shape, in the best rank 1, 2, ... RANKS; `errors` are the layer's
    relative errors of keys and values."""

    side: str
    layer: int
    head: int
    error: float
    errors: list[float]
    largest: float
    shade: str
    outliers: list[list[int]]
    spectrum: list[float]
    noise: list[float]

    def map(self) -> Tensor:
        """Absolute errors [MAP, D]."""
        shades = torch.frombuffer(bytearray(base64.b64decode(self.shade)), dtype=torch.uint8)
        return shades.view(MAP, WIDTH).float() * self.largest / 255


@dataclass(frozen=True)
class Said:
    """An answer: its ids, and its text before, at and after the first token in which the two answers differ."""

    ids: list[int]
    pieces: list[str]


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that the page says about one setting."""

    settings: Settings
    score: Score
    look: Look
    full: Said
    compressed: Said

    @property
    def weight(self) -> Weight:
        return weigh(self.settings.config)

    @property
    def divergence(self) -> int | None:
        """The first token in which the answers differ, counted from 0."""
        return diverge(self.full.ids, self.compressed.ids)

    def to_data(self) -> dict[str, Any]:
        """JSON types only, floats to four digits."""
        sides = {name: asdict(getattr(self, name)) for name in ("settings", "look", "full", "compressed")}
        return rounded({**sides, "score": _score_data(self.score), "weight": asdict(self.weight)})

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Result:
        """What `to_data` gave; sizes are counted anew."""
        return cls(
            Settings(**data["settings"]), _score(data["score"]), Look(**data["look"]), Said(**data["full"]),
            Said(**data["compressed"]),
        )  # fmt: skip


def _score_data(score: Score) -> dict[str, Any]:
    return rounded(
        {"kl": score.kl.tolist(), "agree": score.agree.int().tolist(), "bits": score.bits, "bytes": score.bytes}
    )


def _score(data: dict[str, Any]) -> Score:
    return Score(torch.tensor(data["kl"]), torch.tensor(data["agree"]).bool(), data["bits"], data["bytes"])


@dataclass(frozen=True, eq=False)
class Memory:
    """A text that the model has read once in full precision. `said` keeps its answers by `more` and length."""

    ids: Tensor
    expected: measure.Expected
    said: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def fill(self, cache: Cache) -> Cache:
        """The prompt's keys and values put into an empty cache, as a run of the model would."""
        for i, (keys, values) in enumerate(self.expected.prompt):
            cache.update(keys, values, i)
        return cache


@lru_cache(maxsize=len(TEXTS))
def remember(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Memory:
    """Read a text once per process: the prompt's keys and values do not depend on how they are stored."""
    ids = measure.texts(tokenizer, PROMPT + STEPS)[text].to(model.device)
    return Memory(ids, measure.full_precision(model, ids, steps=STEPS))


def score(model: PreTrainedModel, memory: Memory, gear: GearConfig) -> Score:
    """KL and agreement on the text's next STEPS tokens."""
    return measure.teacher_forced(model, memory.ids, gear, steps=STEPS, expected=memory.expected)


def look(memory: Memory, settings: Settings) -> Look:
    """The error and the residual of one head, from the prompt's keys and values."""
    gear, side = settings.config, SIDES.index(settings.side)
    layer = GearLayer(gear, PretrainedConfig(attn_implementation=NAME))
    exact = memory.expected.prompt[settings.layer]
    layer.update(*exact)
    restored = layer.dequantize()
    x, block = exact[side].float(), layer.blocks[0]
    packed, codec = (block.keys, gear.keys) if side == 0 else (block.values, gear.values)
    inside = x[:, None, :, layer.sinks : layer.sinks + block.length]  # [1, 1, G, n, D]
    backbone = packed.backbone().transpose(1, 2).flatten(2, 3)[:, None]  # segments in a row, as `inside`
    residual = inside - backbone
    chosen = outlier_mask(inside, codec, None)
    marks = torch.zeros(x.shape[2], WIDTH, dtype=torch.bool)
    if chosen is not None:
        residual = residual.masked_fill(chosen, 0.0)
        marks[layer.sinks : layer.sinks + block.length] = chosen[0, 0, settings.head]
    residual = residual[0, 0, settings.head]
    noise = torch.randn(residual.shape, generator=torch.Generator().manual_seed(0))
    wrong = (x - restored[side])[0, settings.head]
    largest = float(wrong[:MAP].abs().max())
    shade = (wrong[:MAP].abs() * (255 / largest if largest else 0.0)).round().to(torch.uint8).flatten()
    return Look(
        settings.side, settings.layer, settings.head,
        float(wrong.norm() / x[0, settings.head].norm()),
        [measure.relative_error(a, b) for a, b in zip(exact, restored, strict=True)],
        largest, base64.b64encode(bytes(shade.tolist())).decode(), marks[:MAP].nonzero().tolist(),
        _energy(residual), _energy(noise),
    )  # fmt: skip


def _energy(x: Tensor) -> list[float]:
    """Share of the energy of x [n, D] in the best approximations of rank 1 to RANKS; 0 where there is no energy."""
    energy = torch.linalg.svdvals(x).square()
    return (energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(x.dtype).tiny))[:RANKS].tolist()


@dataclass
class Moment:
    """How far a run is. `news` names what is new: "sizes", "look", "score", "answers" or "result"."""

    said: str
    news: str
    done: float
    look: Look | None = None
    score: Score | None = None
    answers: dict[str, str] = field(default_factory=lambda: {"full": "", "compressed": ""})
    result: Result | None = None


def watch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[Moment]:
    """Measure one setting and yield what is known; the last moment has the result. Closing it stops the model."""
    moment = Moment(f"Reading the text {settings.text!r}", "sizes", 0.05)
    yield moment
    memory = remember(model, tokenizer, settings.text)
    moment.look = look(memory, settings)
    moment.said, moment.news, moment.done = "Measuring the distance from full precision", "look", 0.15
    yield moment
    moment.score = score(model, memory, settings.config)
    moment.said, moment.news, moment.done = "Writing on", "score", 0.4
    yield moment
    moment.news, ids = "answers", {}
    for side, cache in (("full", DynamicCache()), ("compressed", GearCache(model.config, settings.config))):
        for ids[side] in _answer(model, tokenizer, memory, settings, cache):
            moment.answers[side] = tokenizer.decode(ids[side], skip_special_tokens=True)
            moment.said = f"{side.capitalize()} answer: {len(ids[side])} tokens"
            moment.done = 0.4 + 0.3 * ((side != "full") + len(ids[side]) / settings.new_tokens)
            yield moment
    at = diverge(*ids.values())
    full, compressed = (Said(of, _pieces(tokenizer, of, at)) for of in ids.values())
    moment.result = Result(settings, moment.score, moment.look, full, compressed)
    moment.said, moment.news, moment.done = "Done", "result", 1.0
    yield moment


def compress(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Result:
    """The result alone."""
    *_, last = watch(model, tokenizer, settings)
    return last.result


@torch.no_grad()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, memory: Memory, settings: Settings, cache: Cache
) -> Iterator[list[int]]:
    """The greedy answer's ids, growing by up to CHUNK tokens; ends early at the end token. The text is in the cache
    when `more` is read. Answers in full precision are remembered."""
    plain, key = isinstance(cache, DynamicCache), (settings.more, settings.new_tokens)
    if plain and key in memory.said:
        yield memory.said[key]
        return
    memory.fill(cache)
    asked = tokenizer(settings.more, return_tensors="pt").input_ids.to(memory.ids.device)
    ids = torch.cat([memory.ids[:, :PROMPT], asked], 1)
    start, found, ends = ids.shape[1], [], _ends(model)
    while len(found) < settings.new_tokens and not (found and found[-1] in ends):
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
            max_new_tokens=min(CHUNK, settings.new_tokens - len(found)),
        )  # fmt: skip
        found = ids[0, start:].tolist()
        yield found
    if plain:
        while len(memory.said) >= KEPT:
            memory.said.pop(next(iter(memory.said)))
        memory.said[key] = found


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def diverge(one: list[int], other: list[int]) -> int | None:
    """The first place where two lists differ, or None."""
    if one == other:
        return None
    alike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(alike, min(len(one), len(other)))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], at: int | None) -> list[str]:
    """Text before, at and after the token `at`; all of it before when there is none."""
    at = len(ids) if at is None else at
    ends = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in (at, at + 1, len(ids))]
    return [ends[0], ends[1][len(ends[0]) :], ends[2][len(ends[1]) :]]


@dataclass(frozen=True)
class Rival:
    """Plain quantisation, the setting nearest in bytes. `difference` is the KL of the page's setting minus the rival's,
    position by position, with its standard error."""

    name: str
    score: Score
    difference: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether the difference is more than two standard errors."""
        return abs(self.difference) > 2 * self.error


def rival(ours: Score, plain: dict[str, Score]) -> Rival:
    """The plain setting to compare with at the same bytes: after the scored text, the whole cache.

    It is the next smaller one where that is clearly closer to full precision, the next larger one where that is clearly
    farther, and else the nearest.
    """
    found = [Rival(name, of, *measure.paired(ours, of)) for name, of in plain.items()]
    smaller = max((r for r in found if r.score.bytes <= ours.bytes), key=lambda r: r.score.bytes, default=None)
    larger = min((r for r in found if r.score.bytes >= ours.bytes), key=lambda r: r.score.bytes, default=None)
    if smaller and smaller.clear and smaller.difference > 0:
        return smaller
    if larger and larger.clear and larger.difference < 0:
        return larger
    return min(found, key=lambda r: abs(r.score.bytes - ours.bytes))


def plain_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Score]:
    """All of PLAIN on one text."""
    memory = remember(model, tokenizer, text)
    return {name: score(model, memory, gear) for name, gear in PLAIN.items()}


@lru_cache(maxsize=1)
def stored() -> tuple[dict[str, Result], dict[str, dict[str, Score]]]:
    """The examples' results, and the plain settings' scores by text: `python -m apps.gear --write-first-view`."""
    data = json.loads(STORED.read_text(encoding="utf-8"))
    plain = {text: {name: _score(d) for name, d in found.items()} for text, found in data["plain"].items()}
    return {name: Result.from_data(d) for name, d in data["examples"].items()}, plain


def store(results: dict[str, Result], plain: dict[str, dict[str, Score]]) -> None:
    """Write them, one part per line."""
    examples = {name: r.to_data() for name, r in results.items()}
    scores = {text: {name: _score_data(s) for name, s in found.items()} for text, found in plain.items()}
    write(STORED, {"examples": examples, "plain": scores}, depth=3)
    stored.cache_clear()

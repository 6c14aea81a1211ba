"""What the MASFormer page shows: a code asked for under full attention and under a plan. Library calls only."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from apps.masformer_settings import LEAST_TOKENS, MOST_TOKENS, QUESTION, Settings
from zq_lib.masformer import SpanCache, SpanPlan, attach
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "masformer.json"
CHUNK = 128  # tokens read between two looks at the page's Stop button
CONTEXT = 128  # first tokens of the document, which perplexity leaves out
KEPT = 16  # documents whose run under full attention is remembered
SIDES = ("full", "plan")


@dataclass(frozen=True)
class Side:
    """One run. Per digit of the code, after the right digits before it: probability of the right one, and what came out
    on top. `answer` is what the model writes by itself, `perplexity` that of the document, `bytes` those of the cache
    after the question."""

    right: list[float]
    chosen: list[str]
    answer: str
    perplexity: float
    bytes: int


@dataclass(frozen=True)
class Result:
    """Everything that the page says about one run. `tokens` are those of document and question."""

    settings: Settings
    tokens: int
    full: Side
    plan: Side

    def found(self, side: str) -> int:
        """Digits of the code that came out on top."""
        return sum(a == b for a, b in zip(getattr(self, side).chosen, self.settings.code, strict=True))

    @property
    def ratio(self) -> float:
        """Perplexity relative to full attention's."""
        return self.plan.perplexity / self.full.perplexity

    def to_data(self) -> dict[str, Any]:
        """JSON types only, floats to four digits."""
        return rounded(asdict(self))

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Result:
        """What `to_data` gave."""
        return cls(Settings(**data["settings"]), data["tokens"], *(Side(**data[side]) for side in SIDES))


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens of document and question [T], of which the first `document` are the document, and those of the code."""

    ids: Tensor
    document: int
    code: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Prompt:
    """Read the settings' text. Raises ValueError when it is too short to lose something in it, or too long."""
    document, question, code = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (settings.text, QUESTION, settings.code)
    )
    tokens = len(document) + len(question)
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"document has {tokens} tokens with code and question, more than the {MOST_TOKENS} this page takes; "
            "shorten it"
        )
    if tokens < LEAST_TOKENS:
        raise ValueError(
            f"document has {tokens} tokens with code and question, which most windows cover; give at least "
            f"{LEAST_TOKENS}, about 150 words"
        )
    return Prompt(torch.tensor(document + question), len(document), torch.tensor(code))


@dataclass
class Moment:
    """How far a run is; the last one has the result."""

    said: str
    done: float = 0.0
    result: Result | None = None


def watch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[Moment]:
    """Ask under full attention, then under the plan; the last moment has the result.

    The model follows the plan only within a step, never between two, so a run that is left half-way leaves no trace.
    """
    prompt = encode(tokenizer, settings)
    key, length = (tuple(prompt.ids.tolist()), settings.code), len(prompt.ids)
    sides: dict[str, Side] = {}
    for i, (name, plan, words) in enumerate(
        (("full", None, "Full attention"), ("plan", settings.plan, settings.label.capitalize()))
    ):
        if plan is None and key in _FULL:
            sides[name] = _FULL[key]
            continue
        for read in _read(model, tokenizer, prompt, plan):
            if isinstance(read, Side):
                sides[name] = read
            else:
                yield Moment(f"{words}: {read} of {length} tokens", (i + 0.95 * read / length) / 2)
    while key not in _FULL and len(_FULL) >= KEPT:
        _FULL.pop(next(iter(_FULL)))
    _FULL[key] = sides["full"]
    yield Moment("Done", 1.0, Result(settings, length, **sides))


_FULL: dict[tuple[tuple[int, ...], str], Side] = {}  # runs under full attention, by tokens and code


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Result:
    """The result alone."""
    *_, last = watch(model, tokenizer, settings)
    return last.result


@torch.no_grad()
def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, plan: SpanPlan | None
) -> Iterator[int | Side]:
    """Read the prompt chunk by chunk, yield how many tokens are read, and at the end what came of it."""
    cache = DynamicCache() if plan is None else SpanCache(plan)
    ids, loss = prompt.ids.to(model.device), 0.0
    yield 0
    for start in range(0, len(ids), CHUNK):
        stop = min(start + CHUNK, len(ids))
        states = _step(model, plan, ids[start:stop], cache)  # [n, C]
        first, last = max(start, CONTEXT - 1), min(stop, prompt.document - 1)  # they predict the tokens that count
        if first < last:
            logits = model.lm_head(states[first - start : last - start]).float()  # [n, V]
            loss += float(F.cross_entropy(logits, ids[first + 1 : last + 1], reduction="sum"))
        yield stop
    size, fork = _nbytes(cache), copy.deepcopy(cache)
    code, last = prompt.code.to(model.device), states[-1:]
    after = torch.cat([last, _step(model, plan, code[:-1], fork)])  # [digits, C]
    digits = model.lm_head(after).float().softmax(-1)  # [digits, V]
    best = digits.argmax(-1).tolist()
    written = [best[0]]
    while len(written) < len(code):
        state = _step(model, plan, torch.tensor(written[-1:], device=model.device), cache)
        written.append(int(model.lm_head(state)[0].argmax()))
    yield Side(
        digits.gather(1, code[:, None])[:, 0].tolist(), [tokenizer.decode([i]) for i in best],
        tokenizer.decode(written), math.exp(loss / (prompt.document - CONTEXT)), size,
    )  # fmt: skip


def _step(model: PreTrainedModel, plan: SpanPlan | None, ids: Tensor, cache: DynamicCache | SpanCache) -> Tensor:
    """Final states of the next tokens `ids` [n], as [n, C]."""
    with nullcontext() if plan is None else attach(model, plan):
        return model.base_model(ids[None], past_key_values=cache).last_hidden_state[0]


def _nbytes(cache: DynamicCache | SpanCache) -> int:
    if isinstance(cache, SpanCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@lru_cache(maxsize=1)
def stored() -> dict[str, Result]:
    """The examples' results as written by `python -m apps.masformer --write-first-view`."""
    return {name: Result.from_data(d) for name, d in json.loads(STORED.read_text(encoding="utf-8")).items()}


def store(results: dict[str, Result]) -> None:
    """Write them, one part per line."""
    write(STORED, {name: result.to_data() for name, result in results.items()})
    stored.cache_clear()

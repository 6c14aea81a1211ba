"""What the PASTA page shows: one prompt run without and with steering. Library calls only, nothing of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from zq_lib import pasta
from zq_lib.pasta import items
from zq_lib.pasta.steering import prompt_bias
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "pasta.json"
MOST_TOKENS, MOST_NEW, MOST_CHARACTERS = 300, 48, 2000
CHUNK = 4  # new tokens between two looks at the page's Stop button
HEADS = ("profile", "all", "one")


@dataclass(frozen=True)
class Settings:
    """What the controls say. `heads` is "profile", "all" or "one"; only "one" looks at `layer` and `head`."""

    text: str
    chat: bool = False
    alpha: float = 0.01
    heads: str = "profile"
    layer: int = 23
    head: int = 4
    protect: str = "none"
    new_tokens: int = 12

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text='' has no words; write a prompt with *stars* around what matters")
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(
                f"text has {len(self.text)} characters, more than the {MOST_CHARACTERS} this page takes; shorten it"
            )
        if self.heads not in HEADS:
            raise ValueError(f"heads={self.heads!r} is not known; choose one of {', '.join(HEADS)}")
        if not 1 <= self.new_tokens <= MOST_NEW:
            raise ValueError(f"new_tokens={self.new_tokens!r} is out of range; choose 1 to {MOST_NEW}")

    @property
    def source(self) -> str | list[dict[str, str]]:
        """What `pasta.encode` takes."""
        return [{"role": "user", "content": self.text}] if self.chat else self.text

    @property
    def config(self) -> pasta.PastaConfig:
        """The library's settings. Raises ValueError where it would."""
        heads: Any = {self.layer: [self.head]} if self.heads == "one" else self.heads
        return pasta.PastaConfig(alpha=self.alpha, heads=heads, protect=self.protect)

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> pasta.Prompt:
        """The prompt, checked for length and for having a mark."""
        prompt = pasta.encode(tokenizer, self.source)
        if (length := prompt.input_ids.shape[1]) > MOST_TOKENS:
            raise ValueError(f"text has {length} tokens, more than the {MOST_TOKENS} this page takes; shorten it")
        if not prompt.marked.any():
            raise ValueError("text has no marked word; put *stars* around some words, or choose them under the text")
        return prompt

    def python(self) -> str:
        """A program that gives the steered answer."""
        heads = f"{{{self.layer}: [{self.head}]}}" if self.heads == "one" else repr(self.heads)
        lines = "\n".join(f"    {part!r}" for part in _pieces(self.text))
        source = '[{"role": "user", "content": text}]' if self.chat else "text"
        return (
            "from zq_lib import pasta\n"
            "from zq_lib.core.models import load\n\n"
            f"text = (\n{lines}\n)\n"
            "model, tokenizer = load()\n"
            f"prompt = pasta.encode(tokenizer, {source})\n"
            f"with pasta.attach(model, alpha={self.alpha:g}, heads={heads}, protect={self.protect!r}) as steering:\n"
            f"    output = steering.generate(prompt, max_new_tokens={self.new_tokens})\n"
            "print(tokenizer.decode(output[0, prompt.input_ids.shape[1]:], skip_special_tokens=True))\n"
        )


@dataclass(frozen=True)
class Side:
    """One run. `share` [L, H] is what the marks get of the last prompt row; `row` [T] is that row, a mean over the
    steered heads; `logprob` is the mean per token of the unsteered answer, `repeated` the share of repeated word pairs.
    """

    answer: str
    ids: list[int]
    share: list[list[float]]
    row: list[float]
    logprob: float
    repeated: float


@dataclass(frozen=True)
class Comparison:
    """Both runs of one prompt. `tokens` and `marked` have one entry per prompt token; `following` are the most likely
    next tokens of either side with their probability without and with steering."""

    settings: Settings
    heads: list[tuple[int, int]]
    tokens: list[str]
    marked: list[bool]
    following: list[tuple[str, float, float]]
    plain: Side
    steered: Side

    def share(self, side: Side) -> float:
        """Mean share of the marks over the steered heads."""
        return sum(side.share[layer][h] for layer, h in self.heads) / len(self.heads)

    def to_data(self) -> dict[str, Any]:
        """JSON types only, floats to four digits."""
        return rounded(asdict(self))

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Comparison:
        sides = {name: Side(**data[name]) for name in _SIDES}
        heads, following = ([tuple(x) for x in data[name]] for name in ("heads", "following"))
        return cls(Settings(**data["settings"]), heads, data["tokens"], data["marked"], following, **sides)


_SIDES = ("plain", "steered")


@dataclass
class Moment:
    """How far a comparison is: the answers so far and, at the end, the result."""

    said: str
    answers: dict[str, str] = field(default_factory=lambda: dict.fromkeys(_SIDES, ""))
    result: Comparison | None = None


def watch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[Moment]:
    """Run both sides and yield the answers as they grow; the last moment has the result.

    Closing the iterator stops the model after the running chunk and detaches it. Each chunk enters the steering anew,
    because a generator's steps may run in different threads, and emphasis belongs to one.
    """
    prompt = settings.encode(tokenizer)
    moment = Moment("Reading the prompt")
    length = prompt.input_ids.shape[1]
    with (
        pasta.attach(model, replace(settings.config, alpha=1.0)) as plain,
        pasta.attach(model, settings.config) as ours,
    ):
        yield moment
        handles = dict(zip(_SIDES, (plain, ours), strict=True))
        seen = {name: _look(handle, prompt) for name, handle in handles.items()}
        outputs = {}
        for name, handle in handles.items():
            for ids in _grow(handle, prompt, settings.new_tokens):
                moment.answers[name] = tokenizer.decode(ids, skip_special_tokens=True)
                moment.said = f"{'Steered' if name == 'steered' else 'Unsteered'} answer: {len(ids)} tokens"
                outputs[name] = ids
                yield moment
        moment.said = "Measuring the price"
        yield moment
        sides = {}
        for name, handle in handles.items():
            _, share, row = seen[name]
            score = _logprob(handle, prompt, outputs["plain"])
            answer = moment.answers[name]
            sides[name] = Side(
                answer, outputs[name].tolist(), share.tolist(), row.tolist(), score, items.repeated_bigrams(answer)
            )
        heads = [(layer, h) for layer, hs in ours.heads.items() for h in hs]
    tokens = [tokenizer.decode([int(i)]) for i in prompt.input_ids[0, :length]]
    before, after = (seen[name][0] for name in _SIDES)
    following = [(tokenizer.decode([i]), float(before[i]), float(after[i])) for i in _best(before, after)]
    moment.result = Comparison(settings, heads, tokens, prompt.marked[0].tolist(), following, **sides)
    moment.said = "Done"
    yield moment


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Comparison:
    """The result alone."""
    *_, last = watch(model, tokenizer, settings)
    return last.result


@torch.no_grad()
def _look(steering: pasta.Steering, prompt: pasta.Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token probabilities [V], share of the marks [L, H], and the last row [T], a mean over the steered heads."""
    with steering.steer(prompt, record=True):
        logits = steering.model(**prompt.inputs, logits_to_keep=1).logits[0, -1]
    share = steering.report().after[:, 0]
    chosen = [steering.last_row()[layer, 0, list(hs)] for layer, hs in steering.heads.items()]
    weighted = torch.cat(chosen) * prompt_bias(prompt, steering.config).beta[0].exp()  # [N, T]
    row = (weighted / weighted.sum(-1, keepdim=True)).mean(0)
    return logits.float().softmax(-1), share, row


def _best(before: Tensor, after: Tensor, each: int = 3) -> list[int]:
    """Ids of the `each` most likely tokens of either side, the steered side's first, without repeats."""
    return list(dict.fromkeys([*after.topk(each).indices.tolist(), *before.topk(each).indices.tolist()]))


def _grow(steering: pasta.Steering, prompt: pasta.Prompt, most: int) -> Iterator[Tensor]:
    """The greedy answer's ids, growing by up to CHUNK tokens, [n]. Ends early at the end token."""
    ids, cache, start = prompt.input_ids, DynamicCache(), prompt.input_ids.shape[1]
    while (made := ids.shape[1] - start) < most:
        with steering.steer(prompt), torch.no_grad():
            ids = steering.model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
                max_new_tokens=min(CHUNK, most - made),
            )  # fmt: skip
        yield ids[0, start:]
        if int(ids[0, -1]) in _ends(steering.model):
            return


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@torch.no_grad()
def _logprob(steering: pasta.Steering, prompt: pasta.Prompt, answer: Tensor) -> float:
    """Mean log-probability per token that this side gives `answer` [n]."""
    ids = torch.cat([prompt.input_ids[0], answer])[None]
    with steering.steer(prompt):
        logits = steering.model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]  # [n, V]
    return float(logits.float().log_softmax(-1).gather(-1, answer[:, None]).mean())


def _pieces(text: str, most: int = 70) -> list[str]:
    """The text cut after spaces, so that the lines of a program stay short."""
    return re.findall(rf".{{1,{most}}}(?:\s|$)|.{{1,{most}}}", text, re.DOTALL)


def stored() -> dict[str, Comparison]:
    """The examples' results as written by `python -m apps.pasta --write-first-view`."""
    return {name: Comparison.from_data(d) for name, d in json.loads(STORED.read_text(encoding="utf-8")).items()}


def store(results: dict[str, Comparison]) -> None:
    """Write the examples' results, one side per line."""
    write(STORED, {name: result.to_data() for name, result in results.items()})

"""Passkey retrieval: a code of six digits in a long text, and the question for it at the end.

Two disjoint families of prompts. Selection prompts hide the code among repeated filler sentences; layers are chosen on
them. Held-out prompts word it otherwise, at another depth, in real prose; plans are judged on them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import data

DIGITS = 6
HELD_OUT_PASSAGES = 100  # of QuAC; perplexity and training use later ones
SELECTION = ("The pass key is {code}.", "What is the pass key? The pass key is {code}")
HELD_OUT = (
    ("Note: the access code of the archive is {code}.", "As noted above, the access code of the archive is {code}"),
    ("The secret number of this document is {code}. Keep it in mind.", "The secret number of this document is {code}"),
    ("To open the safe, enter {code} on the keypad.", "To open the safe, enter {code}"),
    ("My locker combination is {code}, please do not forget it.", "My locker combination is {code}"),
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A text whose last `answer` tokens a model should know from far back. `ids` [T] int64."""

    ids: Tensor
    answer: int
    depth: float  # where the needle is, from 0 (start) to 1

    def __post_init__(self) -> None:
        if not 0 < self.answer < len(self.ids):
            raise ValueError(
                f"answer={self.answer} tokens do not fit a text of {len(self.ids)}; give fewer, at least 1"
            )


@dataclass(frozen=True)
class Retrieval:
    """How a model did on probes: per probe, which answer tokens came out on top, and their mean log probability."""

    hits: tuple[tuple[bool, ...], ...]
    log_p: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of answer tokens that are the model's first choice, with the right tokens before them."""
        flat = [hit for row in self.hits for hit in row]
        return sum(flat) / len(flat)

    @property
    def mean_log_p(self) -> float:
        return sum(self.log_p) / len(self.log_p)


def selection(tokenizer: PreTrainedTokenizerBase, count: int = 4, tokens: int = 306, seed: int = 0) -> list[Probe]:
    """Prompts of at most `tokens` tokens of repeated filler sentences, the code at different depths."""
    draw = random.Random(seed)
    sentences = _filler()
    probes = []
    for i in range(count):
        order = draw.sample(sentences, len(sentences))
        probes.append(_probe(tokenizer, (order * 40), SELECTION, tokens, (i + 0.5) / count, draw))
    return probes


def held_out(
    tokenizer: PreTrainedTokenizerBase, count: int = 12, shortest: int = 482, longest: int = 926, seed: int = 1
) -> list[Probe]:
    """Prompts of real prose (biographies) in four other wordings, lengths and depths spread evenly."""
    draw = random.Random(seed)
    prose = _prose()
    probes = []
    for i in range(count):
        tokens = shortest + (longest - shortest) * i // max(1, count - 1)
        start = draw.randrange(len(prose) - 400)
        depth = 0.6 * ((i * 5) % count) / count  # all so early that no window of the question reaches it
        probes.append(_probe(tokenizer, prose[start : start + 400], HELD_OUT[i % len(HELD_OUT)], tokens, depth, draw))
    return probes


def _probe(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], wording: tuple[str, str], tokens: int, depth: float,
    draw: random.Random,
) -> Probe:  # fmt: skip
    code = "".join(draw.choice("0123456789") for _ in range(DIGITS))
    needle, question = (part.format(code=code) for part in wording)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    room = tokens - len(encode(f" {needle}")) - len(encode(f"\n{question}"))
    before, after = _take(sentences, int(room * depth), encode)
    rest, _ = _take(after, room - len(encode(" ".join(before))), encode)
    text = " ".join([*before, needle, *rest]) + f"\n{question}"
    return Probe(torch.tensor(encode(text)), len(encode(code)), depth)


def _take(sentences: Sequence[str], tokens: int, encode) -> tuple[list[str], Sequence[str]]:  # noqa: ANN001
    """As many whole sentences from the front as fit into `tokens`, and the others."""
    taken, used = [], 0
    for sentence in sentences:
        used += len(encode(f" {sentence}"))
        if used > tokens:
            break
        taken.append(sentence)
    return taken, sentences[len(taken) :]


@cache
def _filler() -> list[str]:
    text = files("zq_lib.masformer").joinpath("data/filler.txt").read_text("utf-8")
    return [line for line in text.split("\n") if line]


@cache
def _prose() -> list[str]:
    """Sentences of biographies (QuAC), of usual length and without digits, in their order."""
    found = [s.strip() for s in " ".join(data.quac_passages()[:HELD_OUT_PASSAGES]).split(". ")]
    return [f"{s}." for s in found if 40 < len(s) < 220 and s[0].isupper() and not any(c.isdigit() for c in s)]


@torch.no_grad()
def retrieve(model: PreTrainedModel, probes: Sequence[Probe]) -> Retrieval:
    """Ask every probe, with the right tokens before each answer token. Raises ValueError without probes."""
    if not probes:
        raise ValueError("probes=[] asks nothing; give at least one")
    hits, log_p = [], []
    for probe in probes:
        logits = model(probe.ids[None].to(model.device), use_cache=False, logits_to_keep=probe.answer + 1).logits
        hit, value = judge(logits[0, :-1], probe)
        hits.append(hit)
        log_p.append(value)
    return Retrieval(tuple(hits), tuple(log_p))


def judge(logits: Tensor, probe: Probe) -> tuple[tuple[bool, ...], float]:
    """Hits and mean log probability of a probe's answer from the logits before it, [answer, V]."""
    wanted = probe.ids[-probe.answer :].to(logits.device)
    chosen = logits.float().log_softmax(-1).gather(1, wanted[:, None])
    return tuple((logits.argmax(-1) == wanted).tolist()), float(chosen.mean())

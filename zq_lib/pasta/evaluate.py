"""Measure a model on PASTA's items, steered or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core.lab import Row, proportion
from zq_lib.pasta.items import Item
from zq_lib.pasta.markup import MarkedText, parse
from zq_lib.pasta.prompt import Message, encode
from zq_lib.pasta.steering import Steering

MARKS = {"stars": ("*", "*"), "bold": ("**", "**"), "quotes": ('"', '"')}


@dataclass(frozen=True)
class Choice:
    """What a model answers to N forced choices: is the target more likely than the competitor (the paper's efficacy
    score), its probability, and whether it is the single most likely token. [N] each."""

    prefers: Tensor
    probability: Tensor
    top1: Tensor

    @classmethod
    def pooled(cls, choices: Sequence[Choice]) -> Choice:
        """Several as one, in order."""
        return cls(*(torch.cat([getattr(c, part.name) for c in choices]) for part in fields(cls)))

    def row(self, **label: object) -> Row:
        """One table row: ES with Wilson's 95 % interval, mean probability with its standard error, top-1."""
        es, low, high = proportion(self.prefers.tolist())
        error = float(self.probability.std() / len(self.probability) ** 0.5) if len(self.probability) > 1 else 0.0
        return {
            **label, "n": len(self.prefers), "es": es, "es_low": low, "es_high": high,
            "p": float(self.probability.mean()), "p_se": error, "top1": float(self.top1.float().mean()),
        }  # fmt: skip


@torch.no_grad()
def forced_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    steering: Steering | None = None,
    *,
    paraphrase: bool = False,
    marks: str | None = None,
    batch: int = 22,
) -> Choice:
    """Ask every item once, first tokens only, greedy probabilities.

    `paraphrase` asks in the item's other words; `marks` ("stars", "bold", "quotes") writes the mark into the text, the
    way people ask for attention without PASTA.
    """
    sources = [parse(i.paraphrase if paraphrase else i.prompt) for i in items]
    if marks is not None:
        sources = [written_out(s, marks) for s in sources]
    first = [[tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (i.target, i.competitor)] for i in items]
    prefers, probability, top1 = [], [], []
    for start in range(0, len(items), batch):
        prompt = encode(tokenizer, sources[start : start + batch]).to(model.device)
        with _steered(steering, prompt):
            logits = model(**prompt.inputs, position_ids=prompt.position_ids, use_cache=False, logits_to_keep=1).logits
        probs = logits[:, -1].float().softmax(-1)  # [b, V]
        pair = torch.tensor(first[start : start + batch], device=probs.device)
        both = probs.gather(1, pair)  # [b, 2]
        prefers.append(both[:, 0] > both[:, 1])
        probability.append(both[:, 0])
        top1.append(probs.argmax(-1) == pair[:, 0])
    return Choice(*(torch.cat(x).cpu() for x in (prefers, probability, top1)))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    steering: Steering | None = None,
    *,
    marks: str | None = None,
    max_new_tokens: int = 24,
    batch: int = 20,
) -> list[str]:
    """Greedy answers to marked user messages through the chat template."""
    read = [parse(p) for p in prompts]
    if marks is not None:
        read = [written_out(r, marks) for r in read]
    chats: list[list[Message]] = [[{"role": "user", "content": r}] for r in read]
    out = []
    for start in range(0, len(chats), batch):
        prompt = encode(tokenizer, chats[start : start + batch]).to(model.device)
        with _steered(steering, prompt):
            ids = model.generate(**prompt.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        out += tokenizer.batch_decode(ids[:, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return out


def written_out(marked: MarkedText, marks: str) -> MarkedText:
    """The text with its marks written into it as characters, and no emphasis."""
    if marks not in MARKS:
        raise ValueError(f"marks={marks!r} is not known; choose one of {', '.join(MARKS)}")
    before, after = MARKS[marks]
    text = marked.text
    for span in sorted(marked.spans, reverse=True):
        text = text[: span.start] + before + text[span.start : span.end] + after + text[span.end :]
    return MarkedText(text)


@contextlib.contextmanager
def _steered(steering: Steering | None, prompt: object) -> Iterator[None]:
    with steering.steer(prompt) if steering is not None else contextlib.nullcontext():
        yield

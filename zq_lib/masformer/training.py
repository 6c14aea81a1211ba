"""Continual training of a converted model on long text, as a plain loop that yields what happened.

    with masformer.attach(model, full="even", count=8):
        texts = training.documents(tokenizer, data.quac_passages())
        for row in training.train(model, training.batches(texts, length=1024), TrainingConfig(steps=40)):
            ...                                                   # {"step": 1, "loss": 3.1, ...}

Every weight is trained with AdamW on next-token prediction (or the attention's alone). The local layers run their own
backward pass, so memory and work follow the plan. Under accelerate the same loop runs in every process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core.attach import attention_modules
from zq_lib.core.lab import Row

TRAINABLE = ("all", "attention")


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe. `rate` rises over the first `warmup` part of the steps and falls to a tenth along a cosine.

    `trainable` is "all" or "attention" (the projections of every attention layer: a third less work and memory);
    `accumulate` batches make one step.
    """

    steps: int = 40
    rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    trainable: str = "all"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate!r} must lie between 0 and 1, for example 1e-4")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup!r} is a part of the steps; give 0 to 1, for example 0.1")
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable={self.trainable!r} is not known; choose one of {', '.join(TRAINABLE)}")

    def rate_at(self, step: int) -> float:
        """Learning rate of step 1 to `steps`."""
        rising = max(1, round(self.warmup * self.steps))
        if step <= rising:
            return self.rate * step / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[Tensor]:
    """Each text as tokens, [n] int64."""
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def batches(
    texts: Sequence[Tensor], *, length: int = 1024, batch: int = 1, end: int = 0, quote: int = 0, seed: int = 0,
    rank: int = 0, ranks: int = 1,
) -> Iterator[Tensor]:  # fmt: skip
    """Endless batches [batch, length] of texts in random order, joined by the token `end` and cut to `length`.

    With `quote` > 0 each row ends with its own first `quote` tokens again, so that predicting them needs what lies a
    whole row back. Every one of `ranks` processes gets other rows; the same seed gives the same rows.
    """
    if not 0 <= quote < length // 2:
        raise ValueError(f"quote={quote} tokens do not fit twice into length={length}; give 0 to {length // 2 - 1}")
    draw, kept, row = random.Random(seed), torch.empty(0, dtype=torch.long), 0
    glue = torch.tensor([end])
    rows: list[Tensor] = []
    while True:
        while len(kept) < length - quote:
            kept = torch.cat([kept, draw.choice(texts), glue])
        text, kept = kept[: length - quote], kept[length - quote :]
        if row % ranks == rank:
            rows.append(torch.cat([text, text[:quote]]))
        row += 1
        if len(rows) == batch:
            yield torch.stack(rows)
            rows = []


def train(
    model: PreTrainedModel, source: Iterable[Tensor], config: TrainingConfig | None = None, *, accelerator: Any = None
) -> Iterator[Row]:
    """Train `model` where it stands, and yield a row after every step: step, loss, rate, gradient norm, tokens.

    `source` gives batches of tokens [B, T]. With an `accelerate.Accelerator` the model is wrapped for data parallelism
    and gradients are averaged over processes. The model is in eval mode again, and every weight asks for gradients as
    before, when the loop ends or is left.

    Raises FloatingPointError when the loss is no longer a number.
    """
    config = config or TrainingConfig()
    chosen = _chosen(model, config.trainable)
    asked = {p: p.requires_grad for p in model.parameters()}
    for p in model.parameters():
        p.requires_grad_(p in chosen)
    optimizer = torch.optim.AdamW(list(chosen), lr=config.rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    wrapped: nn.Module = model.train()
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    batches, tokens = iter(source), 0
    try:
        for step in range(1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.rate_at(step)
            total = 0.0
            for _ in range(config.accumulate):
                ids = next(batches).to(model.device)
                loss = next_token_loss(wrapped, ids) / config.accumulate
                loss.backward() if accelerator is None else accelerator.backward(loss)
                total += float(loss.detach())
                tokens += ids.numel()
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {total} at step {step}; use a smaller rate than {config.rate:g}")
            norm = nn.utils.clip_grad_norm_(list(chosen), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            yield {"step": step, "loss": total, "rate": config.rate_at(step), "norm": float(norm), "tokens": tokens}
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
            p.grad = None
        model.eval()


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of every token given those before it, in nats. `ids` [B, T]"""
    logits = model(ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: Sequence[Tensor], skip: int = 128) -> float:
    """exp of the mean loss over all tokens of `texts` ([T] each) but the first `skip`, which only give context."""
    total, count = 0.0, 0
    for ids in texts:
        logits = model(ids[None].to(model.device), use_cache=False).logits[0, skip - 1 : -1]  # [T - skip, V]
        wanted = ids[skip:].to(logits.device)
        total += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(total / count)


def _chosen(model: PreTrainedModel, trainable: str) -> dict[nn.Parameter, None]:
    """The weights to train, in order and each once."""
    if trainable == "all":
        return dict.fromkeys(model.parameters())
    return dict.fromkeys(p for module in attention_modules(model).values() for p in module.parameters())

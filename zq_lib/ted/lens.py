"""A decoder: the first stage as a tuned lens, and ten layers that learn from thirty (section 7.3).

A filter as wide as the model in front of its frozen final norm and unembedding says what a layer would answer if it
were the last: a tuned lens (Belrose et al. 2023). The student starts from every third block of the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import data
from zq_lib.core.lab import FULL, Row
from zq_lib.core.language import perplexity
from zq_lib.ted.arms import LABELS, Arm, straight_down
from zq_lib.ted.baselines import layerwise
from zq_lib.ted.cache import StateCache, look
from zq_lib.ted.config import TedConfig
from zq_lib.ted.distillation import distil
from zq_lib.ted.filters import TaskFilters, task_filters
from zq_lib.ted.layers import EXAMPLE, Batch, Seen, blocks
from zq_lib.ted.loss import TedLoss
from zq_lib.ted.reference import uniform
from zq_lib.ted.stage_one import FilterStep, fit

KEPT = 10  # blocks of the student
KD = Arm("KD")
LWD = Arm("LWD", "identity")
TED = Arm("TED", "trained")
ARMS = (Arm(LABELS, kd=False), KD, LWD, TED)
HELD_OUT = 900  # passages from here on are only judged on
APART = 100  # passages between the texts of two seeds


@dataclass(frozen=True)
class Size:
    """How large an experiment on running text is.

    `layers` have a lens, which sees `lens_windows`; the student sees `steps` batches of windows. The first stage's loss
    is taken on `sample` tokens of a batch behind each layer, and goes over `filter_steps` batches. A student is judged
    `every` so many steps.
    """

    layers: tuple[int, ...]
    tokens: int
    batch: int
    lens_steps: int
    filter_steps: int
    sample: int
    test: int
    steps: int
    every: int


SIZES = {
    "quick": Size((10, 20, 29), 64, 2, 8, 4, 64, 2, 4, 2),
    FULL: Size((5, 10, 15, 20, 25, 29), 128, 2, 32, 16, 128, 12, 60, 10),
}
FILTER_RATE, RATE = 1e-3, 5e-4
WEIGHT = 1.0  # of the filtered states' normalised error, and of the output's divergence


def windows(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, skip: int = 0) -> list[Tensor]:
    """`count` windows [tokens] of biographies, one after the other, from the passage `skip` on."""
    found: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.long)
    for passage in data.quac_passages()[skip:]:
        ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
        rest = torch.cat([rest, torch.tensor([*ids, tokenizer.eos_token_id])])
        while len(rest) >= tokens:
            found.append(rest[:tokens])
            rest = rest[tokens:]
            if len(found) == count:
                return found
    raise ValueError(f"count={count} windows of {tokens} tokens are more than the text has, {len(found)}; ask for less")


def batches(texts: Sequence[Tensor], size: int) -> list[Batch]:
    """Windows [T] as batches for a language model, numbered."""
    found = []
    for start in range(0, len(texts) - size + 1, size):
        ids = torch.stack(list(texts[start : start + size]))
        found.append({"input_ids": ids, "labels": ids, EXAMPLE: torch.arange(start, start + size)})
    return found


def lens(model: PreTrainedModel, train: Sequence[Batch], size: Size) -> Iterator[tuple[FilterStep, TaskFilters]]:
    """Fit a lens behind every layer of `size`, from the identity, step by step, on states that are computed once."""
    cache = StateCache.of(model, train, size.layers, logits=False)
    torch.manual_seed(0)
    filters = TaskFilters(model, TedConfig(sample=size.sample), size.layers)
    for step in fit(filters, train, cache=cache, learning_rate=FILTER_RATE):
        yield step, filters


def lens_rows(model: PreTrainedModel, filters: TaskFilters, test: Sequence[Batch]) -> list[Row]:
    """Loss and share of right next tokens on a text behind each layer, read by the identity and by the lens.

    The last row is the whole model.
    """
    cache = StateCache.of(model, test, filters.layers, logits=False)
    plain = TaskFilters(model, TedConfig(), filters.layers).report(test, cache)
    tuned = filters.report(test, cache)
    rows = [
        {"layer": str(a.layer), "identity": a.loss, "lens": b.loss, "identity_right": a.accuracy,
         "lens_right": b.accuracy}
        for a, b in zip(plain, tuned, strict=True)
    ]  # fmt: skip
    loss, right = _whole(model, test)
    return [*rows, {"layer": "model", "identity": loss, "lens": loss, "identity_right": right, "lens_right": right}]


@torch.no_grad()
def _whole(model: PreTrainedModel, test: Sequence[Batch]) -> tuple[float, float]:
    losses, right = [], []
    for batch in test:
        ids = batch["input_ids"]
        found = model(input_ids=ids, labels=ids, use_cache=False)
        losses.append(float(found.loss))
        right.append(float((found.logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean()))
    return sum(losses) / len(losses), sum(right) / len(right)


def cut(model: PreTrainedModel, count: int = KEPT) -> PreTrainedModel:
    """A student that starts from `count` of the model's blocks, the last of each of as many groups, and all else of it.

    Its embeddings, and with them the unembedding, are frozen.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.use_cache = count, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    student, stack = type(model)(config).to(model.dtype), blocks(model)
    inside = {id(tensor) for tensor in stack.state_dict(keep_vars=True).values()}
    rest = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) not in inside}
    student.load_state_dict(rest, strict=False)
    for own, teacher in uniform(count, len(stack), count):
        blocks(student)[own - 1].load_state_dict(stack[teacher - 1].state_dict())
    student.get_input_embeddings().weight.requires_grad_(False)
    return student.eval()


@dataclass
class Once:
    """What a teacher shows of the batch that several students learn from in turn: it is run once for all of them."""

    teacher: nn.Module
    layers: tuple[int, ...]
    batch: Batch | None = None
    found: Seen | None = None

    def seen(self, batch: Batch) -> Seen:
        """States at the layers and logits, of this batch alone."""
        if batch is not self.batch:
            self.batch, self.found = batch, look(self.teacher, batch, self.layers, logits=True)
        return self.found


def make_loss(
    arm: Arm, teacher: PreTrainedModel, student: PreTrainedModel, train: Sequence[Batch], size: Size
) -> TedLoss:
    """The loss of an arm; for TED both models' filters are fitted first, on `size.filter_steps` batches."""
    kd_weight, layer_weight = WEIGHT if arm.kd else 0.0, WEIGHT if arm.target else 0.0
    config = TedConfig(kd_weight=kd_weight, layer_weight=layer_weight, sample=size.sample)
    torch.manual_seed(0)
    if arm.target is None:
        return TedLoss(teacher, config=config)
    if arm.target == "identity":
        return layerwise(teacher, student, train[: size.filter_steps], config)
    filters = task_filters(teacher, student, config)
    for own in filters:
        for _ in fit(own, train[: size.filter_steps], learning_rate=FILTER_RATE):
            pass
    return TedLoss(teacher, *filters, config)


def distillation(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    train: Sequence[Batch],
    texts: Sequence[Tensor],
    size: Size = SIZES[FULL],
    arms: Sequence[Arm] = ARMS,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Every arm from one student on the same batches, side by side; its perplexity on `texts` as it learns.

    A row is an arm at a step, with the terms of its last batch. The teacher is the row before all.
    """
    yield {"arm": "teacher", "step": 0, "tokens": 0, "perplexity": perplexity(teacher, texts), **_EMPTY}
    layers = tuple(layer for _, layer in uniform(len(blocks(student)), len(blocks(teacher)), len(blocks(student))))
    shown = Once(teacher, layers)
    begin = perplexity(student, texts)
    runs = []
    for arm in arms:
        say(f"{arm.name}: filters")
        own = copy.deepcopy(student)
        loss = make_loss(arm, teacher, own, train, size)
        optimizer, schedule = straight_down([*own.parameters(), *loss.parameters()], RATE, size.steps)
        runs.append((arm, own, distil(own, loss, train[: size.steps], optimizer, cache=shown), schedule))
        yield {"arm": arm.name, "step": 0, "tokens": 0, "perplexity": begin, **_EMPTY}
    for step in range(1, size.steps + 1):
        say(f"step {step}")
        for arm, own, updates, schedule in runs:
            terms = next(updates).terms
            schedule.step()
            if step % size.every == 0:
                own.eval()
                yield {
                    "arm": arm.name, "step": step, "tokens": step * train[0]["input_ids"].numel(),
                    "perplexity": perplexity(own, texts), "task": float(terms.task), "kd": float(terms.kd),
                    "layer": float(terms.layer),
                }  # fmt: skip
                own.train()


_EMPTY = {"task": "", "kd": "", "layer": ""}

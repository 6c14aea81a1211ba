"""A fair comparison of ways to distil: one start, the same batches in the same order, equally many updates.

An arm is a rule for the loss. What the arms share is a `Problem`: a teacher whose states are kept, the student from
which every arm starts, and examples to learn from and to be judged on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from zq_lib.core.lab import Row
from zq_lib.ted.baselines import layerwise, projected
from zq_lib.ted.cache import StateCache
from zq_lib.ted.config import TedConfig
from zq_lib.ted.distillation import distil
from zq_lib.ted.filters import task_filters
from zq_lib.ted.layers import EXAMPLE, Batch, match
from zq_lib.ted.loss import TedLoss, Terms
from zq_lib.ted.stage_one import fit

START, LABELS = "start", "labels only"


@dataclass(frozen=True)
class Arm:
    """A way to distil.

    target   what the student's filtered states match: None is nothing, "identity" the teacher's raw states, "random"
             and "pca" a projection of them to `dim`, "trained" the first stage's filters of width `dim`
    kd       whether the output is distilled too
    fitted   whether the student's own filters went through the first stage; only a "trained" target has such
    """

    name: str
    target: str | None = None
    dim: int | None = None
    kd: bool = True
    fitted: bool = True


@dataclass
class Problem:
    """What all arms have in common. Rows are examples as tensors [n, ...] with their numbers under "example".

    `filter_epochs` and `filter_rate` are those of the first stage. `kd_weight` is that of the output's divergence.
    """

    teacher: nn.Module
    student: nn.Module
    train: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    cache: StateCache
    batch: int
    epochs: int
    rate: float
    kd_weight: float
    filter_epochs: int
    filter_rate: float = 1e-2

    @property
    def steps(self) -> int:
        """Updates of an arm."""
        return self.epochs * (len(self.train["labels"]) // self.batch)

    def batches(self, seed: int) -> Shuffled:
        """The training examples, in the order of a seed."""
        return Shuffled(self.train, self.batch, seed)

    def settings(self, arm: Arm, weight: float) -> TedConfig:
        """The config of an arm; `weight` is that of the normalised error of filtered states."""
        layer_weight = 0.0 if arm.target is None else weight
        kd_weight = self.kd_weight if arm.kd else 0.0
        return TedConfig(filter_dim=arm.dim, kd_weight=kd_weight, layer_weight=layer_weight)


class Shuffled:
    """Batches of `size` rows, in a new order at every pass, and in the same orders for the same seed.

    What is left over at the end of a pass is dropped. Token rows are cut to their longest.
    """

    def __init__(self, rows: Mapping[str, Tensor], size: int, seed: int) -> None:
        self.rows, self.size = rows, size
        self.source = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows["labels"]), generator=self.source)
        for start in range(0, len(order) - self.size + 1, self.size):
            yield take(self.rows, order[start : start + self.size])


def in_order(rows: Mapping[str, Tensor], size: int = 64) -> list[Batch]:
    """All rows once, in batches."""
    order = torch.arange(len(rows["labels"]))
    return [take(rows, part) for part in order.split(size)]


def take(rows: Mapping[str, Tensor], which: Tensor) -> Batch:
    """Some rows as a batch, cut to the longest of them."""
    batch = {key: value[which] for key, value in rows.items()}
    if "attention_mask" in batch:
        length = int(batch["attention_mask"].sum(1).max())
        batch |= {key: batch[key][:, :length] for key in ("input_ids", "attention_mask")}
    return batch


def train(
    model: nn.Module, rows: Mapping[str, Tensor], batch: int, epochs: int, rate: float, seed: int
) -> Iterator[float]:
    """Fine-tune a model on labels, AdamW with a straight line down; the loss of every step as it is made."""
    optimizer, schedule = straight_down(list(model.parameters()), rate, epochs * (len(rows["labels"]) // batch))
    batches = Shuffled(rows, batch, seed)
    model.train()
    for _ in range(epochs):
        for part in batches:
            loss = model(**{k: v for k, v in part.items() if k != EXAMPLE}).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield float(loss.detach())
    model.eval()


@torch.no_grad()
def outputs(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """Logits [n, classes] of a model in eval mode."""
    model.eval()
    skip = (EXAMPLE, "labels")
    return torch.cat([model(**{k: v for k, v in b.items() if k not in skip}).logits for b in in_order(rows)])


def judge(model: nn.Module, rows: Mapping[str, Tensor]) -> Row:
    """Accuracy and mean negative log-likelihood on all rows."""
    logits, labels = outputs(model, rows), rows["labels"]
    right = logits.argmax(-1) == labels
    return {"accuracy": float(right.double().mean()), "nll": float(F.cross_entropy(logits, labels))}


def make_loss(problem: Problem, student: nn.Module, arm: Arm, weight: float, seed: int) -> TedLoss:
    """The loss of an arm for a student that stands at the start; trains the filters that it needs."""
    config, cache, batches = problem.settings(arm, weight), problem.cache, in_order(problem.train)
    torch.manual_seed(seed)
    if arm.target is None:
        return TedLoss(problem.teacher, config=config)
    if arm.target == "identity":
        return layerwise(problem.teacher, student, batches, config, cache=cache)
    if arm.target != "trained":
        return projected(arm.target, problem.teacher, student, batches, config, cache=cache)
    theirs, own = task_filters(problem.teacher, student, config)
    rounds = {"epochs": problem.filter_epochs, "learning_rate": problem.filter_rate}
    for _ in fit(theirs, problem.batches(seed), cache=cache, **rounds):
        pass
    if arm.fitted:
        shown = StateCache.of(student, batches, own.layers, logits=False)
        for _ in fit(own, problem.batches(seed), cache=shown, **rounds):
            pass
    return TedLoss(problem.teacher, theirs, own, config, allow_untrained=not arm.fitted)


@dataclass(frozen=True)
class Moment:
    """Where a comparison is: after a step of an arm, and, with `row`, at its end, where `student` is done."""

    arm: str
    step: int
    terms: Terms
    student: nn.Module
    row: Row | None = None


def watch(problem: Problem, arms: Mapping[Arm, float], seed: int) -> Iterator[Moment]:
    """Every arm from the problem's student, step by step; `arms` holds the weight of its filtered states.

    `problem` is not changed. A row has the arm's name and weight, and its student's accuracy and loss on the test rows.
    """
    for arm, weight in arms.items():
        student = copy.deepcopy(problem.student)
        loss = make_loss(problem, student, arm, weight, seed)
        optimizer, schedule = straight_down([*student.parameters(), *loss.parameters()], problem.rate, problem.steps)
        torch.manual_seed(seed)  # dropout alike
        made = distil(
            student, loss, problem.batches(seed), optimizer, epochs=problem.epochs, cache=problem.cache
        )  # fmt: skip
        for step in made:
            schedule.step()
            yield Moment(arm.name, step.step, step.terms, student)
        row = {"arm": arm.name, "weight": "" if arm.target is None else weight, **judge(student, problem.test)}
        yield Moment(arm.name, step.step, step.terms, student, row)


def compare(problem: Problem, arms: Mapping[Arm, float], seed: int) -> list[Row]:
    """`watch` to its end: a row for the start, and one per arm."""
    start = {"arm": START, "weight": "", **judge(problem.student, problem.test)}
    return [start, *(moment.row for moment in watch(problem, arms, seed) if moment.row is not None)]


def keep_states(
    teacher: nn.Module, student: nn.Module, rows: Mapping[str, Tensor], layers: Sequence[int] = ()
) -> StateCache:
    """Logits of a teacher, and its states at `layers`, by default those that are matched with the student's."""
    return StateCache.of(teacher, in_order(rows), layers or match(student, teacher, TedConfig()).teacher)


def straight_down(parameters: Sequence[nn.Parameter], rate: float, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW, and its rate's straight line from `rate` down to 0 in `steps` steps."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=rate, weight_decay=0)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)

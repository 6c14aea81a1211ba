"""Reward models and their training: feature vectors, segments of a control task, sequences of tokens.

A reward model is any module that gives one number for each row of what it is called with: a tensor, or a mapping of
tensors as transformers' classifiers with `num_labels=1` take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zq_lib.r3m.loss import RobustRewardLoss, check_margin
from zq_lib.r3m.losses import cutoff

Inputs = Tensor | Mapping[str, Tensor]


class PairBatch(NamedTuple):
    """Both sides of B pairs as one batch of 2B rows, the chosen first, and the pairs' indices in the data set [B]."""

    inputs: Inputs
    index: Tensor


@dataclass(frozen=True)
class PairBatches:
    """Batches of pairs, shuffled anew each time they are walked through if there is a generator.

    >>> batches = PairBatches(chosen, rejected, size=64, generator=torch.Generator().manual_seed(0))
    """

    chosen: Inputs
    rejected: Inputs
    size: int = 64
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        sides = [_fields(side) for side in (self.chosen, self.rejected)]
        shapes = [{name: tuple(x.shape) for name, x in side.items()} for side in sides]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"chosen has shapes {shapes[0]} and rejected {shapes[1]}; pad both sides to one length, with a mask"
            )
        if self.size < 1 or not len(self):
            raise ValueError(f"there are {len(self)} pairs in batches of {self.size}; give at least one of both")

    def __len__(self) -> int:
        return len(next(iter(_fields(self.chosen).values())))

    def __iter__(self) -> Iterator[PairBatch]:
        count = len(self)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for index in order.split(self.size):
            yield PairBatch(self._rows(index), index)

    def _rows(self, index: Tensor) -> Inputs:
        chosen, rejected = _fields(self.chosen), _fields(self.rejected)
        rows = {name: torch.cat((x[index], rejected[name][index])) for name, x in chosen.items()}
        return rows if isinstance(self.chosen, Mapping) else rows[""]


@dataclass(frozen=True)
class RewardStep:
    """One update: its number from 1, the mean loss of its pairs, their margins before it, their indices, and lam."""

    step: int
    loss: float
    margin: Tensor
    index: Tensor
    lam: float

    @property
    def flagged(self) -> float:
        """Share of the pairs with a positive offset."""
        return float((self.margin < cutoff(self.lam)).double().mean())


class SegmentReward(nn.Module):
    """r(z) = sum_t gamma^t r(s_t, a_t) with a small network for one step: [B, M, D] -> [B].

    `mask` [B, M] marks the steps that exist, for segments of unequal length padded at their end.
    """

    def __init__(self, width: int, hidden: Sequence[int] = (64, 64), gamma: float = 1.0) -> None:
        super().__init__()
        sizes = (width, *hidden)
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.step = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        self.gamma = gamma

    def forward(self, segments: Tensor, mask: Tensor | None = None) -> Tensor:
        steps = self.step(segments)[..., 0]  # [B, M]
        if mask is not None:
            if not bool(mask.any(1).all()):
                row = int((~mask.bool().any(1)).nonzero()[0])
                raise ValueError(f"row {row} of mask has no step; drop segments that are empty")
            steps = steps.masked_fill(~mask.bool(), 0)
        if self.gamma == 1:
            return steps.sum(1)
        return steps @ self.gamma ** torch.arange(1, steps.shape[1] + 1, dtype=steps.dtype, device=steps.device)


class Standardised(nn.Module):
    """A reward with mean 0 and deviation 1 over given inputs: what an algorithm that reads values needs.

    A small lam scales rewards up, clean labels or not, because honest coin flips look like outliers; their order stays.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        with torch.no_grad():
            found = rewards_of(model, inputs)
        if len(found) < 2 or not float(found.std()) > 0:
            raise ValueError("the rewards of inputs are all equal and have no scale; give rows that differ")
        self.model = model
        self.register_buffer("mean", found.mean())
        self.register_buffer("deviation", found.std())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return (_reward(self.model(*args, **kwargs)) - self.mean) / self.deviation


def rewards_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """One reward for each row, [N]. Raises ValueError for a model that gives several."""
    return _reward(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def _reward(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 1:
        raise ValueError(
            f"the model gives outputs of shape {tuple(found.shape)}, not one reward for each row; use num_labels=1"
        )
    return found


def fit_reward(
    model: nn.Module,
    batches: Iterable[PairBatch],
    optimizer: Any,
    loss: RobustRewardLoss,
    *,
    epochs: int = 1,
    accumulate: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Iterator[RewardStep]:
    """Train a reward model, in train mode, update by update as the caller asks for them.

    An update takes the mean over `accumulate` batches, the last one over what is left. The model may be one that
    accelerate has prepared, with `backward=accelerator.backward`. The loss has no state that processes would have to
    share, unless it has an outlier budget, whose quantile is averaged over them.

    Raises ValueError, naming the pair, for rewards that overflow, before they reach the parameters.

    >>> for step in fit_reward(model, PairBatches(chosen, rejected), optimizer, RobustRewardLoss(config)): ...
    """
    model.train()
    loss.train()
    step = 0
    for _ in range(epochs):
        source = iter(batches)
        while group := list(islice(source, accumulate)):
            total, margins = 0.0, []
            for place, batch in enumerate(group):
                waits = place + 1 < len(group) and isinstance(model, DistributedDataParallel)
                with model.no_sync() if waits else nullcontext():
                    margin = loss.margin(*rewards_of(model, batch.inputs).chunk(2))
                    value = loss.of_margins(margin)
                    backward(value / len(group) if len(group) > 1 else value)
                total += float(value.detach()) / len(group)
                margins.append(margin.detach())
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            index = [batch.index for batch in group]
            yield RewardStep(step, total, *(x[0] if len(x) == 1 else torch.cat(x) for x in (margins, index)), loss.lam)
    if not step:
        raise ValueError("batches is empty, and the model learned nothing; give batches, a list if epochs is above 1")
    model.eval()


@torch.no_grad()
def pair_margins(model: nn.Module, batches: Iterable[PairBatch]) -> tuple[Tensor, Tensor]:
    """Margins [n] of all pairs, in eval mode, and their indices [n], as `outlier_report` takes them."""
    mode, found = model.training, []
    model.eval()
    for batch in batches:
        chosen, rejected = rewards_of(model, batch.inputs).float().chunk(2)
        check_margin(chosen - rejected)
        found.append((chosen - rejected, batch.index))
    model.train(mode)
    if not found:
        raise ValueError("batches is empty; give at least one pair")
    return torch.cat([m for m, _ in found]), torch.cat([i for _, i in found])


def _fields(inputs: Inputs) -> dict[str, Tensor]:
    return dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}

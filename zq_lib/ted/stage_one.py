"""The first stage: filters learn what the task needs of a frozen model's states (section 1.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from zq_lib.core.distributed import average_over_processes
from zq_lib.ted.cache import StateCache, look
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.layers import Batch, mask_of


@dataclass(frozen=True)
class FilterStep:
    """One step of the first stage: its number from 1, and each layer's loss [K]."""

    step: int
    losses: Tensor


def fit(
    filters: TaskFilters,
    batches: Iterable[Batch],
    *,
    epochs: int = 1,
    cache: StateCache | None = None,
    learning_rate: float = 1e-3,
    optimizer: Optimizer | None = None,
) -> Iterator[FilterStep]:
    """Train filters and heads on batches with labels, step by step as the caller asks for them.

    The model runs in eval mode and without gradients, or not at all where `cache` has its states. The optimiser is Adam
    unless one is given. In several processes gradients are averaged. When the filters have been fitted, `variance`
    knows the scale of their states and `origin` says "trained".

    Raises ValueError for filters without heads, batches without labels or states that are not finite.

    >>> losses = [step.losses for step in fit(filters, batches, epochs=2, cache=cache)]
    """
    if not len(filters.heads):
        raise ValueError(f"these filters are a baseline, {filters.origin!r}, which is not trained; use TaskFilters")
    parameters = [p for p in filters.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.Adam(parameters, lr=learning_rate)
    with torch.no_grad():
        for p in parameters:  # each process drew its own
            p.copy_(average_over_processes(p.clone()))
    filters.train()
    step = 0
    for _ in range(epochs):
        for batch in batches:
            _check_labels(filters.task, batch)
            seen = look(filters.model, batch, filters.layers, cache)
            losses = torch.stack([_backward(filters, k, h, batch) for k, h in enumerate(seen.states)])
            for p in parameters:
                if p.grad is not None:
                    average_over_processes(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            filters.measure(seen.states, mask_of(batch, seen.states[0].shape[:2]))
            filters.origin, step = "trained", step + 1
            yield FilterStep(step, losses)
    if not step:
        raise ValueError("batches is empty, and the filters learned nothing; give batches, a list if epochs is above 1")
    filters.eval()


def _backward(filters: TaskFilters, place: int, hidden: Tensor, batch: Batch) -> Tensor:
    """The loss of one layer, its gradient added. Layers share no parameter, so a graph is dropped before the next."""
    loss = filters.loss(place, hidden, batch, filters.config.sample)
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss behind layer {filters.layers[place]} is {loss.item()}; the model's states or labels are not "
            "finite, or the learning rate is too large"
        )
    (loss / len(filters.layers)).backward()
    return loss.detach()


def _check_labels(task: str, batch: Batch) -> None:
    wanted = ("start_positions", "end_positions") if task == "span" else ("labels",)
    if missing := [key for key in wanted if key not in batch]:
        raise ValueError(f"the batch has no {missing[0]!r}, which the task {task!r} is learnt from; add it")

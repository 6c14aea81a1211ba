"""The second stage as a plain loop: batches in, one step of the student and its filters out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zq_lib.core.distributed import average_over_processes
from zq_lib.ted.cache import StateCache
from zq_lib.ted.layers import Batch, see
from zq_lib.ted.loss import TedLoss, Terms


@dataclass(frozen=True)
class DistilStep:
    """One update: its number from 1, the terms of the loss (means over its batches), and the norms of both gradients.

    A student that stands still while its filters move is one whose filters absorb the difference.
    """

    step: int
    terms: Terms
    student_norm: float
    filter_norm: float


def distil(
    student: nn.Module,
    ted: TedLoss,
    batches: Iterable[Batch],
    optimizer: Any,
    *,
    epochs: int = 1,
    cache: StateCache | None = None,
    accumulate: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Iterator[DistilStep]:
    """Train the student, in train mode, update by update as the caller asks for them.

    `optimizer` holds the student's parameters and `ted.parameters()`. `cache` has what the teacher shows, which is then
    not run. An update takes the mean over `accumulate` batches, the last one over what is left. The student may be one
    that accelerate has prepared, with `backward=accelerator.backward`; the filters' gradients are averaged here.

    The student leaves this loop as it entered it: same parameters, no hooks, no filters.

    Raises ValueError for an optimiser without the student's filters, which would stand still.

    >>> for step in distil(student, ted, batches, optimizer): print(step.step, float(step.terms.total))
    """
    own = [p for p in ted.parameters() if p.requires_grad]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := sum(p not in held for p in own):
        raise ValueError(
            f"the optimiser lacks {missing} tensors of the student's filters; give it [*student.parameters(), "
            "*ted.parameters()], or set train_filters=False"
        )
    student.train()
    step = 0
    for _ in range(epochs):
        source = iter(batches)
        while group := list(islice(source, accumulate)):
            found = []
            for place, batch in enumerate(group):
                waits = place + 1 < len(group) and isinstance(student, DistributedDataParallel)
                with student.no_sync() if waits else nullcontext():
                    seen = see(student, batch, ted.layers)
                    terms = ted(seen, batch, None if cache is None else cache.seen(batch), overwrite=True)
                    backward(terms.total / len(group))
                found.append(terms)
            average_gradients(own)
            norms = _norm(student.parameters()), _norm(own)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield DistilStep(step, _mean(found), *norms)
    if not step:
        raise ValueError("batches is empty, and the student learned nothing; give batches, a list if epochs is above 1")
    student.eval()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of parameters that no wrapper takes care of the same in all processes."""
    for p in parameters:
        if p.grad is not None:
            average_over_processes(p.grad)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def _mean(found: list[Terms]) -> Terms:
    columns = zip(*((t.total.detach(), t.task, t.kd, t.layer, t.errors) for t in found), strict=True)
    return Terms(*(torch.stack(column).mean(0) for column in columns))

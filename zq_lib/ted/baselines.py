"""What TED is compared with, in the same loss: filters that were not learnt from the task, and none (section 1.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from zq_lib.ted.cache import StateCache, look
from zq_lib.ted.config import TedConfig
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.layers import Batch, bare, mask_of, match, width
from zq_lib.ted.loss import TedLoss

KINDS = ("identity", "random", "pca")


def baseline_filters(
    kind: str,
    model: nn.Module,
    batches: Sequence[Batch],
    config: TedConfig,
    layers: Sequence[int],
    dim: int,
    *,
    task: str | None = None,
    cache: StateCache | None = None,
) -> TaskFilters:
    """Filters without heads: "identity", a "random" projection, or the leading principal components of the states.

    Batches, for "pca" a list of them, give the states, whose scale is measured too; `cache` holds them already.

    Raises ValueError for an unknown kind, or an identity of another width than the model's.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}")
    d = width(bare(model))
    if (kind == "identity" and dim != d) or dim > d:
        raise ValueError(f"dim={dim} does not fit {kind!r} filters of states of width {d}; use {d}")
    filters = TaskFilters(model, config, layers, dim, task)
    filters.heads, filters.origin = nn.ModuleList(), kind
    if kind == "pca":
        found = principal(filters, batches, cache)
    for k, module in enumerate(filters.filters):
        module.inner = None
        if kind == "identity":
            module.outer = None
            continue
        with torch.no_grad():
            if kind == "random":
                module.outer.weight.normal_(std=d**-0.5)
            else:
                module.outer.weight.copy_(found[k][0])
                module.outer.bias.copy_(found[k][1])
    for batch in batches:
        seen = look(filters.model, batch, filters.layers, cache)
        filters.measure(seen.states, mask_of(batch, seen.states[0].shape[:2]))
    return filters.eval()


def principal(
    filters: TaskFilters, batches: Iterable[Batch], cache: StateCache | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The leading `filters.dim` principal directions of each layer's states, [d_f, d] fp64, and the bias that centres
    them, [d_f]."""
    total, count = [torch.zeros(())] * len(filters.layers), 0
    moment = list(total)
    for batch in batches:
        seen = look(filters.model, batch, filters.layers, cache)
        mask = mask_of(batch, seen.states[0].shape[:2])
        count += int(mask.sum())
        for k, h in enumerate(seen.states):
            rows = h[mask].double()  # [n, d]
            total[k], moment[k] = total[k] + rows.sum(0), moment[k] + rows.T @ rows
    if not count:
        raise ValueError("batches is empty, and principal components need states")
    found = []
    for s, m in zip(total, moment, strict=True):
        mean = s / count
        vectors = torch.linalg.eigh(m / count - torch.outer(mean, mean))[1]
        weight = vectors.flip(1)[:, : filters.dim].T  # eigh sorts ascending
        found.append((weight, -weight @ mean))
    return found


def layerwise(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    config: TedConfig,
    *,
    task: str | None = None,
    cache: StateCache | None = None,
) -> TedLoss:
    """Layer-wise distillation: the student's states, through a random map that trains, match the teacher's raw ones."""
    found, d = match(bare(student), bare(teacher), config), width(bare(teacher))
    target = baseline_filters("identity", teacher, batches, config, found.teacher, d, task=task, cache=cache)
    own = TaskFilters(student, config, found.student, d, task)
    return TedLoss(teacher, target, own, config, task=task, allow_untrained=True)


def projected(
    kind: str,
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    config: TedConfig,
    *,
    task: str | None = None,
    cache: StateCache | None = None,
) -> TedLoss:
    """TED with a "random" or "pca" projection in the place of the teacher's trained filters, and random ones of the
    student."""
    found = match(bare(student), bare(teacher), config)
    target = baseline_filters(
        kind, teacher, batches, config, found.teacher, found.filter_dim, task=task, cache=cache
    )  # fmt: skip
    own = TaskFilters(student, config, found.student, found.filter_dim, task)
    return TedLoss(teacher, target, own, config, task=task, allow_untrained=True)

"""What AdaLoRA must be compared with at the same final budget: LoRA of equal ranks, and LoRA cut afterwards by SVD."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from zq_lib.adalora.adaptation import Adaptation, attach
from zq_lib.adalora.adapter import Triplets
from zq_lib.adalora.allocation import allocate
from zq_lib.adalora.config import AdaLoraConfig


@torch.no_grad()
def attach_lora(model: nn.Module, rank: int, scale: float, **settings: Any) -> Adaptation:
    """An ordinary LoRA of one rank everywhere: W0 + scale B A with B = 0 and uniform A, as PEFT begins.

    It is an adapter whose values are fixed at 1, so that everything else works on it alike. `settings` are those of
    `AdaLoraConfig` that say which layers, for example `targets` and `train_also`.

    >>> handle = attach_lora(model, rank=2, scale=4.0, targets=("query", "value"))
    """
    config = AdaLoraConfig(
        init_rank=rank, target_rank=rank, alpha=scale * rank, orthogonality=0.0, total_steps=1, warmup=0, final=0,
        **settings,
    )  # fmt: skip
    with warnings.catch_warnings():  # that nothing will be pruned is the point
        warnings.simplefilter("ignore", UserWarning)
        handle = attach(model, config)
    for adapter in handle.adapters:
        adapter.scale = scale
        adapter.values.fill_(1.0).requires_grad_(False)
        adapter.left.zero_()
        bound = 1 / math.sqrt(adapter.right.shape[1])
        adapter.right.uniform_(-bound, bound)
    return handle


@torch.no_grad()
def truncate_by_svd(handle: Adaptation, budget: int) -> None:
    """Cut a trained adapter to `budget` ranks in all: of the singular values of all updates the largest stay.

    This is the post-hoc way to uneven ranks; each update becomes its best approximation of its rank.
    """
    most = max(a.rank for a in handle.adapters)
    parts = [singular_triplets(a) for a in handle.adapters]
    sizes = torch.stack([nn.functional.pad(s, (0, most - len(s)), value=-1.0) for _, s, _ in parts])
    keep = allocate(sizes, budget)
    for adapter, (left, size, right), row in zip(handle.adapters, parts, keep, strict=True):
        index = row[: len(size)].nonzero()[:, 0]
        adapter.resize(len(index))
        adapter.left.copy_(left[:, index])
        adapter.values.copy_(size[index] / adapter.scale)
        adapter.right.copy_(right[index])
    handle.keep, handle.shrunk, handle.finished = keep, True, True


@torch.no_grad()
def singular_triplets(adapter: Triplets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of s P diag(l) Q without building it: U [N, R], sizes [R], V^T [R, K]."""
    q_left, r_left = torch.linalg.qr(adapter.left * (adapter.scale * adapter.values))
    q_right, r_right = torch.linalg.qr(adapter.right.T)
    u, size, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, size, v @ q_right.T

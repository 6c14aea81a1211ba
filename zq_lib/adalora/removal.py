"""Cut dropped triplets out of the parameters and out of the optimiser's state while training goes on (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zq_lib.adalora.adapter import Triplets, reshape_parameter


@torch.no_grad()
def shrink(adapters: Sequence[Triplets], keep: Tensor, optimizer: Optimizer | None) -> None:
    """Keep the triplets of `keep` [n, R] bool. The Parameter objects stay the same, so the optimiser knows them still.

    State tensors of the parameter's shape (moments, momentum) are cut alike, and numbers such as the step count stay.
    Raises ValueError, before anything has changed, for state of another shape, which nobody could cut correctly.
    """
    plans: list[tuple[nn.Parameter, Tensor, int]] = []  # parameter, indices that stay, along which dimension
    for adapter, row in zip(adapters, keep, strict=True):
        index = row.nonzero()[:, 0].to(adapter.values.device)
        plans += [(adapter.left, index, 1), (adapter.values, index, 0), (adapter.right, index, 0)]
    for p, _, _ in plans if optimizer is not None else ():
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(p.shape)}, which cannot be cut; use shrink=False"
                )
    for p, index, dim in plans:
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = value.index_select(dim, index)
        reshape_parameter(p, p.data.index_select(dim, index))

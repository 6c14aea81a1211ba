"""Cut parameters smaller while training goes on: the Parameter objects stay, the optimiser's state is cut with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def reshape_parameter(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, whatever graphs still refer to it.

    Autograd keeps the node that accumulates a parameter's gradient, shape included, as long as any old graph lives, and
    `loss = model(...)` keeps the last one. torch forgets the node when the data's type changes, hence the detour.
    """
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


@torch.no_grad()
def cut_parameters(cuts: Sequence[tuple[nn.Parameter, Tensor, int]], optimizer: Optimizer | None) -> None:
    """Keep, of each parameter, the indices given along the dimension given. The optimiser knows the objects still.

    State tensors of the parameter's shape (moments, momentum) are cut alike, and numbers such as the step count stay.
    Raises ValueError, before anything has changed, for state of another shape, which nobody could cut correctly.
    """
    for p, _, _ in cuts if optimizer is not None else ():
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(p.shape)}, which cannot be cut; use shrink=False"
                )
    for p, index, dim in cuts:
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = value.index_select(dim, index)
        reshape_parameter(p, p.data.index_select(dim, index))

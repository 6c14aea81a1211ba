"""Small problems whose gradients depend on the parameters, so that an error of one step shows in the next."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zq_lib.adashift import AdaShift

SHAPE = (5, 3)


@pytest.fixture
def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gradient() -> Callable[[Tensor, int], Tensor]:
    """Of a noisy quadratic, the same noise at the same step."""
    noise = torch.randn(1200, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return lambda theta, t: 0.3 * theta + noise[t % 1200].to(theta.dtype)


@pytest.fixture
def run() -> Callable[..., None]:
    """`run(optimizer, params, gradient, steps, first=1)`: that many steps with the gradients of step `first` on."""

    def go(optimizer: AdaShift, params: list[nn.Parameter], gradient, steps: int, first: int = 1) -> None:
        for t in range(first, first + steps):
            for param in params:
                param.grad = gradient(param.detach(), t).to(param.dtype)
            optimizer.step()

    return go


@pytest.fixture
def one() -> Callable[..., tuple[nn.Parameter, AdaShift]]:
    """`one(start, **settings)`: a parameter and its optimiser."""

    def make(start: Tensor, **settings) -> tuple[nn.Parameter, AdaShift]:
        param = nn.Parameter(start.clone())
        return param, AdaShift([param], **settings)

    return make

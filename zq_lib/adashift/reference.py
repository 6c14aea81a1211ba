"""AdaShift in the order of the paper's algorithm (shift n, spatial function phi, moving-average window): the truth.

| symbol  | name          | meaning                                               |
| ------- | ------------- | ----------------------------------------------------- |
| theta   | `theta`       | the parameter, any shape                              |
| g_t     | `history[-1]` | gradient of step t; the whole history is kept         |
| n       | `n`           | shift, and length of the window                       |
| w_i     | `weights`     | window weights, newest first                          |
| phi     | `phi`         | spatial function, applied to the squares of one block |
| v_t     | `v`           | second moment of the shifted gradients                |
| c_t     | `age`         | updates of v since it became positive                 |
| m_t     | `m`           | weighted mean of g_t ... g_{t-n+1}                    |

Everything is out of place, in the precision of `theta`, and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zq_lib.adashift.spatial import Phi, by_rows, spatial
from zq_lib.adashift.window import weights as window_weights


def trajectory(
    theta: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    steps: int,
    *,
    lr: float | Callable[[int], float] = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    n: int = 10,
    phi: str | Phi = "max",
    eps: float = 1e-10,
    block: str = "tensor",
    weight_decay: float = 0.0,
    decoupled: bool = True,
    max_step: float | None = None,
    maximize: bool = False,
) -> Iterator[Tensor]:
    """theta_1, theta_2, ... for `gradient(theta_{t-1}, t)`, t = 1 ... steps; a constant learning rate or one per step.

    A minimum of x^2 is found without a sign of hurry in the first n steps:

    >>> [round(float(x), 3) for x in trajectory(torch.tensor(1.0), lambda x, t: 2 * x, 4, lr=0.1, n=2)]
    [1.0, 1.0, 0.9, 0.805]
    """
    beta1, beta2 = betas
    weights = window_weights(n, beta1)
    history: list[Tensor] = []
    v = age = torch.zeros((), dtype=theta.dtype)
    for t in range(1, steps + 1):
        rate = lr(t) if callable(lr) else lr
        g = gradient(theta, t)
        g = -g if maximize else g
        history.append(g if decoupled else g + weight_decay * theta)  # an L2 penalty is part of the gradient
        if t > n:  # before, gradients are only remembered
            # v_t = beta2 v_{t-1} + (1 - beta2) phi(g_{t-n}^2): square first, then phi
            v = beta2 * v + (1 - beta2) * spatial(history[t - n - 1] ** 2, phi, block)
            # z_t, c_t: an entry or block that has never seen a gradient does not move, and its age is zero
            alive = v != 0
            age = age + alive
            vhat = torch.where(alive, v, 1) / torch.where(alive, 1 - beta2**age, 1)
            scale = torch.where(alive, 1 / (vhat.sqrt() + eps), 0)
            # m_t = sum_j w_j g_{t-j}
            m = sum(w * g for w, g in zip(weights, reversed(history[t - n :]), strict=True))
            if by_rows(theta, block):
                scale = scale.reshape(-1, *[1] * (theta.ndim - 1))  # [rows, 1, ...]
            if decoupled:
                theta = theta - rate * weight_decay * theta * (scale != 0)
            # theta_t = theta_{t-1} - lr m_t / (sqrt(vhat) + eps)
            move = m * scale if max_step is None else (m * scale).clamp(-max_step, max_step)
            theta = theta - rate * move
        yield theta

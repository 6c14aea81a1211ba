"""The alternation as published, and linear rewards, where three roads to R3M's optimum can be compared (section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.r3m.config import check_lam
from zq_lib.r3m.loss import check_margin, outlier_offset, preference_loss


class Optimum(NamedTuple):
    """Weights [D] of a linear reward, offsets [n] of its pairs, and the objective they reach."""

    weight: Tensor
    offset: Tensor
    objective: float


def alternating_step(margins: Callable[[], Tensor], optimizer: Any, lam: float) -> Tensor:
    """Algorithm 1 once: the offsets of a batch, held fixed, then one step on (3.3). Returns the offsets [B].

    Its gradient is that of `preference_loss`; offsets that are kept for several steps would be another algorithm.

    >>> alternating_step(lambda: model(chosen) - model(rejected), optimizer, lam=0.3)
    """
    check_lam(lam)
    margin = margins()
    check_margin(margin)
    offset = outlier_offset(margin.detach(), lam)
    loss = (-F.logsigmoid(margin + offset) + lam * offset).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return offset


def profile_optimum(features: Tensor, lam: float, ridge: float = 1e-3) -> Optimum:
    """Minimise mean L_lambda(x w) + ridge / 2 |w|^2 over w, for features of chosen minus rejected, x [n, D].

    Raises ValueError when there is no finite optimum to be found, as for labels that never contradict each other.
    """
    x = _checked(features, lam, ridge)
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-18, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = preference_loss(x @ weight, lam) + ridge / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    agreed = ridge == 0 and bool((x @ weight.detach() > 0).all())  # the gradient fades as the weights grow for ever
    if agreed or not bool(weight.grad.norm() <= 1e-7):
        raise ValueError(
            f"no optimum found with ridge={ridge:g} at lam={lam:g}: the labels may agree with some weights entirely, "
            "whose size is then unbounded; raise ridge"
        )
    return _optimum(x, weight.detach(), lam, ridge)


def joint_optimum(features: Tensor, lam: float, ridge: float = 1e-3, steps: int = 2000) -> Optimum:
    """Minimise mean (3.3) + ridge / 2 |w|^2 over w and offsets >= 0 together: accelerated proximal gradient descent.

    The bound 1 / (4 n) on the curvature of the mean makes the blocks' steps safe: twice each block's own.
    """
    x = _checked(features, lam, ridge)
    n, width = x.shape
    inverse = torch.linalg.inv(x.T @ x / (2 * n) + (ridge + 1e-12) * torch.eye(width, dtype=x.dtype))
    w, d = torch.zeros(width, dtype=x.dtype), torch.zeros(n, dtype=x.dtype)
    ahead_w, ahead_d, t = w, d, 1.0
    for _ in range(steps):
        pull = -torch.sigmoid(-(x @ ahead_w + ahead_d)) / n
        new_w = ahead_w - inverse @ (x.T @ pull + ridge * ahead_w)
        new_d = (ahead_d - 2 * n * (pull + lam / n)).clamp(min=0)
        against = (ahead_w - new_w) @ (x.T @ (x @ (new_w - w))) / n + (ahead_d - new_d) @ (new_d - d) / n
        t = 1.0 if against > 0 else t  # the momentum points uphill: begin it anew
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead_w, ahead_d = (new + (t - 1) / following * (new - old) for new, old in ((new_w, w), (new_d, d)))
        w, d, t = new_w, new_d, following
    return Optimum(w, d, _objective(x, w, d, lam, ridge))


def alternating_optimum(features: Tensor, lam: float, ridge: float = 1e-3, steps: int = 3000) -> Optimum:
    """Where `steps` of Algorithm 1 on all pairs lead, with the largest step that is safe."""
    x = _checked(features, lam, ridge)
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    rate = 1 / (float(torch.linalg.eigvalsh(x.T @ x)[-1]) / (4 * len(x)) + ridge)
    optimizer = torch.optim.SGD([weight], lr=rate, weight_decay=ridge)
    for _ in range(steps):
        alternating_step(lambda: x @ weight, optimizer, lam)
    return _optimum(x, weight.detach(), lam, ridge)


def linear_fit(features: Tensor, ridge: float = 1e-3) -> Callable[[Tensor, float], Tensor]:
    """A linear reward as `select_lambda` and `trim_refit` train it: (pairs, lam) -> margins of all pairs [n]."""

    def fit(pairs: Tensor, lam: float) -> Tensor:
        return features.double() @ profile_optimum(features[pairs], lam, ridge).weight

    return fit


def _checked(features: Tensor, lam: float, ridge: float) -> Tensor:
    check_lam(lam)
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features have shape {tuple(features.shape)}; give [n, D], those of chosen minus rejected")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinity; drop or repair those pairs")
    if not ridge >= 0:
        raise ValueError(f"ridge={ridge!r} must be at least 0")
    return features.detach().double()


def _objective(x: Tensor, weight: Tensor, offset: Tensor, lam: float, ridge: float) -> float:
    fit = (-F.logsigmoid(x @ weight + offset) + lam * offset).mean()
    return float(fit + ridge / 2 * weight.square().sum())


def _optimum(x: Tensor, weight: Tensor, lam: float, ridge: float) -> Optimum:
    offset = outlier_offset(x @ weight, lam)
    return Optimum(weight, offset, _objective(x, weight, offset, lam, ridge))

"""Preference losses of a margin, each with its slope: R3M and the peers it is compared with, in one table.

A margin is the reward of the chosen minus that of the rejected; for DPO the implicit one, m = beta (h_w - h_l).
Slopes are analytic: differentiating the literal form of R3M cancels its digits away where the margin is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """One preference loss and its numbers.

    loss     a name of `LOSSES`
    lam      R3M's price of an offset, that of the loss per pair (3.3); from 1 on R3M is cross-entropy
    epsilon  share of wrong labels that label smoothing (cDPO) and rDPO are told
    tau      IPO's strength; the target of its margin is 1 / (2 tau)
    alpha    ROPO's weight of the bounded term; at least 1
    beta     by which the margin was scaled, and by which IPO divides it again
    """

    loss: str = "r3m"
    lam: float = 0.5
    epsilon: float = 0.1
    tau: float = 0.1
    alpha: float = 14.0
    beta: float = 1.0


def cutoff(lam: float) -> float:
    """c = log(1 / lam - 1), the margin below which a pair is flagged (section 3); -inf from lam = 1 on: none is."""
    return math.log1p(-lam) - math.log(lam) if lam < 1 else -math.inf


def value_and_slope(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Loss of each pair and its derivative by the margin, both [B], for margins [B] of fp32 or fp64 up to 1e30.

    >>> value_and_slope(torch.tensor([-1.0]), Rule("r3m", lam=0.2))
    (tensor([0.7004]), tensor([-0.2000]))
    """
    if rule.loss not in LOSSES:
        raise ValueError(f"loss={rule.loss!r} is not known; choose one of {', '.join(LOSSES)}")
    return LOSSES[rule.loss](margin, rule)


def _logistic(margin: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigma(m) and -sigma(-m), in the very operations of torch's logsigmoid, so that not a bit differs from it."""
    value, buffer = torch.ops.aten.log_sigmoid_forward(margin)
    slope = torch.ops.aten.log_sigmoid_backward(torch.full_like(margin, -1.0), margin, buffer)
    return value.neg_(), slope


def _r3m(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The logistic loss at max(m, c), where its slope is at most lam, and a straight line from there."""
    if rule.lam >= 1:
        return _logistic(margin)
    kept = margin.clamp(min=cutoff(rule.lam))
    value, slope = _logistic(kept)
    return value.add_(kept.sub_(margin), alpha=rule.lam), slope


def _cross_entropy(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    return _logistic(margin)


def _smoothed(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    (right, up), (wrong, down) = _logistic(margin), _logistic(-margin)
    return (1 - rule.epsilon) * right + rule.epsilon * wrong, (1 - rule.epsilon) * up - rule.epsilon * down


def _rdpo(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    (right, up), (wrong, down) = _logistic(margin), _logistic(-margin)
    scale = 1 / (1 - 2 * rule.epsilon)
    value = ((1 - rule.epsilon) * right - rule.epsilon * wrong) * scale
    return value, ((1 - rule.epsilon) * up + rule.epsilon * down) * scale


def _ipo(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    gap = margin / rule.beta - 1 / (2 * rule.tau)
    return gap.square(), gap * (2 / rule.beta)


def _hinge(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    return (1 - margin).clamp(min=0), -(margin < 1).to(margin.dtype)


def _ropo(margin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The factors make the largest slope 1; the bounded term's slope vanishes on both sides."""
    value, slope = _logistic(margin)
    outer = 4 * rule.alpha / (1 + rule.alpha) ** 2
    wrong = torch.sigmoid(-margin)
    return outer * (value + rule.alpha * wrong), outer * (slope - rule.alpha * wrong * torch.sigmoid(margin))


LOSSES: dict[str, Callable[[Tensor, Rule], tuple[Tensor, Tensor]]] = {
    "r3m": _r3m,
    "cross_entropy": _cross_entropy,
    "dpo": _cross_entropy,  # what cross-entropy is called when the margin is a policy's
    "label_smoothing": _smoothed,
    "cdpo": _smoothed,
    "rdpo": _rdpo,
    "ipo": _ipo,
    "hinge": _hinge,
    "ropo": _ropo,
}

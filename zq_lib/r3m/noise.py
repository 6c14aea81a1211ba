"""The paper's models of annotators who are wrong, each with the truth about which of their labels are (section 5.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """`sign` [B]: 1 where the first of a pair is preferred, -1 where the second is. `is_outlier` [B]: whether that
    contradicts the true margin; a tie contradicts nothing."""

    sign: Tensor
    is_outlier: Tensor


def stochastic(margin: Tensor, tau: float, generator: torch.Generator | None = None, relative: bool = False) -> Labels:
    """Prefer the first with probability sigma(margin / tau), for true margins [B]. The paper has tau 1, 2, 3.

    How many labels are wrong depends on the scale of the reward; `relative` measures tau in standard deviations of the
    margin.
    """
    _check_margin(margin)
    if not tau > 0:
        raise ValueError(f"tau={tau!r} must be above 0; as it goes to 0 no label is wrong")
    scale = tau * (margin.std() if relative else 1.0)
    first = torch.rand(margin.shape, generator=generator, dtype=margin.dtype) < torch.sigmoid(margin / scale)
    return _labels(torch.where(first, 1, -1), margin)


def myopic(first: Tensor, second: Tensor, gamma: float) -> Labels:
    """Prefer the larger sum_t gamma^(M - t) r_t, for true step rewards [B, M] of both: who only minds the end.

    The paper has gamma 0.3, 0.5, 0.7. The truth is the undiscounted sum.
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}; give step rewards [B, M] of both"
        )
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must be above 0 and at most 1; at 1 no label is wrong")
    gap = first - second
    _check_margin(gap)
    powers = gamma ** torch.arange(gap.shape[1] - 1, -1, -1, dtype=gap.dtype)
    return _labels(_preferred((powers * gap).sum(1)), gap.sum(1))


def irrational(margin: Tensor, power: float, batch: int = 64) -> Labels:
    """In each run of `batch` pairs flip the |B|^power whose true margin is largest: the clearest pairs, answered wrong.

    The paper has power 1/3, 1/2, 2/3: 4, 8 and 16 of 64 pairs. Shuffle the pairs first if their order means something.
    """
    _check_margin(margin)
    if not 0 < power < 1 or batch < 1:
        raise ValueError(f"power={power!r} must lie between 0 and 1 and batch={batch!r} must be at least 1")
    sign = _preferred(margin)
    for start in range(0, len(margin), batch):
        part = margin[start : start + batch]
        clearest = part.abs().topk(round(len(part) ** power)).indices + start
        sign[clearest] *= -1
    return _labels(sign, margin)


def random_flip(
    margin: Tensor, rate: float, generator: torch.Generator | None = None, sign: Tensor | None = None
) -> Labels:
    """Flip a fixed share of the labels, any of them: round(rate * B) of the true ones, or of those given as `sign`."""
    _check_margin(margin)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate!r} must be a share from 0 to 1")
    sign = _preferred(margin) if sign is None else sign.clone()
    sign[torch.randperm(len(margin), generator=generator)[: round(rate * len(margin))]] *= -1
    return _labels(sign, margin)


def ordered(first: Tensor, second: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) for both sides [B, ...] of pairs and the sign [B] of their labels."""
    flip = (sign < 0).view(-1, *[1] * (first.dim() - 1))
    return torch.where(flip, second, first), torch.where(flip, first, second)


def _preferred(margin: Tensor) -> Tensor:
    return torch.where(margin >= 0, 1, -1)


def _labels(sign: Tensor, margin: Tensor) -> Labels:
    return Labels(sign, sign * margin < 0)


def _check_margin(margin: Tensor) -> None:
    if margin.numel() == 0:
        raise ValueError("margin is empty, and there is nothing to label; give at least one pair")
    if not bool(margin.isfinite().all()):
        raise ValueError("margin holds NaN or infinity; the true rewards must be finite")

"""Choosing lam, and dropping what is suspected, from the noisy labels alone: nobody who trains has clean ones.

Both take `fit(pairs, lam)`, which trains a new reward on some of the pairs and returns the margins of all of them [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zq_lib.r3m.config import check_lam

Fit = Callable[[Tensor, float], Tensor]

LAMS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
FEWEST = 10  # pairs held out, below which agreement is an accident


class Selection(NamedTuple):
    """The chosen `lam`; the share of held-out labels that each candidate ranks as they are; the pairs held out."""

    lam: float
    agreement: dict[float, float]
    held: Tensor


class Trimmed(NamedTuple):
    """The chosen `share`, the pairs `kept` in the end, the margins [n] of the reward trained on them, and the held-out
    agreement of each candidate."""

    share: float
    kept: Tensor
    margins: Tensor
    agreement: dict[float, float]


def select_lambda(
    fit: Fit, pairs: int, lams: Sequence[float] = LAMS, holdout: float = 0.2, generator: torch.Generator | None = None
) -> Selection:
    """The lam whose reward agrees best with the noisy labels of pairs it was not trained on; of equals, the largest.

    Wrong labels lower every candidate's agreement alike, so the order of the candidates survives them. That fails when
    the wrong labels follow a rule that can be learned, or are the majority.

    >>> select_lambda(linear_fit(features), len(features)).lam
    """
    for lam in lams:
        check_lam(lam)
    if not lams:
        raise ValueError("lams is empty, and there is nothing to choose from; give at least one")
    train, held = _split(pairs, holdout, generator)
    agreement = {lam: _agreement(fit(train, lam), held, pairs) for lam in sorted(lams)}
    return Selection(max(agreement, key=lambda lam: (agreement[lam], lam)), agreement, held)


def trim_refit(
    fit: Fit,
    pairs: int,
    lam: float,
    shares: Sequence[float] = SHARES,
    rounds: int = 8,
    holdout: float = 0.2,
    generator: torch.Generator | None = None,
) -> Trimmed:
    """Train, drop the share of the pairs with the lowest margins, train on the rest, `rounds` times; an extension.

    The share comes from `shares`, by agreement with held-out noisy labels; of equals, the smallest. 0 has to be among
    them: with clean labels trimming loses, because it drops honest disagreement.
    """
    check_lam(lam)
    if 0 not in shares or not all(0 <= share < 0.5 for share in shares):
        raise ValueError(
            f"shares={tuple(shares)} must hold 0, for data that needs no trimming, and stay below 0.5: more wrong "
            "labels than right ones cannot be told from the opposite"
        )
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")
    train, held = _split(pairs, holdout, generator)
    agreement = {s: _agreement(_trim(fit, train, lam, s, rounds)[1], held, pairs) for s in sorted(shares)}
    share = max(agreement, key=lambda s: (agreement[s], -s))
    kept, margins = _trim(fit, torch.arange(pairs), lam, share, rounds)
    return Trimmed(share, kept, margins, agreement)


def _trim(fit: Fit, train: Tensor, lam: float, share: float, rounds: int) -> tuple[Tensor, Tensor]:
    """The pairs of `train` kept in the end, and the margins of all pairs. Each round judges all of `train` anew."""
    kept, margins = train, fit(train, lam)
    stay = len(train) - int(share * len(train))
    for _ in range(rounds if stay < len(train) else 0):
        following = train[margins[train].topk(stay).indices].sort().values
        if torch.equal(following, kept):
            break
        kept, margins = following, fit(following, lam)
    return kept, margins


def _split(pairs: int, holdout: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout!r} must lie between 0 and 1; the usual one is 0.2")
    count = int(pairs * holdout)
    if count < FEWEST:
        raise ValueError(
            f"{pairs} pairs with holdout={holdout:g} leave {count} to judge by; {FEWEST} are the least, so give "
            "more pairs, or set lam yourself"
        )
    order = torch.randperm(pairs, generator=generator)
    return order[count:].sort().values, order[:count].sort().values


def _agreement(margins: Tensor, held: Tensor, pairs: int) -> float:
    if margins.shape != (pairs,):
        raise ValueError(f"fit returned margins of shape {tuple(margins.shape)}; it must return those of all {pairs}")
    return float((margins[held] > 0).double().mean())

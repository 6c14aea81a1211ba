"""R3M in plain torch, in the paper's order; double precision, differentiable, the only ground truth.

paper            here
z_w, z_l         the preferred segment or answer and the other; their rewards are `chosen` and `rejected`
r(z)             `segment_reward`
delta            `offset`, the annotator's own push on one pair
lambda           `lam`, that of the loss per pair (3.3); (3.2) has lam / n
pi, pi_ref       log-probabilities of completions, `sequence_logps`
beta             `beta`
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_reward(steps: Tensor, gamma: float = 1.0) -> Tensor:
    """r(z) = sum_t gamma^t r(s_t, a_t) for step rewards [B, M], t = 1 ... M.  -> [B]"""
    powers = gamma ** torch.arange(1, steps.shape[-1] + 1, dtype=steps.dtype, device=steps.device)
    return (powers * steps).sum(-1)


def probability(margin: Tensor, offset: Tensor) -> Tensor:
    """(3.1) p(z_w > z_l) = sigma(margin + delta)."""
    return torch.sigmoid(margin + offset)


def pair_loss(margin: Tensor, offset: Tensor, lam: float) -> Tensor:
    """(3.3) -log sigma(margin + delta) + lam |delta|, [B]. The mean over n pairs is (3.2) with lam / n."""
    return -F.logsigmoid(margin + offset) + lam * offset.abs()


def best_offset(margin: Tensor, lam: float) -> Tensor:
    """(3.4) delta* = max(log(1 / lam - 1) - margin, 0), the minimum of (3.3) over delta; 0 for lam >= 1."""
    if lam >= 1:
        return torch.zeros_like(margin)
    return (math.log(1 / lam - 1) - margin).clamp(min=0)


def profile_loss(margin: Tensor, lam: float) -> Tensor:
    """(3.3) at its best offset. The offset may be held or differentiated: the gradient is the same, if lam |delta| is
    kept; without that term every flagged pair would pull with 0."""
    return pair_loss(margin, best_offset(margin, lam), lam)


def alternating_loss(chosen: Tensor, rejected: Tensor, lam: float) -> Tensor:
    """Algorithm 1, one step: the offset of a batch without gradient, then the loss that the reward descends."""
    margin = chosen - rejected
    offset = best_offset(margin.detach(), lam)
    return pair_loss(margin, offset, lam).mean()


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi(y | x) of each completion: logits [S, T, V], labels [S, T] with -100 on prompt and padding.  -> [S]"""
    kept = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.masked_fill(~kept, 0)[..., None])[..., 0]  # [S, T]
    return logps.masked_fill(~kept, 0).sum(-1)


def implicit_margin(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """m = beta (h_w - h_l) with h = log pi - log pi_ref, for [2B] log-probabilities, the chosen first.  -> [B]"""
    chosen, rejected = (policy - reference).chunk(2)
    return beta * (chosen - rejected)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float, lam: float) -> Tensor:
    """R3M-DPO: (3.3) of the implicit margin at its best offset, averaged over pairs."""
    return profile_loss(implicit_margin(policy, reference, beta), lam).mean()

"""LoSparse in plain torch, in the paper's order: the only ground truth, and the text to read first.

Li et al., "LoSparse: Structured Compression of Large Language Models based on Low-Rank and Sparse Approximation" (ICML
2023, arXiv 2306.11222). Everything here runs in any float dtype (use float64 to check others against it) and is
differentiable where that has a meaning. The paper stores W as inputs x outputs and prunes columns of S; torch stores
outputs x inputs, so here one output neuron is a row.

| paper  | here         | shape    | meaning                                                            |
| ------ | ------------ | -------- | ------------------------------------------------------------------ |
| W      | `weight`     | [N, K]   | weight of a linear layer from K to N                               |
| U, V   | `left`, `right` | [N, r], [r, K] | low-rank factors: what the neurons share                  |
| S      | `sparse`     | [N, K]   | the rest, of which whole rows are dropped: what neurons have alone |
| –      | `rows`       | [n]      | the rows of S that are left                                        |
| I      | `importance` | [N, K]   | how much the loss would change without the entry                   |
| Gamma  | `scores`     | [N]      | importance of a neuron                                             |
| p(t)   | `share`      | scalar   | part of all entries of S that may survive at step t                |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_for(share: float, outputs: int, inputs: int) -> int:
    """Section 4.1: the rank whose factors have `share` of the N K parameters."""
    return math.ceil(share * outputs * inputs / (outputs + inputs))


def decompose(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5: U = A sqrt(sigma), V = sqrt(sigma) B^T of the largest `rank`, and S = W - U V.

    Returns [N, r], [r, K], [N, K]; their sum is W whatever the rank.
    """
    a, sigma, b = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    left, right = a[:, :rank] * root, root[:, None] * b[:rank]
    return left, right, weight - left @ right


def linear(x: Tensor, left: Tensor, right: Tensor, sparse: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equation 3: y = (x V^T) U^T + x S^T + b.  [..., K] -> [..., N]"""
    y = x @ right.T @ left.T + x @ sparse.T
    return y if bias is None else y + bias


def importance(sparse: Tensor, grad: Tensor) -> Tensor:
    """Equation 6: I = |S dL/dS| of every entry."""
    return (sparse * grad).abs()


def smooth(average: Tensor, now: Tensor, beta: float) -> Tensor:
    """Equation 7: I-bar(t) = beta I-bar(t-1) + (1 - beta) I(t)."""
    return beta * average + (1 - beta) * now


def smooth_window(
    average: Tensor, window: Tensor, now: Tensor, step: int, interval: int, beta: float
) -> tuple[Tensor, Tensor]:
    """What the published code does instead: I-bar takes in the mean over each window of `interval` steps, when the next
    one begins. Returns I-bar and the mean of the running window; both start at zero."""
    place = step % interval
    if place == 0:
        return smooth(average, window, beta), now
    return average, (place * window + now) / (place + 1)


def neuron_scores(average: Tensor) -> Tensor:
    """Section 4.2: Gamma_i = mean_j I-bar_ij. A mean, so that wide matrices count no more.  [N, K] -> [N]

    The mean of smoothed entries is the smoothed mean, so one number per row is all that need be kept.
    """
    return average.mean(1)


def share(step: int, target: float, total: int, warmup: int, final: int) -> float:
    """Equation 8: p(t), cubic from 1 to `target` between step `warmup` and step total - final."""
    if step <= warmup:
        return 1.0
    if step > total - final:
        return target
    return target + (1 - target) * (1 - (step - warmup) / (total - final - warmup)) ** 3


def keep_rows(scores: Sequence[Tensor], inputs: Sequence[int], share: float) -> list[Tensor]:
    """Section 4.2: one threshold for all matrices. Every entry has its row's score; theta is the k-th smallest of all,
    k = int((1 - p) entries), and the rows below theta go. The row with the k-th entry stays, and so do ties.

    `scores` are [N] for each matrix, `inputs` their K. Returns bool [N] each.
    """
    entries = torch.cat([s.repeat_interleave(k) for s, k in zip(scores, inputs, strict=True)])
    dropped = int(len(entries) * (1 - share))
    if dropped == 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    theta = entries.kthvalue(dropped).values
    return [s >= theta for s in scores]


def shrunk_linear(
    x: Tensor, left: Tensor, right: Tensor, sparse: Tensor, rows: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The layer after shrinking: S [n, K] has only its `rows` [n].  [..., K] -> [..., N]

    Multiply-adds for each token: r (N + K) + n K, against N K of the dense layer.
    """
    z = x @ torch.cat([right, sparse]).T  # [..., r + n]
    rank = right.shape[0]
    y = (z[..., :rank] @ left.T).index_add(-1, rows, z[..., rank:])
    return y if bias is None else y + bias


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    alpha_out: float,
    alpha_layer: float,
    temperature: float = 2.0,
) -> Tensor:
    """Section 4.4: alpha_out T^2 KL(teacher || student) + alpha_layer sum_l MSE(h_l^student, h_l^teacher)."""
    teacher, student = (F.log_softmax(z / temperature, -1) for z in (teacher_logits, student_logits))
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean() * temperature**2
    layers = sum((s - t).square().mean() for s, t in zip(student_states, teacher_states, strict=True))
    return alpha_out * divergence + alpha_layer * layers

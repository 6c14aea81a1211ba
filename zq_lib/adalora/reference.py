"""AdaLoRA in plain torch, in the paper's order: the only ground truth, and the text to read first.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023, arXiv 2303.10512). Everything
here runs in any float dtype (use float64 to check others against it) and is differentiable where that has a meaning.

| paper     | here          | shape     | meaning                                                       |
| --------- | ------------- | --------- | ------------------------------------------------------------- |
| W(0)      | `weight`      | [N, K]    | frozen weight of a linear layer from K to N                   |
| P         | `left`        | [N, R]    | left vectors, one per column                                  |
| Lambda    | `values`      | [R]       | singular values; may be negative                              |
| Q         | `right`       | [R, K]    | right vectors, one per row                                    |
| –         | `scale`       | scalar    | s = alpha / (R + 1e-5), fixed for ever                        |
| I, I-bar  | `sensitivity` | as weight | how much the loss would change without the entry; smoothed    |
| U, U-bar  | `uncertainty` | as weight | how much I moves around I-bar; smoothed                       |
| S         | `scores`      | [n, R]    | importance of each triplet of each of n matrices              |
| b(t)      | `budget`      | int       | triplets that all matrices together may keep                  |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adapted_weight(weight: Tensor, left: Tensor, values: Tensor, right: Tensor, scale: float) -> Tensor:
    """Equation 3: W = W(0) + s P Lambda Q.  [N, K]"""
    return weight + scale * (left * values) @ right


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, values: Tensor, right: Tensor, scale: float
) -> Tensor:
    """The same without ever building W: y = x W(0)^T + bias + s ((x Q^T) * l) P^T.  [..., K] -> [..., N]"""
    inner = (x @ right.T) * values  # [..., R]
    return torch.nn.functional.linear(x, weight, bias) + scale * inner @ left.T


def adapted_linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, left: Tensor, values: Tensor, right: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gradients by hand, for x [M, K] and the output's gradient [M, N]: of x, P, l and Q.

    Where l is 0, the columns of dP and the rows of dQ are 0, but dl is not: that is how a dropped triplet comes back.
    """
    inner = x @ right.T  # H [M, R]
    outer = grad @ left  # G [M, R]
    d_values = scale * (outer * inner).sum(0)
    d_left = scale * grad.T @ (inner * values)
    d_right = scale * (outer * values).T @ x
    d_x = grad @ weight + scale * (outer * values) @ right
    return d_x, d_left, d_values, d_right


def departure(factor: Tensor) -> Tensor:
    """Gram matrix minus identity of R vectors in the rows of `factor` [R, d]; for P hand in its transpose.  [R, R]"""
    return factor @ factor.T - torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)


def orthogonality(lefts: Sequence[Tensor], rights: Sequence[Tensor], form: str) -> Tensor:
    """Equation 4, the penalty before gamma. "squared": sum of ||P^T P - I||^2 + ||Q Q^T - I||^2, as printed.

    "norm": the mean of the norms themselves over the 2n factors, as every published run computed it.
    """
    norms = [torch.linalg.norm(departure(f)) for f in (*(p.T for p in lefts), *rights)]
    if form == "squared":
        return torch.stack(norms).square().sum()
    return torch.stack(norms).mean()


def orthogonality_gradient(factor: Tensor, form: str, factors: int) -> Tensor:
    """Gradient of the penalty for one factor [R, d] of `factors`; 0 where the vectors are orthonormal already."""
    gap = departure(factor)
    if form == "squared":
        return 4 * gap @ factor
    norm = torch.linalg.norm(gap)
    return torch.where(norm > 0, 2 * gap @ factor / norm, 0.0) / factors


def update_importance(
    entry: Tensor, grad: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Equations 8 to 10 for one tensor: the new I-bar and U-bar. Both start at zero and are not bias-corrected."""
    raw = (entry * grad).abs()  # equation 8: I = |w dL/dw|
    sensitivity = beta1 * sensitivity + (1 - beta1) * raw  # equation 9
    uncertainty = beta2 * uncertainty + (1 - beta2) * (raw - sensitivity).abs()  # equation 10, with the new I-bar
    return sensitivity, uncertainty


def triplet_scores(of_left: Tensor, of_values: Tensor, of_right: Tensor) -> Tensor:
    """Equation 7: S_i = s(l_i) + mean_j s(P_ji) + mean_j s(Q_ij), from the scores s = I-bar * U-bar of the entries.

    Shapes [N, R], [R], [R, K]; returns [R]. Means, so that a triplet of a large matrix counts no more.
    """
    return of_values + of_left.mean(0) + of_right.mean(1)


def budget(step: int, start: int, target: int, total: int, warmup: int, final: int) -> int:
    """Equation 12: b(t), cubic from `start` to `target` between step `warmup` and step total - final."""
    if step <= warmup:
        return start
    if step > total - final:
        return target
    return int((start - target) * (1 - (step - warmup) / (total - final - warmup)) ** 3 + target)


def top(scores: Tensor, count: int) -> Tensor:
    """Equation 6: keep the `count` largest of `scores` [n, R]; of equal ones the earlier. Returns bool [n, R]."""
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores.flatten()[i]), i))
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[:count]] = True
    return keep.view(scores.shape)


def above_threshold(scores: Tensor, count: int) -> Tensor:
    """What published code does instead: drop every score that is not above the smallest but `count`; ties go too."""
    dropped = scores.numel() - count
    if dropped <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.flatten().kthvalue(dropped).values

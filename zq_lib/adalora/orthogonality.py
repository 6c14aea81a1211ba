"""The penalty that keeps P and Q orthogonal: its value, and its gradient in closed form without a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zq_lib.adalora.adapter import Triplets


def penalty(adapters: Sequence[Triplets], form: str) -> Tensor:
    """The penalty before gamma, differentiable (equation 4; `form` as in `reference.orthogonality`)."""
    gaps = [gap for _, _, gap in _gaps(adapters, None, False)]
    if not gaps:  # no rank is left anywhere
        return adapters[0].values.new_zeros(())
    norms = torch.cat([torch.linalg.norm(gap, dim=(1, 2)) for gap in gaps])
    return norms.square().sum() if form == "squared" else norms.sum() / (2 * len(adapters))


@torch.no_grad()
def add_gradient(adapters: Sequence[Triplets], gamma: float, form: str, keep: Tensor | None = None) -> None:
    """Add gamma times the penalty's gradient to the `grad` of every P and Q.

    `keep` bool [n, R] leaves dropped triplets out of it, so that masked training equals training without them.
    """
    for factors, stacked, gap in _gaps(adapters, keep, True):
        if form == "squared":
            coefficient = 4 * gamma
        else:
            norm = torch.linalg.norm(gap, dim=(1, 2), keepdim=True)
            coefficient = torch.where(norm > 0, gamma / len(adapters) / norm, 0.0)  # 2 gamma / 2n
        rows = coefficient * gap @ stacked  # [g, R, d]
        for factor, transposed, grad in zip(*zip(*factors, strict=True), rows, strict=True):
            grad = grad.T if transposed else grad
            if factor.grad is None:
                factor.grad = grad.contiguous()
            else:
                factor.grad.add_(grad)


def _gaps(
    adapters: Sequence[Triplets], keep: Tensor | None, data: bool
) -> list[tuple[list[tuple[Tensor, bool]], Tensor, Tensor]]:
    """Factors of one shape together: (factor, is it P), stacked as [g, R, d], and Gram minus identity [g, R, R]."""
    groups: dict[tuple[int, ...], list[tuple[Tensor, bool, int]]] = {}
    for k, adapter in enumerate(adapters):
        if adapter.rank:
            for factor, transposed in ((adapter.left, True), (adapter.right, False)):
                shape = (transposed, *factor.shape)
                groups.setdefault(shape, []).append((factor, transposed, k))
    found = []
    for (transposed, *_), members in groups.items():
        stacked = torch.stack([f.data if data else f for f, _, _ in members])
        if transposed:
            stacked = stacked.transpose(1, 2)
        eye = torch.eye(stacked.shape[1], dtype=stacked.dtype, device=stacked.device)
        if keep is not None:
            mask = keep[[k for _, _, k in members]].to(stacked)  # [g, R]
            stacked, eye = stacked * mask[:, :, None], eye * mask[:, :, None]
        gap = stacked @ stacked.transpose(1, 2) - eye
        found.append(([(f, t) for f, t, _ in members], stacked, gap))
    return found

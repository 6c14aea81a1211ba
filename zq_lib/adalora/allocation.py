"""Which triplets stay: the global choice by score, exact to the last rank, with bounds for each matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(
    scores: Tensor,
    budget: int,
    *,
    costs: Tensor | None = None,
    least: Tensor | None = None,
    most: Tensor | None = None,
    ties: str = "exact",
) -> Tensor:
    """Keep the best triplets of all matrices within a budget (section 3.3, equation 6).

    Args: `scores` [n, R]; `budget` in ranks, or in parameters if `costs` [n] gives those of one triplet of each
    matrix; triplets are then ranked by score per parameter, and the next one that still fits is taken until none does.
    `least` and `most` [n] bound the rank of each matrix. Equal scores are taken in the order of matrix, then triplet,
    so exactly `budget` ranks stay; `ties="threshold"` drops all scores equal to the largest dropped one.
    Returns bool [n, R]. Raises ValueError for scores that are no numbers and for bounds that the budget cannot meet.
    """
    n, ranks = scores.shape
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"scores of matrix {bad} are not finite, so nothing can be ranked; find the infinite gradient first"
        )
    if ties == "threshold":
        dropped = scores.numel() - budget
        if dropped <= 0:
            return torch.ones_like(scores, dtype=torch.bool)
        return scores > scores.flatten().kthvalue(dropped).values
    value = scores if costs is None else scores / costs[:, None]
    place = _places(value)  # [n, R]: 0 for the best triplet of its matrix
    always = torch.zeros_like(place, dtype=torch.bool) if least is None else place < least[:, None]
    allowed = torch.ones_like(always) if most is None else place < most[:, None]
    cost = torch.ones_like(place) if costs is None else costs[:, None].expand(n, ranks)
    needed = int((cost * always).sum())
    if needed > budget:
        raise ValueError(f"budget={budget} is below the {needed} that min_rank asks for; raise it or lower min_rank")
    # Two stable sorts: by value, then those that must stay first and those that may not last.
    order = value.flatten().sort(descending=True, stable=True).indices
    class_of = (allowed.int() + always.int()).flatten()
    order = order[class_of[order].sort(descending=True, stable=True).indices]
    order = order[: int((class_of > 0).sum())]
    keep = torch.zeros(n * ranks, dtype=torch.bool, device=scores.device)
    if costs is None:
        keep[order[:budget]] = True
        return keep.view(n, ranks)
    flat, left, chosen = cost.flatten().tolist(), budget, []
    for i in order.tolist():
        if flat[i] <= left:
            chosen.append(i)
            left -= flat[i]
    keep[chosen] = True
    return keep.view(n, ranks)


def _places(value: Tensor) -> Tensor:
    """Place of each triplet among those of its own matrix, best first, equal ones in order.  [n, R] -> [n, R]"""
    return value.sort(dim=1, descending=True, stable=True).indices.argsort(1)

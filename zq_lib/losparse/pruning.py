"""Which rows of S stay: one choice over all matrices, by sorting rows and adding up their lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_rows(
    scores: Tensor,
    counts: Tensor,
    inputs: Tensor,
    share: float,
    *,
    exact: bool = False,
    least: Tensor | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """The rows that survive when `share` of all entries may (section 4.2), bool [rows].

    Args: `scores` [rows] of all rows of n matrices, one matrix after the other; `counts` and `inputs` [n], rows and
    row lengths K of each. The published rule gives every entry its row's score, finds the k-th smallest entry, k =
    int(entries (1 - share)), and drops the rows below it, so that the row at the threshold and all that tie with it
    stay; here rows are sorted and their lengths summed, which finds the same threshold. `exact` takes the best rows
    while they fit, of equal ones the earlier, and knows bounds: `least` and `most` rows [n] of each matrix. A share of
    0 keeps nothing but what `least` asks for.
    Raises ValueError for scores that are no numbers and for bounds that the share cannot meet.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError(
            "the scores of rows are not finite, so nothing can be ranked; find the infinite gradient first"
        )
    lengths = inputs.repeat_interleave(counts)  # [rows]
    total = int(lengths.sum())
    if exact:
        return _exact(scores, counts, lengths, share * total, least, most)
    if share == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    dropped = int(total * (1 - share))
    if dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.sort().indices
    at = torch.searchsorted(lengths[order].cumsum(0), dropped)
    return scores >= scores[order[at]]


def _exact(
    scores: Tensor, counts: Tensor, lengths: Tensor, budget: float, least: Tensor | None, most: Tensor | None
) -> Tensor:
    place = places(scores, counts)
    always = torch.zeros_like(scores, dtype=torch.bool) if least is None else place < least.repeat_interleave(counts)
    allowed = torch.ones_like(always) if most is None else place < most.repeat_interleave(counts)
    if (needed := int(lengths[always].sum())) > budget:
        raise ValueError(
            f"min_rows asks for {needed} entries of S and remaining allows {int(budget)}; raise remaining or lower "
            "min_rows"
        )
    # Two stable sorts: by score, then those that must stay first and those that may not last.
    order = scores.sort(descending=True, stable=True).indices
    order = order[(allowed.int() + always.int())[order].sort(descending=True, stable=True).indices]
    keep = torch.zeros_like(always)
    keep[order] = lengths[order].cumsum(0) <= budget + 1e-6
    return keep & (allowed | always)


def places(scores: Tensor, counts: Tensor) -> Tensor:
    """Place of each row among those of its own matrix, 0 for the best, equal ones in order. [rows] int64"""
    order = scores.sort(descending=True, stable=True).indices
    matrix = torch.arange(len(counts), device=scores.device).repeat_interleave(counts)
    order = order[matrix[order].sort(stable=True).indices]  # by matrix, then by score
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=scores.device)
    return found - (counts.cumsum(0) - counts).repeat_interleave(counts)


def round_rows(keep: Tensor, scores: Tensor, counts: Tensor, multiple: int) -> Tensor:
    """The same choice with each matrix's number of rows rounded to the nearest `multiple`, or all its rows.

    `keep` has the best rows of every matrix, so its best rows by score are added or its worst taken away.
    """
    kept = torch.stack([part.sum() for part in keep.split(counts.tolist())])
    rounded = torch.minimum((kept + multiple // 2) // multiple * multiple, counts)
    return places(scores, counts) < rounded.repeat_interleave(counts)

"""GEAR in plain torch, in the paper's order: the only ground truth, and the text to read first.

Kang et al., "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM" (2024,
arXiv 2403.05527), sections 2 and 3. Works in any float dtype (use float64 to check others against it), keeps everything
dense, and uses an exact SVD where the library iterates.

| paper   | here       | shape        | meaning                                                        |
| ------- | ---------- | ------------ | -------------------------------------------------------------- |
| X       | `x`        | [..., n, D]  | keys or values of n tokens, one head                           |
| D-hat   | `backbone` | [..., n, D]  | uniformly quantised                                            |
| S       | `sparse`   | [..., n, D]  | outliers, what the backbone misses at them                     |
| L = AB^T| `low_rank` | [..., n, D]  | rank-r approximation of the rest                               |
| s, r, b | `share`, `rank`, `bits` | scalars | outliers, rank, bits                                    |

Axis -2 runs along tokens, -1 along channels: keys are grouped and filtered along tokens within a channel, values along
channels within a token (section 3, "KCVT" and KIVI).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """X ~ backbone + low_rank + sparse, and the codes behind the backbone."""

    codes: Tensor
    backbone: Tensor
    low_rank: Tensor
    sparse: Tensor

    def restored(self) -> Tensor:
        """D-hat + L + S."""
        return self.backbone + self.low_rank + self.sparse


def filter_outliers(x: Tensor, share: float, axis: int) -> Tensor:
    """Filter_s (section 3): True at the share/2 largest and share/2 smallest entries of every vector along `axis`."""
    length = x.shape[axis]
    count = math.floor(length * share / 2 + 0.5)
    order = x.argsort(axis).argsort(axis)  # rank of every entry in its vector
    return (order < count) | (order >= length - count)


def quantise(x: Tensor, bits: int, axis: int, group: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group-wise uniform quantisation (section 2): codes and the restored backbone.

    Delta = (max - min) / (2^b - 1),  code = round((x - min) / Delta),  x-hat = code Delta + min, for each `group`
    neighbours along `axis`. Entries where `keep` is False take no part in min and max.
    """
    moved = x.movedim(axis, -1).unflatten(-1, (-1, group))
    kept = torch.ones_like(moved, dtype=torch.bool)
    if keep is not None:
        kept = keep.movedim(axis, -1).unflatten(-1, (-1, group))
    low = moved.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    high = moved.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((moved - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    restored = codes * step + low

    def back(y: Tensor) -> Tensor:
        return y.flatten(-2).movedim(-1, axis)

    return back(codes), back(restored)


def low_rank(residual: Tensor, rank: int) -> Tensor:
    """The best rank-r approximation of the residual (algorithm 2 approaches it by power iteration). [..., n, D]"""
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def compress(x: Tensor, bits: int, axis: int, group: int, share: float = 0.0, rank: int = 0) -> Parts:
    """GEAR in one greedy pass (section 3): S = Filter_s(X), D-hat = Quant(X - S), L = SVD_r(X - D-hat - S).

    `share` 0 gives GEAR-L, `rank` 0 outlier-aware quantisation, both plain quantisation. The outliers' positions take
    no part in the ranges, and S restores them exactly.
    """
    outliers = filter_outliers(x, share, axis)
    codes, backbone = quantise(x, bits, axis, group, ~outliers)
    residual = torch.where(outliers, 0.0, x - backbone)
    correction = low_rank(residual, rank) if rank else torch.zeros_like(x)
    sparse = torch.where(outliers, x - backbone - correction, 0.0)
    return Parts(codes, backbone, correction, sparse)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q K^T) V on restored keys and values. q [..., T, D], k, v [..., S, D], mask bool [..., T, S]."""
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v

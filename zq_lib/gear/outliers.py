"""The outlier filter S (paper, section 3): the largest and smallest entries of every vector, kept in 16 bits.

A vector is one channel over a segment's tokens for keys, and one token over all heads' channels for values.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from zq_lib.gear.config import Codec

PAGE = 64  # tokens; positions are stored within a page, in one byte
ROUNDINGS = {"floor": math.floor, "nearest": lambda x: math.floor(x + 0.5), "ceil": math.ceil}


def per_side(codec: Codec, length: int) -> int:
    """How many entries of a vector of `length` are kept at each end.

    Raises ValueError when they would be the whole vector.
    """
    if codec.outliers == 0:
        return 0
    count = ROUNDINGS[codec.outlier_round](round(length * codec.outliers / 2, 9))
    if 2 * count >= length:
        raise ValueError(
            f"outliers={codec.outliers} keeps {2 * count} of {length} entries of a {codec.kind} vector, so nothing is "
            "left to quantise; use a smaller share or a longer buffer"
        )
    return count


def outlier_mask(x: Tensor, codec: Codec, valid: Tensor | None) -> Tensor | None:
    """Which entries of x [B, m, G, n, D] are outliers, as bool, or None if none are; the same number in every segment.

    Padding (`valid` False, broadcastable) ranks in the middle, so that it is taken only if a vector has nothing else.
    """
    b, m, heads, n, d = x.shape
    if codec.outlier_scope == "head":
        vectors, axes = x.flatten(3), (b, m, heads, n, d)  # [B, m, G, n D]
    elif codec.kind == "key":
        vectors, axes = x.transpose(3, 4), None  # [B, m, G, D, n]
    else:
        vectors, axes = x.transpose(2, 3).flatten(3), None  # [B, m, n, G D]
    count = per_side(codec, vectors.shape[-1])
    if count == 0:
        return None
    if valid is not None:
        seen = valid.expand(x.shape)
        middle = torch.where(seen, x, 0.0).sum((3, 4), keepdim=True) / seen.sum((3, 4), keepdim=True).clamp(min=1)
        x = torch.where(seen, x, middle)
        vectors = x.flatten(3) if axes else x.transpose(3, 4) if codec.kind == "key" else x.transpose(2, 3).flatten(3)
    mask = torch.zeros(vectors.shape, dtype=torch.bool, device=x.device)
    mask.scatter_(-1, vectors.topk(count, -1).indices, True)
    # the two ends must be disjoint, also when a vector is constant
    mask.scatter_(-1, vectors.masked_fill(mask, torch.inf).topk(count, -1, largest=False).indices, True)
    if axes:
        return mask.reshape(axes)
    return mask.transpose(3, 4) if codec.kind == "key" else mask.unflatten(3, (heads, d)).transpose(2, 3)


def to_entries(mask: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The marked entries, sorted by head, then token: token in its page and channel (uint8) and value (float16), each
    [B, m, N]; and where each head's pages start, [B, m, G pages + 1] int32. `mask`, `delta` [B, m, G, n, D]."""
    b, m, heads, n, d = mask.shape
    rows, segments, head, token, channel = mask.nonzero(as_tuple=True)
    pages = -(-n // PAGE)
    page = (rows * m + segments) * heads * pages + head * pages + token // PAGE
    counts = torch.bincount(page, minlength=b * m * heads * pages).view(b, m, heads * pages)
    start = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).to(torch.int32)
    narrow = torch.uint8 if d <= 256 else torch.int16

    def entries(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).view(b, m, -1)

    return entries(token % PAGE, torch.uint8), entries(channel, narrow), entries(delta[mask], torch.float16), start


@lru_cache(maxsize=16)  # the layers of a model ask for the same
def page_starts(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the pages of a tensor [B, m, G, n, D] start, counted in numbers from its first one, in the order of their
    entries: [B m G pages]. `shape` and `stride` without the last dimension; int32, which is faster, where it reaches.
    """
    far = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + stride[-1]
    kind = torch.int32 if far < 2**31 else torch.int64
    index = torch.zeros(1, dtype=kind, device=device)
    for size, step, every in zip(shape, stride, (1, 1, 1, PAGE), strict=True):
        index = (index[:, None] + torch.arange(0, size, every, dtype=kind, device=device) * step).flatten()
    return index

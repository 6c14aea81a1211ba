"""Group-wise asymmetric uniform quantisation (paper, section 2) on tensors of one segment, [B, m, G, n, D].

Which elements share a range is all that differs between schemes, so a segment is viewed as [..., groups, g, ...] and
every function here works along one axis of that view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zq_lib.gear.config import Codec

CLIPS = tuple(1 - i / 14 for i in range(1, 8))  # 8 steps from 1 (the full range, tried first) to 0.5


class View(NamedTuple):
    """How a [B, m, G, n, D] tensor is split into groups: `shape` of the view, the axis that a group runs along, and the
    shape that scale and zero are stored in."""

    shape: tuple[int, ...]
    axis: int
    stored: tuple[int, ...]


def group_view(codec: Codec, shape: torch.Size | tuple[int, ...]) -> View:
    """The groups of a segment of this shape. Raises ValueError when they do not divide it."""
    b, m, heads, n, d = shape
    if codec.per_channel():
        g = n if codec.scheme == "kcvt" else codec.group
        if n % g:
            raise ValueError(
                f"group={g} does not divide a segment of {n} tokens; use a buffer that is a multiple of it"
            )
        return View((b, m, heads, n // g, g, d), 4, (b, m, heads, n // g, d))
    if codec.scheme == "kcvt":
        if codec.value_vector == "all":
            return View((b, m, heads, n, d), -1, (b, m, 1, n, 1))
        return View((b, m, heads, n, 1, d), 5, (b, m, heads, n, 1))
    g = min(codec.group, d)
    if d % g:
        fits = max(x for x in range(1, g + 1) if d % x == 0)
        raise ValueError(f"group={g} does not divide the head width {d}; use group={fits}")
    return View((b, m, heads, n, d // g, g), 5, (b, m, heads, n, d // g))


def _reduce(x: Tensor, view: View, largest: bool) -> Tensor:
    axes = (2, 4) if view.axis == -1 else (view.axis,)
    return x.amax(axes, keepdim=True) if largest else x.amin(axes, keepdim=True)


def ranges(x: Tensor, keep: Tensor | None, codec: Codec, view: View) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group, in their storage precision but still float32, broadcastable over the view.

    Elements where `keep` is False (outliers, padding) take no part. A group without any gets scale and zero 0.
    Raises ValueError when the storage precision cannot hold them.
    """
    levels = 2**codec.bits - 1
    split = x.reshape(view.shape)
    if keep is None:
        low, high = _reduce(split, view, False), _reduce(split, view, True)
    else:
        kept = keep.reshape(view.shape)
        low = _reduce(split.masked_fill(~kept, torch.inf), view, False)
        high = _reduce(split.masked_fill(~kept, -torch.inf), view, True)
        empty = low > high
        low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    scale, zero = _stored((high - low) / levels, codec), _stored(low, codec)
    if codec.clip:
        scale, zero = _clip_search(split, None if keep is None else kept, low, high, scale, zero, codec, view)
    return scale, zero


def _stored(x: Tensor, codec: Codec) -> Tensor:
    """Round to the storage dtype first, so that the codes absorb the rounding of the zero."""
    if codec.meta_dtype == "float32":
        return x
    rounded = x.to(torch.float16).to(x.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"a {codec.kind} range of {x.abs().max().item():.3g} does not fit float16 metadata; "
            "use meta_dtype='float32'"
        )
    return rounded


def _clip_search(
    split: Tensor, kept: Tensor | None, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, codec: Codec, view: View
) -> tuple[Tensor, Tensor]:
    """Shrink each range around its centre while that lowers the group's squared error."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        squared = (split - restore(encode(split, scale, zero, codec.bits), scale, zero)).square()
        if kept is not None:
            squared = squared * kept
        return squared.sum((2, 4) if view.axis == -1 else view.axis, keepdim=True)

    best, centre, half = error(scale, zero), (low + high) / 2, (high - low) / 2
    for factor in CLIPS:
        tried_scale = _stored(2 * factor * half / (2**codec.bits - 1), codec)
        tried_zero = _stored(centre - factor * half, codec)
        tried = error(tried_scale, tried_zero)
        better = tried < best
        best = torch.where(better, tried, best)
        scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def encode(split: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes as whole numbers in float: clamp(round_half_even((x - zero) / scale), 0, 2^bits - 1), 0 at scale 0."""
    codes = ((split - zero) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, 2**bits - 1)
    return torch.where(scale > 0, codes, 0.0)


def restore(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x = codes * scale + zero."""
    return codes * scale + zero

"""Codes of 2, 3, 4 or 8 bits in bytes, planar along channels, so that unpacking gives contiguous slices.

With per = 8 / bits, byte j of a row holds channels j, j + D/per, j + 2 D/per, ... at bit offsets 0, bits, 2 bits, ...
Three bits are a plane of the two low bits followed by a plane of the high bit: 3.0 bits each, no odd word sizes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """The planes of a code as (bits of the plane, where they sit in the code)."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a packed row of `width` codes. Raises ValueError when the width does not fill whole bytes."""
    step = 8 if bits == 3 else 8 // bits
    if width % step:
        raise ValueError(
            f"head width {width} does not fill whole bytes with bits={bits}; it must be a multiple of {step}, so use "
            "bits=8, which fits any width"
        )
    return width * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., D], each below 2^bits, into [..., D bits / 8] bytes."""
    row_bytes(codes.shape[-1], bits)
    packed = []
    for size, at in planes(bits):
        parts = ((codes >> at) & (2**size - 1)).chunk(8 // size, -1)
        byte = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            byte |= part << (i * size)
        packed.append(byte)
    return torch.cat(packed, -1) if len(packed) > 1 else packed[0]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 codes [..., D]."""
    if bits == 8:
        return packed
    if bits == 3:
        words = packed.view(torch.int64) if packed.shape[-1] % 24 == 0 else packed
        low, high = words.split([words.shape[-1] * 2 // 3, words.shape[-1] // 3], -1)
        # the low plane is twice as wide: each of its parts meets two of the high one's, side by side
        low, high = low.clone(memory_format=torch.contiguous_format), torch.cat([high, high >> 1], -1)
        parts = _parts(low, 2, 2).add_(_parts(high, 2, 1), alpha=4)
    else:
        parts = _parts(packed, bits, bits)
    parts = _wide(parts, torch.complex128, torch.int64)
    if parts.shape[-1] == 1:  # faster than `cat` by a third
        return parts.movedim(0, -2).contiguous().flatten(-2).view(torch.uint8)
    return torch.cat(parts.unbind(0), -1).view(torch.uint8)


def _parts(plane: Tensor, step: int, bits: int) -> Tensor:
    """What `bits` bits hold at 0, step, 2 step, ... of every byte, in a first dimension: [8 / step, ..., bytes / 4]."""
    # int32 is what a processor shifts fastest; bits that come from the next byte are masked
    words = _wide(plane.contiguous(), torch.int32)
    mask = 2**bits - 1
    parts = words >> _shifts(step, words.dim(), words.dtype, words.device)
    return parts.bitwise_and_(mask * 0x01010101 if words.dtype == torch.int32 else mask)


def _wide(x: Tensor, *kinds: torch.dtype) -> Tensor:
    """The same bytes in rows of the first kind that fits, else as bytes."""
    size = x.shape[-1] * x.itemsize
    return x.view(next((kind for kind in kinds if size % kind.itemsize == 0), torch.uint8))


@cache
def _shifts(step: int, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0, step, 2 step, ... below 8, [8 / step, 1, ...] with `dims` ones."""
    return torch.arange(0, 8, step, dtype=dtype, device=device).view(-1, *[1] * dims)


def to_kivi(codes: Tensor, bits: int) -> Tensor:
    """KIVI's layout of the same codes, for comparing with its kernels: int32 words along the last axis, first code in
    the lowest bits. `codes` uint8 [..., D] with D a multiple of 32 / bits; bits 2, 4 or 8."""
    per = 32 // bits
    if bits == 3 or codes.shape[-1] % per:
        raise ValueError(f"bits={bits} with {codes.shape[-1]} codes do not fill int32 words; KIVI packs 2, 4 or 8 bits")
    shifts = torch.arange(0, 32, bits, device=codes.device)
    words = (codes.long().unflatten(-1, (-1, per)) << shifts).sum(-1)  # below 2^32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

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
        low, high = packed.split([packed.shape[-1] * 2 // 3, packed.shape[-1] // 3], -1)
        found, plane = _words(unpack(low, 2), 8), _words(high.contiguous())
        bit = (plane.unsqueeze(-2) >> _shifts(1, 1, plane.dtype, plane.device)).bitwise_and_(_each(plane, 1))
        return found.bitwise_or_(bit.bitwise_left_shift_(2).flatten(-2)).view(torch.uint8)
    plane = _words(packed.contiguous())
    parts = plane >> _shifts(bits, plane.dim(), plane.dtype, plane.device)
    parts = parts.bitwise_and_(_each(plane, 2**bits - 1))
    if packed.shape[-1] % 16 == 0:  # joined 16 bytes at a time, whatever they mean
        parts = parts.view(torch.complex128)
    return torch.cat(parts.unbind(0), -1).view(torch.uint8)


def _words(x: Tensor, pieces: int = 1) -> Tensor:
    """Bytes [..., N] eight at a time where each of the `pieces` of a row has them: a shift carries bits into the next
    byte only where a mask clears them."""
    return x.view(torch.int64) if x.shape[-1] // pieces % 8 == 0 else x


def _each(words: Tensor, mask: int) -> int:
    """The mask of a byte for every byte of a word."""
    return mask * 0x0101010101010101 if words.dtype == torch.int64 else mask


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

"""Codes of 2, 3, 4 or 8 bits in bytes, planar along channels, so that unpacking gives contiguous slices.

With per = 8 / bits, byte j of a row holds channels j, j + D/per, j + 2 D/per, ... at bit offsets 0, bits, 2 bits, ...
Three bits are a plane of the two low bits followed by a plane of the high bit: 3.0 bits each, no odd word sizes.
"""

from __future__ import annotations

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
    # Eight bytes at a time where they fit: a shift carries bits into the next byte only where the mask clears them.
    fits = packed.shape[-1] % (24 if bits == 3 else 8) == 0
    words = packed.view(torch.int64) if fits else packed
    found, start = None, 0
    for size, at in planes(bits):
        plane = words[..., start : start + words.shape[-1] * size // bits].contiguous()  # else loops of 1 or 2 words
        start += plane.shape[-1]
        mask = (2**size - 1) * (0x0101010101010101 if fits else 1)
        part = torch.cat([(plane >> shift) & mask for shift in range(0, 8, size)], -1)
        found = part if found is None else found | (part << at)
    return found.view(torch.uint8)


def to_kivi(codes: Tensor, bits: int) -> Tensor:
    """KIVI's layout of the same codes, for comparing with its kernels: int32 words along the last axis, first code in
    the lowest bits. `codes` uint8 [..., D] with D a multiple of 32 / bits; bits 2, 4 or 8."""
    per = 32 // bits
    if bits == 3 or codes.shape[-1] % per:
        raise ValueError(f"bits={bits} with {codes.shape[-1]} codes do not fill int32 words; KIVI packs 2, 4 or 8 bits")
    shifts = torch.arange(0, 32, bits, device=codes.device)
    words = (codes.long().unflatten(-1, (-1, per)) << shifts).sum(-1)  # below 2^32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

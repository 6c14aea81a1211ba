"""What GEAR's decode and quantise kernels share: launch settings, padded widths, and how codes enter a dot product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zq_lib.core.kernels_launch import INTERPRETED, look_up, padded


@dataclass(frozen=True)
class Settings:
    """One row of the launch table: tokens per tile, outliers per step, warps per program, stages of load pipelines."""

    tokens: int
    entries: int
    warps: int
    stages: int


# Keys: (kernel, half precision?, head width up to). No row has been timed on a GPU: each is the largest tile tried that
# spills no register on sm_80, sm_90 and gfx942. A page has 64 tokens, so a larger tile would not fit one key group of
# 64. Dot products of fp32 in ieee precision have no tensor cores and unroll into registers, hence the small tiles.
# - "parts": 64 tokens spill 80 bytes a thread on sm_80, and 8 warps instead of 4 spill 336 on gfx942.
LAUNCH: dict[tuple[str, bool, int], Settings] = {
    ("packed", True, 128): Settings(64, 32, 4, 2),
    ("packed", True, 256): Settings(32, 32, 4, 2),
    ("parts", True, 256): Settings(32, 32, 4, 2),
    ("parts", False, 256): Settings(16, 16, 4, 1),
    ("packed", False, 256): Settings(16, 16, 4, 1),
    ("exact", True, 128): Settings(64, 0, 4, 2),
    ("exact", True, 256): Settings(32, 0, 4, 2),
    ("exact", False, 256): Settings(16, 0, 4, 1),
    ("quantize", True, 256): Settings(32, 0, 4, 1),
    ("quantize", False, 256): Settings(32, 0, 4, 1),
}
MERGE = Settings(1, 0, 4, 1)
# In the interpreter a step costs the same whatever its size: two tiles a page, and most pages in one list of outliers.
TOY = Settings(32, 128, 4, 1)


def settings(kernel: str, dtype: torch.dtype, width: int) -> Settings:
    """The launch settings of `kernel` for queries of `dtype` and heads of `width`.

    "packed" for codes alone, "parts" with factors or outliers, "exact", or "quantize".
    """
    return TOY if INTERPRETED else look_up(LAUNCH, kernel, dtype, width)


def packed_operand(dtype: torch.dtype) -> tl.dtype:
    """The same beside codes: fp16 for bf16 too, since factors and outliers are stored in it and all else is scaled."""
    return tl.float32 if dtype == torch.float32 else tl.float16


def columns(size: int, dtype: torch.dtype) -> int:
    """The same for the columns of a product. In half precision at least 32, for the compiler gives the warps of a
    16 x 16 product the same rows, and those of all products that depend on it, which quadruples the work."""
    return padded(size, 16 if dtype == torch.float32 else 32)


def slice_width(width: int, bits: int) -> int:
    """Channels of a slice of packed codes, those that share a bit offset."""
    return width // (4 if bits == 3 else 8 // bits)


@triton.jit
def load_codes(base, token, inside, BITS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """The packed rows of some tokens, a byte in an int16 each: [N, WIDE] twice, the second with the high bits of 3.

    `token` int64 [N], `inside` [N]. A row has 8 / BITS slices of channels in planes of BITS bits; see `packing`.
    """
    W: tl.constexpr = D // (4 if BITS == 3 else 8 // BITS)  # channels of a slice, and bytes of a row
    byte = tl.arange(0, WIDE)[None, :]
    whole = inside[:, None] & (byte < W)
    rows = base + (token * (D * BITS // 8))[:, None]
    low = tl.load(rows + byte, mask=whole, other=0).to(tl.int16)
    if BITS == 3:  # two slices of the high bits lie beside each other in a slice of the low ones: align, move to bit 2
        high = tl.load(rows + W + byte % (D // 8), mask=whole, other=0).to(tl.int16)
        return low, ((high >> (byte // (D // 8)).to(tl.int16)) & 0x55) << 2
    else:
        return low, low


@triton.jit
def code_slice(low, high, s: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Slice s of the codes of `load_codes` as an operand, [N, WIDE]: codes times 2^(BITS s), over `per_unit`.

    Masked bits are used where they stand. In half precision they are not converted either: read as fp16 they are
    subnormal numbers, multiples of 2^-24, and dot products take those exactly.
    """
    SIZE: tl.constexpr = 2 if BITS == 3 else BITS
    bits = low & ((2**SIZE - 1) << (SIZE * s))
    if BITS == 3:
        bits = bits | (high & (4 << (SIZE * s)))
    if DOT == tl.float32:
        return bits.to(tl.float32)
    else:
        return bits.to(tl.float16, bitcast=True)


@triton.jit
def slice_weight(s: tl.constexpr, BITS: tl.constexpr):
    """2^-(BITS s), what undoes the place of slice s in its byte."""
    return 1.0 / 2 ** ((2 if BITS == 3 else BITS) * s)


@triton.jit
def per_unit(DOT: tl.constexpr):
    """What sums over operands of `code_slice` are multiplied by."""
    return 1.0 if DOT == tl.float32 else 16777216.0

"""What the attention kernels of several methods share: how they are launched, and their tiles of rows.

Importing this imports triton. Every address is computed in 64 bits; tiles are guarded in each dimension that can
overrun, with an explicit fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zq_lib.core.backend import Launch, interpreting, record
from zq_lib.core.kernels import HIP_STAGES

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction on a GPU, exp is two
FILL = tl.constexpr(-1e30)  # finite: in a block without a visible key `score - maximum` is then 0 and not NaN

INTERPRETED = interpreting()  # Triton has just read the same variable while decorating the kernels below
WIDEST_HEAD = 256
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # in a signature


@dataclass(frozen=True)
class Settings:
    """One row of a launch table: rows and keys per tile, warps per program, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def look_up(table: Mapping[tuple[str, bool, int], Any], kernel: str, dtype: torch.dtype, width: int) -> Any:
    """The row of a launch table whose keys are (kernel, half precision?, head width up to)."""
    half = dtype != torch.float32
    row = table[kernel, half, min(limit for name, h, limit in table if name == kernel and h == half and width <= limit)]
    return replace(row, stages=min(row.stages, HIP_STAGES)) if torch.version.hip else row


def operand(dtype: torch.dtype) -> tl.dtype:
    """The type of a dot product's operands: the tensor's own, but fp32 in the interpreter, whose bf16 is broken."""
    return tl.float32 if INTERPRETED else DTYPES[dtype]


def padded(size: int, least: int = 16) -> int:
    """A size rounded up to what a tile of a dot product may have: a power of two, at least 16."""
    return max(least, triton.next_power_of_2(size))


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself when its last dimension is dense, which is all that the kernels ask; otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def run(
    kernel: Any, name: str, grid: int | tuple[int, ...], like: Tensor, args: tuple, launch: Any, **meta: Any
) -> None:
    """Start `kernel` with a grid of programs on the device of `like`, and record it."""
    grid = (grid,) if isinstance(grid, int) else grid
    if min(grid) < 1:  # a grid of zero runs nothing and says nothing
        raise ValueError(f"{name} has a grid of {min(grid)} programs; none of its tensors may be empty.")
    with torch.cuda.device_of(like):
        kernel[grid](*args, **meta, num_warps=launch.warps, num_stages=launch.stages)
    record(Launch(name, "interpreter" if INTERPRETED else "triton", grid, {**meta, "warps": launch.warps}))


@triton.jit
def load_tile(base, stride, count, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr):
    """`BLOCK` rows from `base`, zero beyond row `count` (if GUARD) and beyond column D. [BLOCK, BLOCK_D]"""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + row.to(tl.int64) * stride + column
    if GUARD:
        if D == BLOCK_D:
            return tl.load(pointers, mask=row < count, other=0.0)
        else:
            return tl.load(pointers, mask=(row < count) & (column < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=column < D, other=0.0)


@triton.jit
def store_tile(base, stride, count, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows below `count` and the columns below D of `value` [BLOCK, BLOCK_D], in the type of `base`."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + row.to(tl.int64) * stride + column
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(row < count) & (column < D))


@triton.jit
def load_lse(LSE, query, T):
    """Base-2 log-sum-exp of a tile's rows; rows that see nothing or do not exist get +inf, so that their P is 0."""
    lse = tl.load(LSE + query, mask=query < T, other=float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)

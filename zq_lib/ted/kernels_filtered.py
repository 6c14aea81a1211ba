"""The Triton kernel for the distance of filtered states: filter, subtract, square and add, all pairs at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(H, W, rows, column, kept, N, width, stride_h, stride_w, acc, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    """acc + H[rows] W[column]^T, accumulated in fp32 from operands of type DOT (ieee for fp32)."""
    step = tl.arange(0, BLOCK_K)
    h_at = H + rows[:, None] * stride_h + step[None, :]
    w_at = W + step[:, None] + column.to(tl.int64)[None, :] * stride_w
    for first in range(0, width, BLOCK_K):
        inside = first + step < width
        h = tl.load(h_at, mask=kept[:, None] & inside[None, :], other=0.0).to(DOT)
        w = tl.load(w_at, mask=inside[:, None] & (column < N)[None, :], other=0.0).to(DOT)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        h_at += BLOCK_K
        w_at += BLOCK_K
    return acc


@triton.jit
def address(at, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that a table holds. Told that it is ALIGNED to 16 bytes, the compiler copies in half precision for
    sm_90 with 48 asynchronous instructions of 16 bytes; otherwise it has 192 loads of one number each."""
    found = tl.load(at).to(tl.pointer_type(ELEMENT), bitcast=True)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def filtered_gap(
    ADDRESSES, ROWS, GAP, PART, M, N, width_s, width_t, stride_hs, stride_ht, stride_ws, stride_wt, shrink,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """D = H_s W_s^T + b_s - H_t W_t^T - b_t of one tile of M kept rows x N columns of one pair, in one accumulator.

    ADDRESSES [pairs, 6] int64 holds those of H_s, W_s, b_s, H_t, W_t and b_t, all of type ELEMENT. ROWS [M] int64 are
    the kept rows, None for all. PART [pairs, tiles] fp32 gets the tile's sum of squares; GAP [pairs, M, N], unless it
    is None, D times `shrink` for the gradients.
    """
    columns, pair = tl.cdiv(N, BLOCK_N), tl.program_id(1)
    row = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = row < M
    rows = row.to(tl.int64)
    if ROWS is not None:
        rows = tl.load(ROWS + row, mask=kept, other=0)
    table = ADDRESSES + pair * 6
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h, w = address(table + 3, ELEMENT, ALIGNED), address(table + 4, ELEMENT, ALIGNED)
    acc = add_product(h, w, rows, column, kept, N, width_t, stride_ht, stride_wt, acc, BLOCK_K, DOT)
    h, w = address(table, ELEMENT, ALIGNED), address(table + 1, ELEMENT, ALIGNED)
    acc = add_product(h, w, rows, column, kept, N, width_s, stride_hs, stride_ws, -acc, BLOCK_K, DOT)
    bias_s, bias_t = address(table + 2, ELEMENT, ALIGNED), address(table + 5, ELEMENT, ALIGNED)
    bias = tl.load(bias_s + column, mask=column < N, other=0.0).to(tl.float32)
    bias -= tl.load(bias_t + column, mask=column < N, other=0.0).to(tl.float32)
    inside = kept[:, None] & (column < N)[None, :]
    acc = tl.where(inside, acc + bias[None, :], 0.0)
    tl.store(PART + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(acc * acc, 1), 0))
    if GAP is not None:
        at = GAP + (pair.to(tl.int64) * M + row.to(tl.int64)[:, None]) * N + column[None, :]
        tl.store(at, (acc * shrink).to(GAP.dtype.element_ty), mask=inside)

"""The Triton kernels of an adapted linear layer: one product with a low-rank epilogue, and two skinny products.

`low_rank_matmul` computes A B + ((A U) * c) V, which is the forward pass with B = W^T, U = Q^T, V = P^T, and the
input's gradient with B = W, U = P, V = Q. Products take operands of type DOT (ieee for fp32) and accumulate in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_rank_matmul(
    A, B, BIAS, U, C, V, H, OUT, M, N, K, R,
    stride_am, stride_bk, stride_bn, stride_uk, stride_ur, stride_vr, stride_vn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GIVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per tile of OUT [M, N]. H = A U [M, R] fp32 is read if GIVEN; otherwise every program works its rows
    of H out on the way, at R / BLOCK_N of the main product's cost, and those of the first column write them."""
    columns = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    step = tl.arange(0, BLOCK_K)
    row64, column64, rank64, step64 = row.to(tl.int64), column.to(tl.int64), rank.to(tl.int64), step.to(tl.int64)
    a_at = A + row64[:, None] * stride_am + step64[None, :]
    b_at = B + step64[:, None] * stride_bk + column64[None, :] * stride_bn
    u_at = U + step64[:, None] * stride_uk + rank64[None, :] * stride_ur
    h_at = H + row64[:, None] * R + rank64[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + step < K
        a = tl.load(a_at, mask=(row < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        b = tl.load(b_at, mask=inside[:, None] & (column < N)[None, :], other=0.0).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if not GIVEN:
            u = tl.load(u_at, mask=inside[:, None] & (rank < R)[None, :], other=0.0).to(DOT)
            h = tl.dot(a, u, h, input_precision="ieee")
            u_at += BLOCK_K * stride_uk
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_bk
    whole = (row < M)[:, None] & (rank < R)[None, :]
    if GIVEN:
        h = tl.load(h_at, mask=whole, other=0.0)
    elif tl.program_id(0) % columns == 0:
        tl.store(h_at, h, mask=whole)
    c = tl.load(C + rank, mask=rank < R, other=0.0)
    v_at = V + rank64[:, None] * stride_vr + column64[None, :] * stride_vn
    v = tl.load(v_at, mask=(rank < R)[:, None] & (column < N)[None, :], other=0.0).to(DOT)
    acc = tl.dot((h * c[None, :]).to(DOT), v, acc, input_precision="ieee")
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    out_at = OUT + row64[:, None] * N + column64[None, :]
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def project(
    A, U, H, M, K, R, stride_am, stride_uk, stride_ur,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """H = A U, [M, R] fp32, one program per block of rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    step = tl.arange(0, BLOCK_K)
    row64, rank64, step64 = row.to(tl.int64), rank.to(tl.int64), step.to(tl.int64)
    a_at = A + row64[:, None] * stride_am + step64[None, :]
    u_at = U + step64[:, None] * stride_uk + rank64[None, :] * stride_ur
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + step < K
        a = tl.load(a_at, mask=(row < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        u = tl.load(u_at, mask=inside[:, None] & (rank < R)[None, :], other=0.0).to(DOT)
        h = tl.dot(a, u, h, input_precision="ieee")
        a_at += BLOCK_K
        u_at += BLOCK_K * stride_uk
    tl.store(H + row64[:, None] * R + rank64[None, :], h, mask=(row < M)[:, None] & (rank < R)[None, :])


@triton.jit
def outer(
    A, H, C, PART, M, D, R, stride_am, ROWS,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """PART[split] = A^T (H * c) over ROWS rows of A [M, D] and H [M, R], [D, R] fp32: the gradients of P and of Q^T.

    The splits are added up in order afterwards, without atomics, so runs repeat bit for bit."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_R)
    column64, rank64 = column.to(tl.int64), rank.to(tl.int64)
    c = tl.load(C + rank, mask=rank < R, other=0.0)
    acc = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    start = tl.program_id(1) * ROWS
    for first in range(start, tl.minimum(start + ROWS, M), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < tl.minimum(start + ROWS, M)
        row64 = row.to(tl.int64)
        a_at = A + row64[:, None] * stride_am + column64[None, :]
        a = tl.load(a_at, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(DOT)
        h_at = H + row64[:, None] * R + rank64[None, :]
        h = tl.load(h_at, mask=inside[:, None] & (rank < R)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), (h * c[None, :]).to(DOT), acc, input_precision="ieee")
    part = PART + tl.program_id(1).to(tl.int64) * D * R
    tl.store(part + column64[:, None] * R + rank64[None, :], acc, mask=(column < D)[:, None] & (rank < R)[None, :])

"""The Triton kernels of a shrunk layer: two launches for many tokens, one for a few.

`stack` computes Z = X [V; S]^T, and `spread` Y = Z[:, :r] U^T + b with the other columns of Z added where their outputs
are. `decode` does all of it at once. Products take operands of type DOT (ieee for fp32) and accumulate in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stack(
    X, V, S, Z, M, K, R, KEPT, stride_x, stride_v, stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per tile of Z [M, R + KEPT]; a tile belongs to V or to S, so the two are never joined in memory."""
    first_tiles = tl.cdiv(R, BLOCK_N)
    columns = first_tiles + tl.cdiv(KEPT, BLOCK_N)
    row = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) % columns
    of_v = tile < first_tiles
    column = tl.where(of_v, tile, tile - first_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_column = column < tl.where(of_v, R, KEPT)
    weights = tl.where(of_v, V, S)
    step = tl.arange(0, BLOCK_K)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    x_at = X + row64[:, None] * stride_x + step[None, :]
    w_at = weights + step[:, None] + column64[None, :] * tl.where(of_v, stride_v, stride_s)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + step < K
        x = tl.load(x_at, mask=(row < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        w = tl.load(w_at, mask=inside[:, None] & inside_column[None, :], other=0.0).to(DOT)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    z_at = Z + row64[:, None] * (R + KEPT) + (tl.where(of_v, 0, R) + column64)[None, :]
    tl.store(z_at, acc.to(Z.dtype.element_ty), mask=(row < M)[:, None] & inside_column[None, :])


@triton.jit
def spread(
    Z, U, PLACE, BIAS, Y, M, N, R, stride_z, stride_u,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per tile of Y [M, N]. PLACE [N] int32 says which kept row an output has, -1 for none: a gather, so
    that every output has one owner and is stored next to its neighbours, without atomics."""
    columns = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, R, BLOCK_R):
        inside = first + rank < R
        z_at = Z + row64[:, None] * stride_z + (first + rank)[None, :]
        z = tl.load(z_at, mask=(row < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        u_at = U + column64[None, :] * stride_u + (first + rank)[:, None]
        u = tl.load(u_at, mask=inside[:, None] & (column < N)[None, :], other=0.0).to(DOT)
        acc = tl.dot(z, u, acc, input_precision="ieee")
    place = tl.load(PLACE + column, mask=column < N, other=-1)
    kept_at = Z + row64[:, None] * stride_z + (R + place)[None, :]
    acc += tl.load(kept_at, mask=(row < M)[:, None] & (place >= 0)[None, :], other=0.0).to(tl.float32)
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y_at = Y + row64[:, None] * N + column64[None, :]
    tl.store(y_at, acc.to(Y.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def decode(
    X, U, V, S, ORDER, BIAS, Y, M, N, K, R, KEPT, stride_x, stride_u, stride_v, stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N outputs, M <= BLOCK_M tokens. ORDER [N] int32 lists the outputs with a kept row first, so
    that the rows of S lie side by side and the programs behind them read none. Each program works X V^T out again."""
    row = tl.arange(0, BLOCK_M)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.load(ORDER + place, mask=place < N, other=0).to(tl.int64)
    rank, step = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row64, rank64, place64 = row.to(tl.int64), rank.to(tl.int64), place.to(tl.int64)
    x_at = X + row64[:, None] * stride_x + step[None, :]
    v_at = V + step[:, None] + rank64[None, :] * stride_v
    s_at = S + step[:, None] + place64[None, :] * stride_s
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + step < K
        x = tl.load(x_at, mask=(row < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        v = tl.load(v_at, mask=inside[:, None] & (rank < R)[None, :], other=0.0).to(DOT)
        s = tl.load(s_at, mask=inside[:, None] & (place < KEPT)[None, :], other=0.0).to(DOT)
        z = tl.dot(x, v, z, input_precision="ieee")
        acc = tl.dot(x, s, acc, input_precision="ieee")
        x_at += BLOCK_K
        v_at += BLOCK_K
        s_at += BLOCK_K
    u_at = U + output[None, :] * stride_u + rank64[:, None]
    u = tl.load(u_at, mask=(rank < R)[:, None] & (place < N)[None, :], other=0.0).to(DOT)
    # Rounded to X's type first, so that the interpreter, whose operands are fp32, rounds where a GPU does.
    acc = tl.dot(z.to(X.dtype.element_ty).to(DOT), u, acc, input_precision="ieee")
    if BIAS is not None:
        acc += tl.load(BIAS + output, mask=place < N, other=0.0).to(tl.float32)[None, :]
    y_at = Y + row64[:, None] * N + output[None, :]
    tl.store(y_at, acc.to(Y.dtype.element_ty), mask=(row < M)[:, None] & (place < N)[None, :])

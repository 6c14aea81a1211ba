"""The gradient kernels of PASTA's attention. No atomics: every sum has one owner or a fixed order, so runs repeat.

With P the probabilities, dP = dO V^T and delta = rowsum(dO O):  dS = P (dP - delta),  dQ = scale dS K,
dK = scale dS^T Q,  dV = P^T dO.  The bias adds  dgate[b, h] = sum_ij dS_ij rows_i beta_j  and
dbeta[b, j] = sum_hi gate[b, h] rows_i dS_ij.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import LOG2E, load_lse, load_tile, store_tile
from zq_lib.pasta.kernels_common import is_visible


@triton.jit
def _over_keys(
    dq, dgain, drift, mean, q, do, lse, delta, K, V, BETA, MASK, stride_k, stride_v, stride_mask, query, gain, reach,
    scale, start, stop, T, S, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, OF_GATE: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add the keys of [start, stop) to dq / scale [M, BLOCK_D] and, for the gate, to three sums over j, [M] each.

    dgain = sum dS beta,  drift = sum dS,  mean = sum P beta.
    """
    for first in range(start, stop, BLOCK_N):
        offset = tl.cast(first, tl.int64)
        key = first + tl.arange(0, BLOCK_N)
        k = load_tile(K + offset * stride_k, stride_k, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        v = load_tile(V + offset * stride_v, stride_v, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        beta = tl.load(BETA + key, mask=key < reach, other=0.0)  # reach 0: nobody needs it
        scores += gain[:, None] * beta[None, :]
        p = tl.exp2(scores - lse[:, None])
        if EDGE:
            p = tl.where(is_visible(MASK, stride_mask, query[:, None], key[None, :], T, S, CAUSAL), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if OF_GATE:
            dgain += tl.sum(ds * beta[None, :], 1)
            drift += tl.sum(ds, 1)
            mean += tl.sum(p * beta[None, :], 1)
        dq = tl.dot(ds.to(K.dtype.element_ty).to(DOT), k, dq, input_precision="ieee")
    return dq, dgain, drift, mean


@triton.jit
def backward_queries(
    Q, K, V, GATE, BETA, ROWS, MASK, SPAN, OUT, DOUT, LSE, DELTA, DQ, DGATE,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_mb, stride_mt, stride_sb,
    H, GROUP, T, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query block): dQ, delta for `backward_keys`, and with DGATE a part of dgate."""
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    first = block * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    row = first.to(tl.int64)
    line = bh.to(tl.int64) * T
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    BETA += b * S
    q = load_tile(Q + b * stride_qb + h * stride_qh + row * stride_qt, stride_qt, T - first, BLOCK_M, D, BLOCK_D, True)
    o = load_tile(
        OUT + b * stride_ob + h * stride_oh + row * stride_ot, stride_ot, T - first, BLOCK_M, D, BLOCK_D, True
    )
    do = load_tile(
        DOUT + b * stride_gb + h * stride_gh + row * stride_gt, stride_gt, T - first, BLOCK_M, D, BLOCK_D, True
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + line + query, delta, mask=query < T)
    q = q.to(DOT)
    do = do.to(DOT)
    lse = load_lse(LSE + line, query, T)
    allowed = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if ROWS is not None:
        allowed = tl.load(ROWS + b * T + query, mask=query < T, other=0.0)
    gain = allowed * tl.load(GATE + bh) * LOG2E
    needed = tl.max(tl.abs(gain), 0)
    if DGATE is not None:  # the derivative at gate 0 is what profiling by gradients asks for
        needed = tl.max(tl.abs(allowed), 0)
    reach = tl.where(needed > 0, S, 0)
    start = 0
    if MASK is not None:
        MASK += b * stride_mb
        start = tl.load(SPAN + b * stride_sb + 2 * block) // BLOCK_N * BLOCK_N
        stop = tl.load(SPAN + b * stride_sb + 2 * block + 1)
        full = start
    elif CAUSAL:
        stop = tl.minimum(tl.maximum(S - T + first + BLOCK_M, 0), S)
        full = tl.minimum(tl.maximum(S - T + first + 1, 0), S) // BLOCK_N * BLOCK_N
    else:
        stop = S
        full = S // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dgain = tl.zeros([BLOCK_M], tl.float32)
    drift = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    if MASK is None:
        dq, dgain, drift, mean = _over_keys(
            dq, dgain, drift, mean, q, do, lse, delta, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain,
            reach, scale * LOG2E, start, full, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, DGATE is not None, False, DOT,
        )  # fmt: skip
    dq, dgain, drift, mean = _over_keys(
        dq, dgain, drift, mean, q, do, lse, delta, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain,
        reach, scale * LOG2E, full, stop, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, DGATE is not None, True, DOT,
    )  # fmt: skip
    store_tile(DQ + (line + row) * D, D, T - first, dq * scale, BLOCK_M, D, BLOCK_D)
    if DGATE is not None:
        # A row of dS sums to 0, but delta comes from the rounded O and lets it drift, times a beta that is log(alpha)
        # nearly everywhere: without this correction the error in bf16 is 7 %, with it that of fp32.
        dgain -= drift * mean
        tl.store(DGATE + bh.to(tl.int64) * blocks + block, tl.sum(dgain * allowed, 0))


@triton.jit
def _over_queries(
    dk, dv, dbeta, k, v, beta, Q, DOUT, LSE, DELTA, ROWS, MASK, stride_q, stride_g, stride_mask, key, gate, scale,
    start, stop, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add one head's queries of [start, stop) to dk / scale and dv [N, BLOCK_D] and to dbeta [N]. Tiles are [N, M].

    Query rows from T on load as zeros with P 0. Keys from S on need no guard here: their rows are never stored.
    """
    for first in range(start, stop, BLOCK_M):
        offset = tl.cast(first, tl.int64)
        query = first + tl.arange(0, BLOCK_M)
        q = load_tile(Q + offset * stride_q, stride_q, T - first, BLOCK_M, D, BLOCK_D, True).to(DOT)
        do = load_tile(DOUT + offset * stride_g, stride_g, T - first, BLOCK_M, D, BLOCK_D, True).to(DOT)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        gain = tl.zeros([BLOCK_M], tl.float32) + gate
        if ROWS is not None:
            gain *= tl.load(ROWS + query, mask=query < T, other=0.0)
        scores += beta[:, None] * (gain * LOG2E)[None, :]
        p = tl.exp2(scores - load_lse(LSE, query, T)[None, :])
        if EDGE:
            p = tl.where(is_visible(MASK, stride_mask, query[None, :], key[:, None], T, S, CAUSAL), p, 0.0)
        dv = tl.dot(p.to(DOUT.dtype.element_ty).to(DOT), do, dv, input_precision="ieee")
        delta = tl.load(DELTA + query, mask=query < T, other=0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dbeta += tl.sum(ds * gain[None, :], 1)
        dk = tl.dot(ds.to(Q.dtype.element_ty).to(DOT), q, dk, input_precision="ieee")
    return dk, dv, dbeta


@triton.jit
def backward_keys(
    Q, K, V, GATE, BETA, ROWS, MASK, SPAN, DOUT, LSE, DELTA, DK, DV, DBETA,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gh, stride_gt, stride_mb, stride_mt, stride_sb,
    H, GROUP, T, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, key block): dK and dV summed over the group's heads, and dbeta."""
    blocks = tl.cdiv(S, BLOCK_N)
    block = tl.program_id(0) % blocks  # causal: the first keys are seen by most queries, and start first
    bg = tl.program_id(0) // blocks
    groups = H // GROUP
    b = (bg // groups).to(tl.int64)
    g = (bg % groups).to(tl.int64)
    first = block * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    row = first.to(tl.int64)
    k = load_tile(K + b * stride_kb + g * stride_kg + row * stride_ks, stride_ks, S - first, BLOCK_N, D, BLOCK_D, True)
    v = load_tile(V + b * stride_vb + g * stride_vg + row * stride_vs, stride_vs, S - first, BLOCK_N, D, BLOCK_D, True)
    k = k.to(DOT)
    v = v.to(DOT)
    beta = tl.load(BETA + b * S + key, mask=key < S, other=0.0)
    if ROWS is not None:
        ROWS += b * T
    start = 0
    stop = T
    full = start
    if MASK is not None:
        MASK += b * stride_mb
        start = tl.load(SPAN + b * stride_sb + 2 * block) // BLOCK_M * BLOCK_M
        stop = tl.load(SPAN + b * stride_sb + 2 * block + 1)
        full = stop
    elif CAUSAL:  # query i sits at position S - T + i; from `full` on, all of them see the whole block
        start = tl.maximum(first - (S - T), 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (S - T), 0), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, tl.cdiv(T, BLOCK_M) * BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_N], tl.float32)
    for member in range(0, GROUP):
        h = g * GROUP + member
        bh = b * H + h
        query_side = Q + b * stride_qb + h * stride_qh
        grad_side = DOUT + b * stride_gb + h * stride_gh
        line = bh * T
        gate = tl.load(GATE + bh)
        if MASK is not None or CAUSAL:
            dk, dv, dbeta = _over_queries(
                dk, dv, dbeta, k, v, beta, query_side, grad_side, LSE + line, DELTA + line, ROWS, MASK,
                stride_qt, stride_gt, stride_mt, key, gate, scale * LOG2E,
                start, full, T, S, D, BLOCK_D, BLOCK_M, CAUSAL, True, DOT,
            )  # fmt: skip
        if MASK is None:
            dk, dv, dbeta = _over_queries(
                dk, dv, dbeta, k, v, beta, query_side, grad_side, LSE + line, DELTA + line, ROWS, MASK,
                stride_qt, stride_gt, stride_mt, key, gate, scale * LOG2E,
                full, stop, T, S, D, BLOCK_D, BLOCK_M, CAUSAL, False, DOT,
            )  # fmt: skip
    out = (bg.to(tl.int64) * S + row) * D
    store_tile(DK + out, D, S - first, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(DV + out, D, S - first, dv, BLOCK_N, D, BLOCK_D)
    if DBETA is not None:
        tl.store(DBETA + bg.to(tl.int64) * S + key, dbeta, mask=key < S)

"""The gradient kernels of MASFormer's attention. No atomics: every sum has one owner or a fixed order, so runs repeat.

With P the probabilities, dP = dO V^T and delta = rowsum(dO O):  dS = P (dP - delta),  dQ = scale dS K,
dK = scale dS^T Q,  dV = P^T dO.

A key is seen by the queries of its span, and a sink by all that follow. One program for both would make a sink's block
take T rows while others take w, so `backward_keys` sums the spans, and `backward_sinks` the rest in chunks of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import LOG2E, load_lse, load_tile, store_tile
from zq_lib.masformer.kernels_common import highest, key_range, lowest, read_text


@triton.jit
def _over_keys(
    dq, q, do, lse, delta, K, V, stride_k, stride_v, query, low, scale, start, stop, first, far, last, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add the keys of [start, stop) to dq / scale [M, BLOCK_D]."""
    for begin in range(start, stop, BLOCK_N):
        offset = tl.cast(begin, tl.int64)
        key = begin + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(K + offset * stride_k, stride_k, S - begin, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        v = load_tile(V + offset * stride_v, stride_v, S - begin, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if EDGE:
            visible = (key <= query[:, None]) & ((key >= low[:, None]) | (key < far)) & (key >= first) & (key < last)
            p = tl.where(visible, p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(K.dtype.element_ty).to(DOT), k, dq, input_precision="ieee")
    return dq


@triton.jit
def backward_queries(
    Q, K, V, SPANS, TEXT, OUT, DOUT, LSE, DELTA, DQ,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    H, GROUP, T, S, scale, span, sinks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query block): dQ, and delta for the other two kernels."""
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    row = block * BLOCK_M
    wide = row.to(tl.int64)
    line = bh.to(tl.int64) * T
    first, last, gap = read_text(TEXT, b, S)
    if SPANS is not None:
        span = tl.load(SPANS + h)
    shift = gap - first
    here = S - T + row
    query = here + tl.arange(0, BLOCK_M)
    low = lowest(query, span, shift, KIND)
    start, full, edge, end = key_range(here, tl.minimum(here + BLOCK_M, S), span, shift, first, last, BLOCK_N, KIND)
    far = tl.minimum(first + sinks, last)
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    count = T - row
    q = load_tile(Q + b * stride_qb + h * stride_qh + wide * stride_qt, stride_qt, count, BLOCK_M, D, BLOCK_D, True)
    o = load_tile(OUT + b * stride_ob + h * stride_oh + wide * stride_ot, stride_ot, count, BLOCK_M, D, BLOCK_D, True)
    do = load_tile(DOUT + b * stride_gb + h * stride_gh + wide * stride_gt, stride_gt, count, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(DELTA + line + rows, delta, mask=rows < T)
    q = q.to(DOT)
    do = do.to(DOT)
    lse = load_lse(LSE + line, rows, T)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _over_keys(
        dq, q, do, lse, delta, K, V, stride_ks, stride_vs, query, low, scale * LOG2E, first // BLOCK_N * BLOCK_N,
        tl.minimum(far, start), first, far, start, S, D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, do, lse, delta, K, V, stride_ks, stride_vs, query, low, scale * LOG2E, start, full, first, far, last, S,
        D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, do, lse, delta, K, V, stride_ks, stride_vs, query, low, scale * LOG2E, full, edge, first, far, last, S,
        D, BLOCK_D, BLOCK_N, False, DOT,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, do, lse, delta, K, V, stride_ks, stride_vs, query, low, scale * LOG2E, edge, end, first, far, last, S,
        D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    store_tile(DQ + (line + wide) * D, D, count, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def _over_queries(
    dk, dv, k, v, Q, DOUT, LSE, DELTA, stride_q, stride_g, key, span, shift, scale, start, stop, first, last, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    KIND: tl.constexpr, EDGE: tl.constexpr, SINKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add one head's queries of [start, stop) to dk / scale and dv [N, BLOCK_D]; with SINKS those beyond the span.

    Tiles are [N, M]. Query rows from T on load as zeros with P 0, as do rows of padding.
    """
    for begin in range(start, stop, BLOCK_M):
        offset = tl.cast(begin, tl.int64)
        rows = begin + tl.arange(0, BLOCK_M)
        q = load_tile(Q + offset * stride_q, stride_q, T - begin, BLOCK_M, D, BLOCK_D, True).to(DOT)
        do = load_tile(DOUT + offset * stride_g, stride_g, T - begin, BLOCK_M, D, BLOCK_D, True).to(DOT)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - load_lse(LSE, rows, T)[None, :])
        if EDGE:
            query = S - T + rows
            low = lowest(query, span, shift, KIND)[None, :]
            visible = (key[:, None] <= query[None, :]) & (key[:, None] >= first) & (key[:, None] < last)
            if SINKS:
                visible &= key[:, None] < low
            else:
                visible &= key[:, None] >= low
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(DOUT.dtype.element_ty).to(DOT), do, dv, input_precision="ieee")
        delta = tl.load(DELTA + rows, mask=rows < T, other=0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(Q.dtype.element_ty).to(DOT), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_keys(
    Q, K, V, SPANS, TEXT, DOUT, LSE, DELTA, DK, DV,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gh, stride_gt,
    H, GROUP, T, S, scale, span,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, key block): dK and dV of the span, summed over the group's heads."""
    blocks = tl.cdiv(S, BLOCK_N)
    block = tl.program_id(0) % blocks
    bg = tl.program_id(0) // blocks
    groups = H // GROUP
    b = (bg // groups).to(tl.int64)
    g = (bg % groups).to(tl.int64)
    row = block * BLOCK_N
    wide = row.to(tl.int64)
    key = row + tl.arange(0, BLOCK_N)
    first, last, gap = read_text(TEXT, b, S)
    shift = gap - first
    past = S - T
    k = load_tile(K + b * stride_kb + g * stride_kg + wide * stride_ks, stride_ks, S - row, BLOCK_N, D, BLOCK_D, True)
    v = load_tile(V + b * stride_vb + g * stride_vg + wide * stride_vs, stride_vs, S - row, BLOCK_N, D, BLOCK_D, True)
    k = k.to(DOT)
    v = v.to(DOT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = tl.maximum(tl.maximum(row, first) - past, 0) // BLOCK_M * BLOCK_M
    whole = (row >= first) & (row + BLOCK_N <= last)
    for member in range(0, GROUP):
        h = g * GROUP + member
        bh = b * H + h
        if SPANS is not None:
            span = tl.load(SPANS + h)
        stop = tl.minimum(highest(tl.minimum(row + BLOCK_N, last) - 1, span, shift, KIND) + 1, last) - past
        # From `full` to `edge` every query sees every key of the block.
        full = tl.cdiv(tl.maximum(row + BLOCK_N - 1 - past, 0), BLOCK_M) * BLOCK_M
        full = tl.maximum(tl.minimum(full, stop), start)
        edge = tl.maximum((highest(row, span, shift, KIND) + 1 - past) // BLOCK_M * BLOCK_M, full)
        edge = tl.where(whole, tl.minimum(edge, tl.maximum(stop, full)), full)
        query_side = Q + b * stride_qb + h * stride_qh
        grad_side = DOUT + b * stride_gb + h * stride_gh
        line = bh * T
        dk, dv = _over_queries(
            dk, dv, k, v, query_side, grad_side, LSE + line, DELTA + line, stride_qt, stride_gt, key, span, shift,
            scale * LOG2E, start, full, first, last, T, S, D, BLOCK_D, BLOCK_M, KIND, True, False, DOT,
        )  # fmt: skip
        dk, dv = _over_queries(
            dk, dv, k, v, query_side, grad_side, LSE + line, DELTA + line, stride_qt, stride_gt, key, span, shift,
            scale * LOG2E, full, edge, first, last, T, S, D, BLOCK_D, BLOCK_M, KIND, False, False, DOT,
        )  # fmt: skip
        dk, dv = _over_queries(
            dk, dv, k, v, query_side, grad_side, LSE + line, DELTA + line, stride_qt, stride_gt, key, span, shift,
            scale * LOG2E, edge, stop, first, last, T, S, D, BLOCK_D, BLOCK_M, KIND, True, False, DOT,
        )  # fmt: skip
    out = (bg.to(tl.int64) * S + wide) * D
    store_tile(DK + out, D, S - row, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(DV + out, D, S - row, dv, BLOCK_N, D, BLOCK_D)


@triton.jit
def backward_sinks(
    Q, K, V, SPANS, TEXT, DOUT, LSE, DELTA, DK, DV,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gh, stride_gt,
    H, GROUP, T, S, scale, span, sinks, CHUNKS, ROWS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, chunk of ROWS queries, block of sinks): what queries beyond the sinks'
    span add to their dK and dV, as a part [B, G, CHUNKS, sinks, D] in fp32. ROWS is a multiple of BLOCK_M."""
    blocks = tl.cdiv(sinks, BLOCK_N)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % CHUNKS
    bg = tl.program_id(0) // blocks // CHUNKS
    groups = H // GROUP
    b = (bg // groups).to(tl.int64)
    g = (bg % groups).to(tl.int64)
    first, last, gap = read_text(TEXT, b, S)
    shift = gap - first
    past = S - T
    row = first + block * BLOCK_N
    wide = tl.cast(row, tl.int64)
    key = row + tl.arange(0, BLOCK_N)
    k = load_tile(K + b * stride_kb + g * stride_kg + wide * stride_ks, stride_ks, S - row, BLOCK_N, D, BLOCK_D, True)
    v = load_tile(V + b * stride_vb + g * stride_vg + wide * stride_vs, stride_vs, S - row, BLOCK_N, D, BLOCK_D, True)
    k = k.to(DOT)
    v = v.to(DOT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    far = tl.minimum(first + sinks, last)
    for member in range(0, GROUP):
        h = g * GROUP + member
        bh = b * H + h
        if SPANS is not None:
            span = tl.load(SPANS + h)
        beyond = tl.maximum(highest(row, span, shift, KIND) + 1 - past, 0)
        start = tl.maximum(chunk * ROWS, beyond // BLOCK_M * BLOCK_M)
        stop = tl.minimum((chunk + 1) * ROWS, last - past)
        line = bh * T
        dk, dv = _over_queries(
            dk, dv, k, v, Q + b * stride_qb + h * stride_qh, DOUT + b * stride_gb + h * stride_gh, LSE + line,
            DELTA + line, stride_qt, stride_gt, key, span, shift, scale * LOG2E, start, stop, first, far, T, S,
            D, BLOCK_D, BLOCK_M, KIND, True, True, DOT,
        )  # fmt: skip
    out = ((bg.to(tl.int64) * CHUNKS + chunk) * sinks + block * BLOCK_N) * D
    store_tile(DK + out, D, sinks - block * BLOCK_N, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(DV + out, D, sinks - block * BLOCK_N, dv, BLOCK_N, D, BLOCK_D)

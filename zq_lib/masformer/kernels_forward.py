"""The forward kernel of MASFormer's attention: an online softmax in base 2 over the keys of a band.

Dot products take operands of type DOT (ieee for fp32) and accumulate in fp32; everything else is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import FILL, LOG2E, load_tile, store_tile
from zq_lib.masformer.kernels_common import key_range, lowest, read_text


@triton.jit
def _fold(
    acc, top, total, q, K, V, stride_k, stride_v, query, low, scale, start, stop, first, far, last, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fold the keys of [start, stop) into the online softmax. EDGE: some of them may be out of sight.

    acc [M, BLOCK_D]; top, total, query, low [M]; scale carries log2(e); sinks end at `far`; K, V are those of one head.
    """
    for begin in range(start, stop, BLOCK_N):
        offset = tl.cast(begin, tl.int64)
        key = begin + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(K + offset * stride_k, stride_k, S - begin, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if EDGE:
            visible = (key <= query[:, None]) & ((key >= low[:, None]) | (key < far)) & (key >= first) & (key < last)
            scores = tl.where(visible, scores, FILL)
        peak = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        if EDGE:
            p = tl.where(visible, p, 0.0)  # FILL - FILL is 0, whose exponential is 1
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(p, 1)
        top = peak
        v = load_tile(V + offset * stride_v, stride_v, S - begin, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        # Rounded to V's type first, so that the interpreter, whose operands are fp32, rounds where a GPU does.
        p = p.to(V.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def forward(
    Q, K, V, SPANS, TEXT, OUT, LSE,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_ob, stride_oh, stride_ot,
    H, GROUP, T, S, scale, span, sinks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query block); a head's blocks are neighbours, so a band stays in the L2 cache.

    SPANS [H] int32 takes the place of `span` when heads differ; TEXT [B, 3] int32 is described in `read_text`.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last rows of a long span are the longest, and start first
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    row = block * BLOCK_M
    wide = row.to(tl.int64)
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
    q = load_tile(Q + b * stride_qb + h * stride_qh + wide * stride_qt, stride_qt, T - row, BLOCK_M, D, BLOCK_D, True)
    q = q.to(DOT)
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = _fold(  # sinks before the band; where the two overlap they belong to the band
        acc, top, total, q, K, V, stride_ks, stride_vs, query, low, scale, first // BLOCK_N * BLOCK_N,
        tl.minimum(far, start), first, far, start, S, D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, stride_ks, stride_vs, query, low, scale, start, full, first, far, last, S,
        D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, stride_ks, stride_vs, query, low, scale, full, edge, first, far, last, S,
        D, BLOCK_D, BLOCK_N, False, DOT,
    )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, stride_ks, stride_vs, query, low, scale, edge, end, first, far, last, S,
        D, BLOCK_D, BLOCK_N, True, DOT,
    )  # fmt: skip
    dead = (total == 0) | (query < first) | (query >= last)  # padding sees nothing
    total = tl.where(dead, 1.0, total)
    acc = tl.where(dead[:, None], 0.0, acc / total[:, None])
    out = OUT + b * stride_ob + h * stride_oh + wide * stride_ot
    store_tile(out, stride_ot, T - row, acc, BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), (top + tl.log2(total)) / LOG2E)
    line = row + tl.arange(0, BLOCK_M)
    tl.store(LSE + bh.to(tl.int64) * T + line, lse, mask=line < T)

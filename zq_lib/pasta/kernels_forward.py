"""The forward kernels of PASTA's attention: `forward` for many queries, `decode` and `merge` for one.

All keep an online softmax in base 2 over score[b, h, i, j] = scale q_i . k_j + gate[b, h] rows[b, i] beta[b, j]. Dot
products take operands of type DOT (ieee for fp32) and accumulate in fp32; everything else is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import FILL, LOG2E, load_tile, store_tile
from zq_lib.pasta.kernels_common import is_visible


@triton.jit
def _fold(
    acc, top, total, q, K, V, BETA, MASK, stride_k, stride_v, stride_mask, query, gain, reach, scale, start, stop, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fold the keys of [start, stop) into the online softmax. EDGE: some of them may be out of sight.

    acc [M, BLOCK_D], top, total, query, gain [M]; scale and gain carry log2(e); all pointers are those of one (b, g).
    """
    for first in range(start, stop, BLOCK_N):
        offset = tl.cast(first, tl.int64)
        key = first + tl.arange(0, BLOCK_N)
        k = load_tile(K + offset * stride_k, stride_k, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # `reach` is 0 for an unsteered program, which then reads no bias and adds an exact zero.
        scores += gain[:, None] * tl.load(BETA + key, mask=key < reach, other=0.0)[None, :]
        if EDGE:
            visible = is_visible(MASK, stride_mask, query[:, None], key[None, :], T, S, CAUSAL)
            scores = tl.where(visible, scores, FILL)
        peak = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        if EDGE:
            p = tl.where(visible, p, 0.0)  # FILL - FILL is 0, whose exponential is 1
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(p, 1)
        top = peak
        v = load_tile(V + offset * stride_v, stride_v, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        # Rounded to V's type first, so that the interpreter, whose operands are fp32, rounds where a GPU does.
        p = p.to(V.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def forward(
    Q, K, V, GATE, BETA, ROWS, MASK, SPAN, OUT, LSE,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_mb, stride_mt, stride_sb,
    H, GROUP, T, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query block); a head's blocks are neighbours, so its keys stay in the L2 cache."""
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first, the tail is short
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    first = block * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    row = first.to(tl.int64)
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    BETA += b * S
    q = load_tile(Q + b * stride_qb + h * stride_qh + row * stride_qt, stride_qt, T - first, BLOCK_M, D, BLOCK_D, True)
    q = q.to(DOT)
    gate = tl.load(GATE + bh)
    gain = tl.zeros([BLOCK_M], tl.float32) + gate * LOG2E
    if ROWS is not None:
        gain *= tl.load(ROWS + b * T + query, mask=query < T, other=0.0)
    reach = tl.where(tl.max(tl.abs(gain), 0) > 0, S, 0)
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
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    if MASK is None:
        acc, top, total = _fold(
            acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain, reach, scale,
            start, full, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, False, DOT,
        )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain, reach, scale,
        full, stop, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, True, DOT,
    )  # fmt: skip
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    out = OUT + b * stride_ob + h * stride_oh + row * stride_ot
    store_tile(out, stride_ot, T - first, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(LSE + bh.to(tl.int64) * T + query, lse, mask=query < T)


@triton.jit
def decode(
    Q, K, V, GATE, BETA, ROWS, MASK, PART, PART_LSE,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, stride_mb,
    H, GROUP, S, scale, SPLITS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, slice of keys): a group's heads are its rows, so keys are read once."""
    split = tl.program_id(0) % SPLITS
    bg = tl.program_id(0) // SPLITS
    b = (bg // (H // GROUP)).to(tl.int64)
    g = (bg % (H // GROUP)).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    here = member < GROUP
    head = b * H + g * GROUP + member  # over batch and heads
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    BETA += b * S
    q = load_tile(Q + b * stride_qb + g * GROUP * stride_qh, stride_qh, GROUP, BLOCK_M, D, BLOCK_D, True).to(DOT)
    gain = tl.load(GATE + head, mask=here, other=0.0) * LOG2E
    if ROWS is not None:
        gain *= tl.load(ROWS + b)
    reach = tl.where(tl.max(tl.abs(gain), 0) > 0, S, 0)
    share = tl.cdiv(tl.cdiv(S, BLOCK_N), SPLITS) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, S)
    full = start
    if MASK is not None:
        MASK += b * stride_mb
    else:
        full = tl.maximum(stop // BLOCK_N * BLOCK_N, start)
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    only = tl.zeros([BLOCK_M], tl.int32)  # every row of the tile is the same query
    if MASK is None:
        acc, top, total = _fold(
            acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, 0, only, gain, reach, scale, start, full, 1, S,
            D, BLOCK_D, BLOCK_N, False, False, DOT,
        )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, 0, only, gain, reach, scale, full, stop, 1, S,
        D, BLOCK_D, BLOCK_N, False, True, DOT,
    )  # fmt: skip
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    part = PART + ((b * H + g * GROUP) * SPLITS + split) * D
    store_tile(part, SPLITS * D, GROUP, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), top + tl.log2(total))
    tl.store(PART_LSE + head * SPLITS + split, lse, mask=here)


@triton.jit
def merge(
    PART, PART_LSE, OUT, LSE, SPLITS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): weigh each slice's output by its share of the softmax sum (base-2 logarithms)."""
    head = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, MOST)
    part = load_tile(PART + head * SPLITS * D, D, SPLITS, MOST, D, BLOCK_D, True)
    lse = tl.load(PART_LSE + head * SPLITS + slot, mask=slot < SPLITS, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), FILL)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    out = tl.sum(part * weight[:, None], 0) / total
    column = tl.arange(0, BLOCK_D)
    tl.store(OUT + head * D + column, out.to(OUT.dtype.element_ty), mask=column < D)
    tl.store(LSE + head, tl.where(dead, float("-inf"), (top + tl.log2(total)) / LOG2E))

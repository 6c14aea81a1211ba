"""The Triton kernels of the divergence KL(teacher || student) over a vocabulary, which store no probability.

Five running numbers describe what has been seen of a row: m_s, S_s = sum e^((s - m_s) / T), m_t, S_t likewise, and
A = sum e^((t - m_t) / T) (t - s). Where m_t rises by d, S_t and A are scaled by e^(-d / T); A holds differences t - s,
so it needs no other correction. The divergence of a row is (A / S_t - m_t + m_s) / T - log S_t + log S_s.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)  # below any logit that counts, and finite: -inf - -inf is NaN
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def kl_forward(
    S, T, ROWS, PART, V, columns, stride_s, stride_t, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per kept row and part of it of `columns` logits; PART [rows, parts, 5] fp32. `scale` is log2(e) / T.

    ROWS [rows] int64 are the kept rows, None for all. A maximum is one number for the whole block, which saves two of
    four exponentials for each logit; sums stay spread over the block until the end.
    """
    kept, part = tl.program_id(0), tl.program_id(1)
    row = kept.to(tl.int64)
    if ROWS is not None:
        row = tl.load(ROWS + kept)
    step = tl.arange(0, BLOCK)
    stop = tl.minimum(part * columns + columns, V)
    s_row, t_row = S + row * stride_s, T + row * stride_t
    top_s, top_t = tl.full([], LOWEST, tl.float32), tl.full([], LOWEST, tl.float32)
    sum_s, sum_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    for first in range(part * columns, stop, BLOCK):
        inside = first + step < stop
        s = tl.load(s_row + first + step, mask=inside, other=LOWEST).to(tl.float32)
        t = tl.load(t_row + first + step, mask=inside, other=LOWEST).to(tl.float32)
        higher_s, higher_t = tl.maximum(top_s, tl.max(s, 0)), tl.maximum(top_t, tl.max(t, 0))
        shrink = tl.exp2((top_t - higher_t) * scale)
        weight = tl.exp2((t - higher_t) * scale)
        sum_s = sum_s * tl.exp2((top_s - higher_s) * scale) + tl.exp2((s - higher_s) * scale)
        sum_t = sum_t * shrink + weight
        # A class that weighs nothing adds nothing, not even where t - s or the old sum is infinite.
        gap = tl.where(shrink > 0, gap * shrink, 0.0) + tl.where(weight == 0, 0.0, weight * (t - s))
        top_s, top_t = higher_s, higher_t
    out = PART + (kept.to(tl.int64) * tl.num_programs(1) + part) * 5
    tl.store(out, top_s)
    tl.store(out + 1, tl.sum(sum_s, 0))
    tl.store(out + 2, top_t)
    tl.store(out + 3, tl.sum(sum_t, 0))
    tl.store(out + 4, tl.sum(gap, 0))


@triton.jit
def kl_merge(
    PART, LOSS, STATS, rows, parts, scale,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The parts of BLOCK rows put together: LOSS [rows], and STATS [rows, 4] with m_s, 1 / S_s, m_t and 1 / S_t."""
    row, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    there = (row < rows)[:, None] & (part < parts)[None, :]
    at = PART + (row.to(tl.int64)[:, None] * parts + part[None, :]) * 5
    tops_s, tops_t = tl.load(at, mask=there, other=LOWEST), tl.load(at + 2, mask=there, other=LOWEST)
    top_s, top_t = tl.max(tops_s, 1), tl.max(tops_t, 1)
    shrink = tl.exp2((tops_t - top_t[:, None]) * scale)
    sum_s = tl.load(at + 1, mask=there, other=0.0) * tl.exp2((tops_s - top_s[:, None]) * scale)
    sum_t = tl.load(at + 3, mask=there, other=0.0) * shrink
    gap = tl.where(shrink > 0, tl.load(at + 4, mask=there, other=0.0) * shrink, 0.0)
    sum_s, sum_t = tl.where(row < rows, tl.sum(sum_s, 1), 1.0), tl.where(row < rows, tl.sum(sum_t, 1), 1.0)
    mean = (tl.sum(gap, 1) / sum_t + (top_s - top_t)) * scale + (tl.log2(sum_s) - tl.log2(sum_t))
    tl.store(LOSS + row, mean * LN2, mask=row < rows)
    out = STATS + row.to(tl.int64) * 4
    tl.store(out, top_s, mask=row < rows)
    tl.store(out + 1, 1 / sum_s, mask=row < rows)
    tl.store(out + 2, top_t, mask=row < rows)
    tl.store(out + 3, 1 / sum_t, mask=row < rows)


@triton.jit
def kl_backward(
    S, T, PLACE, STATS, OUTER, GRAD, V, stride_s, stride_t, stride_g, scale, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """GRAD = OUTER * factor * (softmax(s / T) - softmax(t / T)), one program per row and BLOCK of its logits.

    PLACE [N] int32 is a row's place in STATS, -1 for one that is left out: its gradient is 0, and its logits are not
    read. None for all rows. GRAD may be S.
    """
    row = tl.program_id(0).to(tl.int64)
    place = row
    if PLACE is not None:
        place = tl.load(PLACE + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.where(place >= 0, V, 0)
    stats = STATS + tl.maximum(place, 0) * 4
    s = tl.load(S + row * stride_s + column, mask=inside, other=LOWEST).to(tl.float32)
    t = tl.load(T + row * stride_t + column, mask=inside, other=LOWEST).to(tl.float32)
    q = tl.exp2((s - tl.load(stats)) * scale) * tl.load(stats + 1)
    p = tl.exp2((t - tl.load(stats + 2)) * scale) * tl.load(stats + 3)
    grad = tl.where(inside, (q - p) * (tl.load(OUTER).to(tl.float32) * factor), 0.0)
    tl.store(GRAD + row * stride_g + column, grad.to(GRAD.dtype.element_ty), mask=column < V)

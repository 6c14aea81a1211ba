"""One decode step on packed keys and values: `packed` for blocks, `exact` for the rest, `merge` for their parts.

No element is restored by itself. With x^ = codes * scale + zero + A B^T + outliers, per head and tile of tokens,

    keys     scores = (q scale) codes^T + q zero^T + (q B) A^T + sum over outliers of q[channel] delta
    values   out    = (p scale) codes   + p zero   + (p A) B^T + sum over outliers of p[token] delta

where scale and zero of keys run along channels and those of values along tokens (keys "per token" like values). Codes
enter the dot products as small whole numbers, one slice of channels at a time, so that a byte is loaded once. q B is
computed and (p A) B^T added once per segment. All keep an online softmax in base 2; operands of dot products have type
DOT (ieee for fp32), sums are fp32, and so is everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import FILL, LOG2E
from zq_lib.gear.kernels_common import code_slice, load_codes, per_unit, slice_weight

PAGE = tl.constexpr(64)  # tokens that share a list of outliers


@triton.jit
def _unit(x, DOT: tl.constexpr):
    """x [M, N] as y * size[:, None] with |y| at most 1, so that half precision neither overflows nor underflows."""
    if DOT == tl.float32:
        return x, tl.full([x.shape[0]], 1.0, tl.float32)
    else:
        size = tl.max(tl.abs(x), 1)
        size = tl.where(size > 0, size, 1.0)
        return (x / size[:, None]).to(DOT), size


@triton.jit
def _factor(base, row, inside, R: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr):
    """Rows of a factor of R columns, zero in the columns beyond. `row` int64 [N]. Returns [N, COLUMNS] of type DOT."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + row[:, None] * R + column, mask=inside[:, None] & (column < R), other=0).to(DOT)


@triton.jit
def _factor_scale(LEFT_SCALE, RIGHT_SCALE, at, R: tl.constexpr, COLUMNS: tl.constexpr):
    """What a column of int8 factors is multiplied by, [COLUMNS] fp32."""
    column = tl.arange(0, COLUMNS)
    left = tl.load(LEFT_SCALE + at * R + column, mask=column < R, other=0.0).to(tl.float32)
    return left * tl.load(RIGHT_SCALE + at * R + column, mask=column < R, other=0.0).to(tl.float32)


@triton.jit
def _entries(TOKEN, CHANNEL, DELTA, entry, end, origin, BLOCK_N: tl.constexpr, DOT: tl.constexpr):
    """Outliers: tile-local token and channel, int32, and delta, 0 for those outside the tile. [E] each"""
    here = entry < end
    token = tl.load(TOKEN + entry, mask=here, other=0).to(tl.int32) + origin
    here = here & (token >= 0) & (token < BLOCK_N)
    channel = tl.load(CHANNEL + entry, mask=here, other=0).to(tl.int32)
    delta = tl.load(DELTA + entry, mask=here, other=0.0)
    return tl.where(here, token, 0), channel, delta.to(DOT)


@triton.jit
def _key_outliers(
    scores, Q, TOKEN, CHANNEL, DELTA, START, stride_qh, first, count, here,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add q[channel] delta to the score of each outlier's token."""
    for page in range(first // PAGE, (first + count + PAGE - 1) // PAGE):
        end = tl.load(START + page + 1)
        for e in range(tl.load(START + page), end, BLOCK_E):
            entry = e + tl.arange(0, BLOCK_E)
            token, channel, delta = _entries(TOKEN, CHANNEL, DELTA, entry, end, page * PAGE - first, BLOCK_N, DOT)
            pointers = Q + (tl.arange(0, BLOCK_M) * stride_qh)[:, None] + channel[None, :]
            q = tl.load(pointers, mask=here[:, None] & (entry < end)[None, :], other=0.0).to(DOT)
            spread = tl.where(token[:, None] == tl.arange(0, BLOCK_N)[None, :], delta[:, None], 0.0)
            scores = tl.dot(q, spread.to(DOT), scores, input_precision="ieee")
    return scores


@triton.jit
def _value_outliers(
    acc, p, TOKEN, CHANNEL, DELTA, START, first, count, D: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add p[token] delta to the sum of each outlier's channel. acc holds one [M, WIDE] per slice of channels."""
    column = tl.arange(0, WIDE)
    for page in range(first // PAGE, (first + count + PAGE - 1) // PAGE):
        end = tl.load(START + page + 1)
        for e in range(tl.load(START + page), end, BLOCK_E):
            entry = e + tl.arange(0, BLOCK_E)
            token, channel, delta = _entries(TOKEN, CHANNEL, DELTA, entry, end, page * PAGE - first, BLOCK_N, DOT)
            share = tl.gather(p, tl.broadcast_to(token[None, :], [BLOCK_M, BLOCK_E]), 1).to(DOT)
            new = ()
            for s in tl.static_range(SLICES):
                spread = tl.where((channel - s * (D // SLICES))[:, None] == column[None, :], delta[:, None], 0.0)
                new = new + (tl.dot(share, spread.to(DOT), acc[s], input_precision="ieee"),)
            acc = new
    return acc


@triton.jit
def _scaled_query(q, SCALE, ZERO, D: tl.constexpr, BITS: tl.constexpr, SLICES: tl.constexpr, DOT: tl.constexpr):
    """q times the scales of a key group, slice by slice, as operands beside codes; their size; q times the zeros.

    Divided by its size, half precision neither overflows nor underflows.
    """
    column = tl.arange(0, q[0].shape[1])
    real = column < D // SLICES
    scaled = ()
    largest = tl.zeros(q[0].shape, tl.float32)
    zeros = tl.zeros(q[0].shape, tl.float32)
    for s in tl.static_range(SLICES):
        scale = tl.load(SCALE + s * (D // SLICES) + column, mask=real, other=0.0).to(tl.float32)
        zero = tl.load(ZERO + s * (D // SLICES) + column, mask=real, other=0.0).to(tl.float32)
        some = q[s] * (scale * slice_weight(s, BITS))[None, :]
        scaled = scaled + (some,)
        largest = tl.maximum(largest, tl.abs(some))
        zeros += q[s] * zero[None, :]
    if DOT == tl.float32:
        return scaled, tl.full([q[0].shape[0]], 1.0, tl.float32), tl.sum(zeros, 1)
    else:
        size = tl.max(largest, 1)
        size = tl.where(size > 0, size, 1.0)
        inverse = 1.0 / size
        unit = ()
        for s in tl.static_range(SLICES):
            unit = unit + ((scaled[s] * inverse[:, None]).to(DOT),)
        return unit, size * per_unit(DOT), tl.sum(zeros, 1)


@triton.jit
def packed(
    Q, GATE, BIAS, MASK, PART, PART_LSE,
    K_CODES, K_SCALE, K_ZERO, K_LEFT, K_RIGHT, K_LEFT_SCALE, K_RIGHT_SCALE, K_TOKEN, K_CHANNEL, K_DELTA, K_START,
    V_CODES, V_SCALE, V_ZERO, V_LEFT, V_RIGHT, V_LEFT_SCALE, V_RIGHT_SCALE, V_TOKEN, V_CHANNEL, V_DELTA, V_START,
    stride_qb, stride_qh, stride_bias, stride_mask,
    G, REP, SEGMENTS, n, length, group, tiles, k_entries, v_entries, k_heads, v_heads,
    scale, SPLITS, slots, slot,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    K_BITS: tl.constexpr, K_WIDE: tl.constexpr, K_RANK: tl.constexpr, K_SIDE: tl.constexpr, K_GROUPS: tl.constexpr,
    V_BITS: tl.constexpr, V_WIDE: tl.constexpr, V_RANK: tl.constexpr, V_SIDE: tl.constexpr, V_GROUPS: tl.constexpr,
    WHOLE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, slice of tiles): the query heads of a group are its rows.

    A tile has at most BLOCK_N tokens of one key group: `group` tokens of a segment, all of it if WHOLE. K_GROUPS is 0
    for keys with a scale per channel, else how many channel groups a token has; k_heads and v_heads are 1 where all
    heads share metadata, else G. `tiles` is how many hold the first `length` tokens. The programs of a head fill the
    slots from `slot` on of PART [B, H, slots, D] and PART_LSE [B, H, slots]. Queries and sums are tuples over the
    slices of channels (`code_slice`), of WIDE columns each.
    """
    K_SLICES: tl.constexpr = 4 if K_BITS == 3 else 8 // K_BITS
    V_SLICES: tl.constexpr = 4 if V_BITS == 3 else 8 // V_BITS
    K_W: tl.constexpr = D // K_SLICES
    V_W: tl.constexpr = D // V_SLICES
    split = tl.program_id(0) % SPLITS
    bg = tl.program_id(0) // SPLITS
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    here = member < REP
    head = b * G * REP + g * REP + member  # over batch and heads
    Q += b * stride_qb + g * REP * stride_qh
    kc = tl.arange(0, K_WIDE)
    vc = tl.arange(0, V_WIDE)
    q = ()
    for s in tl.static_range(K_SLICES):
        pointers = Q + s * K_W + (member * stride_qh)[:, None] + kc[None, :]
        q = q + (tl.load(pointers, mask=here[:, None] & (kc < K_W)[None, :], other=0.0).to(tl.float32),)
    if BIAS is not None:
        gain = tl.load(GATE + head, mask=here, other=0.0) * LOG2E
        BIAS += b * stride_bias
    if MASK is not None:
        MASK += b * stride_mask
    scale *= LOG2E
    per_group = tl.cdiv(group, BLOCK_N)
    per_segment = n // group * per_group
    share = tl.cdiv(tiles, SPLITS)
    start = split * share
    stop = tl.minimum(start + share, tiles)

    acc = ()
    for _ in tl.static_range(V_SLICES):
        acc = acc + (tl.zeros([BLOCK_M, V_WIDE], tl.float32),)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # this and the next: summed over columns once, at the end
    zeros = ()  # p times the zeros of each channel group
    for _ in tl.static_range(V_GROUPS):
        zeros = zeros + (total,)
    for segment in range(start // per_segment, tl.cdiv(stop, per_segment)):
        origin = segment * n
        of = b * SEGMENTS + segment  # over batch and segments
        at = of * G + g  # and heads
        k_at = tl.where(k_heads == G, at, of)
        v_at = tl.where(v_heads == G, at, of)
        if K_RANK > 0:
            z = tl.zeros([BLOCK_M, K_SIDE], tl.float32)
            for s in tl.static_range(K_SLICES):
                right = _factor(K_RIGHT, at * D + s * K_W + kc, kc < K_W, K_RANK, K_SIDE, DOT)
                z = tl.dot(q[s].to(DOT), right, z, input_precision="ieee")
            if K_LEFT_SCALE is not None:
                z *= _factor_scale(K_LEFT_SCALE, K_RIGHT_SCALE, at, K_RANK, K_SIDE)[None, :]
            z, z_size = _unit(z, DOT)
        if V_RANK > 0:
            w = tl.zeros([BLOCK_M, V_SIDE], tl.float32)
        if WHOLE and K_GROUPS == 0:
            q_unit, q_size, q_zero = _scaled_query(q, K_SCALE + at * D, K_ZERO + at * D, D, K_BITS, K_SLICES, DOT)
        first_tile = tl.maximum(start - segment * per_segment, 0)
        last_tile = tl.minimum(stop - segment * per_segment, per_segment)
        for tile in range(first_tile, last_tile):
            part = tile // per_group
            first = part * group + tile % per_group * BLOCK_N  # in the segment
            count = tl.minimum(tl.minimum((part + 1) * group - first, length - origin - first), BLOCK_N)
            offset = tl.arange(0, BLOCK_N)
            inside = offset < count
            token = (first + offset).to(tl.int64)

            low, high = load_codes(K_CODES + at * n * (D * K_BITS // 8), token, inside, K_BITS, D, K_WIDE)
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if K_GROUPS == 0:
                if not WHOLE:
                    meta = (at * (n // group) + part) * D
                    q_unit, q_size, q_zero = _scaled_query(q, K_SCALE + meta, K_ZERO + meta, D, K_BITS, K_SLICES, DOT)
                for s in tl.static_range(K_SLICES):
                    codes = code_slice(low, high, s, K_BITS, DOT)
                    scores = tl.dot(q_unit[s], tl.trans(codes), scores, input_precision="ieee")
                scores = scores * q_size[:, None] + q_zero[:, None]
            else:
                for s in tl.static_range(K_SLICES):
                    codes = code_slice(low, high, s, K_BITS, DOT)
                    for i in tl.static_range(s * K_GROUPS // K_SLICES, ((s + 1) * K_W - 1) * K_GROUPS // D + 1):
                        some = tl.where(((s * K_W + kc) // (D // K_GROUPS) == i)[None, :], q[s], 0.0)
                        meta = (k_at * n + token) * K_GROUPS + i
                        k_scale = tl.load(K_SCALE + meta, mask=inside, other=0.0).to(tl.float32)
                        k_zero = tl.load(K_ZERO + meta, mask=inside, other=0.0).to(tl.float32)
                        products = tl.dot(some.to(DOT), tl.trans(codes), input_precision="ieee")
                        scores += products * (k_scale * (slice_weight(s, K_BITS) * per_unit(DOT)))[None, :]
                        scores += tl.sum(some, 1)[:, None] * k_zero[None, :]
            if K_RANK > 0:
                left = _factor(K_LEFT, at * n + token, inside, K_RANK, K_SIDE, DOT)
                scores += tl.dot(z, tl.trans(left), input_precision="ieee") * z_size[:, None]
            if K_DELTA is not None:
                list_of = of * k_entries
                pages = of * (G * tl.cdiv(n, PAGE) + 1) + g * tl.cdiv(n, PAGE)
                scores = _key_outliers(
                    scores, Q, K_TOKEN + list_of, K_CHANNEL + list_of, K_DELTA + list_of, K_START + pages, stride_qh,
                    first, count, here, BLOCK_M, BLOCK_N, BLOCK_E, DOT,
                )  # fmt: skip
            scores *= scale
            column = origin + token
            if BIAS is not None:
                scores += gain[:, None] * tl.load(BIAS + column, mask=inside, other=0.0)[None, :]
            visible = inside
            if MASK is not None:
                visible = inside & (tl.load(MASK + column, mask=inside, other=0) != 0)
            scores = tl.where(visible[None, :], scores, FILL)
            peak = tl.maximum(top, tl.max(scores, 1))
            p = tl.where(visible[None, :], tl.exp2(scores - peak[:, None]), 0.0)
            shrink = tl.exp2(top - peak)
            top = peak
            total = total * shrink[:, None] + p

            low, high = load_codes(V_CODES + at * n * (D * V_BITS // 8), token, inside, V_BITS, D, V_WIDE)
            weighted, sizes, new = (), (), ()
            for i in tl.static_range(V_GROUPS):
                meta = (v_at * n + token) * V_GROUPS + i
                v_scale = tl.load(V_SCALE + meta, mask=inside, other=0.0).to(tl.float32)
                v_zero = tl.load(V_ZERO + meta, mask=inside, other=0.0).to(tl.float32)
                size = tl.max(v_scale, 0)  # divided by it, scales of 1e-4 do not push p out of half precision
                size = tl.where(size > 0, size, 1.0)
                weighted = weighted + ((p * (v_scale / size)[None, :]).to(DOT),)
                sizes = sizes + (size * per_unit(DOT),)
                new = new + (zeros[i] * shrink[:, None] + p * v_zero[None, :],)
            zeros = new
            new = ()
            for s in tl.static_range(V_SLICES):
                codes = code_slice(low, high, s, V_BITS, DOT)
                sums = acc[s] * shrink[:, None]
                for i in tl.static_range(s * V_GROUPS // V_SLICES, ((s + 1) * V_W - 1) * V_GROUPS // D + 1):
                    products = tl.dot(weighted[i], codes, input_precision="ieee") * (sizes[i] * slice_weight(s, V_BITS))
                    if D // V_GROUPS % V_W != 0:  # a slice holds channels of several groups
                        products = tl.where(((s * V_W + vc) // (D // V_GROUPS) == i)[None, :], products, 0.0)
                    sums += products
                new = new + (sums,)
            acc = new
            if V_RANK > 0:
                left = _factor(V_LEFT, at * n + token, inside, V_RANK, V_SIDE, DOT)
                w = tl.dot(p.to(DOT), left, w * shrink[:, None], input_precision="ieee")
            if V_DELTA is not None:
                list_of = of * v_entries
                pages = of * (G * tl.cdiv(n, PAGE) + 1) + g * tl.cdiv(n, PAGE)
                acc = _value_outliers(
                    acc, p, V_TOKEN + list_of, V_CHANNEL + list_of, V_DELTA + list_of, V_START + pages,
                    first, count, D, V_SLICES, BLOCK_M, BLOCK_N, BLOCK_E, V_WIDE, DOT,
                )  # fmt: skip
        if V_RANK > 0:  # (p A) B^T of this segment
            if V_LEFT_SCALE is not None:
                w *= _factor_scale(V_LEFT_SCALE, V_RIGHT_SCALE, at, V_RANK, V_SIDE)[None, :]
            w, w_size = _unit(w, DOT)
            new = ()
            for s in tl.static_range(V_SLICES):
                right = _factor(V_RIGHT, at * D + s * V_W + vc, vc < V_W, V_RANK, V_SIDE, DOT)
                new = new + (acc[s] + tl.dot(w, tl.trans(right), input_precision="ieee") * w_size[:, None],)
            acc = new
    whole = tl.sum(total, 1)
    for s in tl.static_range(V_SLICES):
        sums = acc[s]
        for i in tl.static_range(s * V_GROUPS // V_SLICES, ((s + 1) * V_W - 1) * V_GROUPS // D + 1):
            mine = (s * V_W + vc) // (D // V_GROUPS) == i
            sums += tl.where(mine[None, :], tl.sum(zeros[i], 1)[:, None], 0.0)
        _store_part(sums, whole, PART, head * slots + slot + split, here, s * V_W + vc, vc < V_W, D)
    _store_lse(top, whole, PART_LSE, head * slots + slot + split, here)


@triton.jit
def _store_part(acc, total, PART, at, here, column, inside, D):
    """Write the normalised sum of some channels; 0 where nothing was seen."""
    pointers = PART + (at * D)[:, None] + column[None, :]
    tl.store(pointers, acc / tl.where(total == 0, 1.0, total)[:, None], mask=here[:, None] & inside[None, :])


@triton.jit
def _store_lse(top, total, PART_LSE, at, here):
    """Write the natural log-sum-exp; -inf where nothing was seen."""
    lse = (top + tl.log2(tl.where(total == 0, 1.0, total))) / LOG2E
    tl.store(PART_LSE + at, tl.where(total == 0, float("-inf"), lse), mask=here)


@triton.jit
def exact(
    Q, K, V, GATE, BIAS, MASK, PART, PART_LSE,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, stride_bias, stride_mask,
    G, REP, tokens, sinks, hidden, scale, SPLITS, slots, slot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The same for exact keys and values; after `sinks` of them, columns of MASK and BIAS are `hidden` further on."""
    split = tl.program_id(0) % SPLITS
    bg = tl.program_id(0) // SPLITS
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    here = member < REP
    head = b * G * REP + g * REP + member
    channel = tl.arange(0, BLOCK_D)
    real = channel < D
    Q += b * stride_qb + g * REP * stride_qh
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    q = tl.load(Q + (member * stride_qh)[:, None] + channel[None, :], mask=here[:, None] & real[None, :], other=0.0)
    q = q.to(DOT)
    if BIAS is not None:
        gain = tl.load(GATE + head, mask=here, other=0.0) * LOG2E
        BIAS += b * stride_bias
    if MASK is not None:
        MASK += b * stride_mask
    scale *= LOG2E
    share = tl.cdiv(tl.cdiv(tokens, BLOCK_N), SPLITS) * BLOCK_N
    start = split * share
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, tl.minimum(start + share, tokens), BLOCK_N):
        token = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = token < tokens
        whole = inside[:, None] & real[None, :]
        k = tl.load(K + token[:, None] * stride_ks + channel[None, :], mask=whole, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        column = tl.where(token < sinks, token, token + hidden)
        if BIAS is not None:
            scores += gain[:, None] * tl.load(BIAS + column, mask=inside, other=0.0)[None, :]
        visible = inside
        if MASK is not None:
            visible = inside & (tl.load(MASK + column, mask=inside, other=0) != 0)
        scores = tl.where(visible[None, :], scores, FILL)
        peak = tl.maximum(top, tl.max(scores, 1))
        p = tl.where(visible[None, :], tl.exp2(scores - peak[:, None]), 0.0)
        shrink = tl.exp2(top - peak)
        top = peak
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(V + token[:, None] * stride_vs + channel[None, :], mask=whole, other=0.0).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
    _store_part(acc, total, PART, head * slots + slot + split, here, channel, real, D)
    _store_lse(top, total, PART_LSE, head * slots + slot + split, here)


@triton.jit
def merge(PART, PART_LSE, OUT, LSE, slots, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """One program per (batch, head): weigh each part by its share of the softmax sum, BLOCK_S parts at a time."""
    head = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_S], tl.float32) + FILL
    total = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, slots, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        lse = tl.load(PART_LSE + head * slots + slot, mask=slot < slots, other=float("-inf")) * LOG2E
        pointers = PART + ((head * slots + slot) * D)[:, None] + channel[None, :]
        part = tl.load(pointers, mask=(slot < slots)[:, None] & (channel < D)[None, :], other=0.0)
        peak = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - peak)  # peak is at least FILL, so -inf gives 0
        shrink = tl.exp2(top - peak)
        acc = acc * tl.max(shrink, 0) + tl.sum(part * weight[:, None], 0)  # every entry of top is the same
        total = total * shrink + weight
        top = peak
    whole = tl.sum(total, 0)
    dead = whole == 0
    whole = tl.where(dead, 1.0, whole)
    tl.store(OUT + head * D + channel, (acc / whole).to(OUT.dtype.element_ty), mask=channel < D)
    lse = (tl.max(top, 0) + tl.log2(whole)) / LOG2E
    tl.store(LSE + head, tl.where(dead, float("-inf"), lse))

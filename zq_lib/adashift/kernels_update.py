"""The Triton kernels of AdaShift: all tensors of a group in one pass, then one number per tensor (section 5.3).

TABLE [tensors, 10] int64 has a row per tensor: the addresses of parameter, gradient, step, v, age, phi_ring, exp_avg
and ring, its number of entries and that of its blocks. Everything is computed in fp32. The n slots of both rings start
as zeros, so the first n steps need no case of their own: v stays 0, and where v is 0 nothing moves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zq_lib.core.kernels_launch import INTERPRETED

CUTS_OFF = tl.constexpr(INTERPRETED)  # the interpreter drops the low bits on the way to bf16 where a GPU rounds
FIELDS = tl.constexpr(10)
REBUILD = tl.constexpr(1_000)  # steps, as in the torch path
OLDEST = tl.constexpr(32_767)  # where an age of two bytes stays
SIZE = tl.constexpr(0x7FFFFFFF)  # all bits but the sign


@triton.jit
def address(row, field: tl.constexpr, ELEMENT: tl.constexpr, start=0, ALIGNED: tl.constexpr = False):
    """The pointer that the row of a tensor holds, `start` entries on. Told that this is ALIGNED to 16 bytes, which has
    to happen where the pointer is made, the compiler loads and stores four numbers of fp32 at a time, otherwise one."""
    found = tl.load(row + field).to(tl.pointer_type(ELEMENT), bitcast=True)
    if ALIGNED:
        found = tl.multiple_of(tl.multiple_of(found, 16) + start, 16)  # the sum is none where start is 0
    else:
        found += start
    return found


@triton.jit
def take(at, inside):
    """What lies there in fp32, 0 outside."""
    if inside is None:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=inside, other=0).to(tl.float32)


@triton.jit
def nearest(x, ELEMENT: tl.constexpr):
    """fp32 in another type, rounded to nearest."""
    if CUTS_OFF and ELEMENT == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(ELEMENT)


@triton.jit
def put(at, value, inside):
    tl.store(at, nearest(value, at.dtype.element_ty), mask=inside)


@triton.jit
def second_moment(v, age, squares, beta2, rest2, log_beta2, eps):
    """The next v and age, and 1 / (sqrt(vhat) + eps), which is 0 where v is: nothing moves there. A NaN shows.

    The correction 1 - beta2^age cancels in fp32 (3e-5 off at age 1 for .999), so it is a series where beta2^age > .6.
    """
    v = beta2 * v + rest2 * squares
    alive = v != 0
    age = age + alive.to(tl.int32)
    x = age.to(tl.float32) * log_beta2
    y = tl.maximum(x, -0.5)
    far = 1 + y * (1 / 5) * (1 + y * (1 / 6) * (1 + y * (1 / 7) * (1 + y * (1 / 8))))
    series = y * (1 + y * (1 / 2) * (1 + y * (1 / 3) * (1 + y * (1 / 4) * far)))
    correction = tl.where(alive, tl.where(x > -0.5, -series, 1 - tl.exp(x)), 1.0)
    return v, age, tl.where(alive, 1 / (tl.sqrt(v / correction) + eps), 0.0)


@triton.jit
def gather(part, g, PHI: tl.constexpr):
    """What phi needs of the entries so far: the largest size as bits, in which NaN is above infinity, or the sum."""
    if PHI == "max":
        return tl.maximum(part, g.to(tl.int32, bitcast=True) & SIZE)
    else:
        return part + g * g


@triton.jit
def together(part, axis: tl.constexpr, PHI: tl.constexpr):
    """`gather`'s result along an axis as a number in fp32: the largest size or the sum of squares."""
    if PHI == "max":
        return tl.max(part, axis).to(tl.float32, bitcast=True)
    else:
        return tl.sum(part, axis)


@triton.jit
def spatial(found, entries, PHI: tl.constexpr):
    """phi of a block's squares from what `together` says of the block."""
    if PHI == "max":
        return found * found
    elif PHI == "mean":
        return found / entries.to(tl.float32)
    else:
        return found


@triton.jit
def tile(
    P, G, M, OLD, RING, V, AGE, at, inside, scale, t, n, entries, lr, factor, weight_decay, shrink, most,
    beta1, lost, newest, beta2, rest2, log_beta2, eps, COUPLED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Update the entries `at`, and return their gradient for phi, 0 outside. Without its pointer a tensor is not there.

    m gets exactly what it will lose n steps later, the rounded gradient. With MEAN (beta1 = 1) rounding errors never
    fade, so m is made anew from the ring now and then.
    """
    p = take(P + at, inside)
    g = take(G + at, inside) * factor
    if COUPLED:
        g += weight_decay * p
    if OLD is not None:
        old = take(OLD + at, inside)
        rounded = nearest(g, OLD.dtype.element_ty).to(tl.float32)
    if V is not None:
        age = take(AGE + at, inside).to(tl.int32)  # exact: fp32 holds it
        v, age, scale = second_moment(take(V + at, inside), age, old * old, beta2, rest2, log_beta2, eps)
        put(V + at, v, inside)
        if AGE.dtype.element_ty == tl.int16:
            age = tl.minimum(age, OLDEST)
        tl.store(AGE + at, age.to(AGE.dtype.element_ty), mask=inside)
    m = g
    if M is not None:
        m = take(M + at, inside)
        if MEAN:
            if t % REBUILD == 0:
                m = tl.zeros_like(m)
                for k in range(n):
                    m += take(RING + k * entries + at, inside)
                m = m / n
        m = beta1 * m - lost * old + newest * rounded
        put(M + at, m, inside)
    if OLD is not None:
        put(OLD + at, rounded, inside)
    way = m * scale
    way = tl.where(way > most, most, tl.where(way < -most, -most, way))  # a NaN passes, unlike with a minimum
    put(P + at, tl.where(scale != 0, (1 - lr * shrink) * p - lr * way, p), inside)
    return g


@triton.jit
def update(
    TABLE, WORK, PART, LR, GRAD_SCALE, FOUND, n, lr, sign, weight_decay, shrink, most, beta1, lost, newest,
    beta2, rest2, log_beta2, eps,
    ELEMENT: tl.constexpr, KEPT: tl.constexpr, COUNT: tl.constexpr, PHI: tl.constexpr, MOMENT: tl.constexpr,
    MEAN: tl.constexpr, COUPLED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of WORK [programs, 2] int32: tensor, and which CHUNK of its entries.

    v is not stored here, as other programs read it. PART [programs] fp32 gets the chunk's largest size or sum of
    squares for `finish`; None for phi = none, whose v belongs to the entries. ELEMENT, KEPT and COUNT are the types of
    parameter, ring (None: there is none) and age. Whole blocks at addresses that are multiples of 16 are loaded 16
    bytes at a time.
    """
    if FOUND is not None:
        if tl.load(FOUND) != 0:
            return
    if LR is not None:
        lr = tl.load(LR)
    factor = sign
    if GRAD_SCALE is not None:
        factor = sign / tl.load(GRAD_SCALE)
    work = WORK + tl.program_id(0) * 2
    row = TABLE + tl.load(work).to(tl.int64) * FIELDS
    start, entries = tl.load(work + 1).to(tl.int64) * CHUNK, tl.load(row + 8)
    t = tl.load(address(row, 2, tl.float32)).to(tl.int32) + 1
    slot = (t - 1) % n
    old_at = start + slot.to(tl.int64) * entries
    P, p = address(row, 0, ELEMENT, start), address(row, 0, ELEMENT, start, True)
    G, g = address(row, 1, ELEMENT, start), address(row, 1, ELEMENT, start, True)
    M, m, RING, OLD, old, V, v_at, AGE, age_at = None, None, None, None, None, None, None, None, None
    places = tl.load(row) | tl.load(row + 1)
    if MOMENT:
        M, m = address(row, 6, tl.float32, start), address(row, 6, tl.float32, start, True)
        places |= tl.load(row + 6)
    if KEPT is not None:
        RING = address(row, 7, KEPT, start)
        OLD, old = address(row, 7, KEPT, old_at), address(row, 7, KEPT, old_at, True)
        places |= tl.load(row + 7) | (old_at * (KEPT.primitive_bitwidth // 8))
    scale = 0.0
    if PHI == "none":
        V, v_at = address(row, 3, tl.float32, start), address(row, 3, tl.float32, start, True)
        AGE, age_at = address(row, 4, COUNT, start), address(row, 4, COUNT, start, True)
        places |= tl.load(row + 3) | tl.load(row + 4)
        part = tl.zeros([BLOCK], tl.float32)
    else:
        v, age = tl.load(address(row, 3, tl.float32)), tl.load(address(row, 4, COUNT))
        squares = tl.load(address(row, 5, tl.float32, slot))
        _, _, scale = second_moment(v, age, squares, beta2, rest2, log_beta2, eps)
        part = tl.zeros([BLOCK], tl.int32 if PHI == "max" else tl.float32)
    step = tl.arange(0, BLOCK)
    length = tl.minimum(entries - start, CHUNK).to(tl.int32)
    whole = tl.where(places % 16 == 0, length // BLOCK * BLOCK, 0)
    for first in range(0, whole, BLOCK):
        found = tile(
            p, g, m, old, RING, v_at, age_at, first + step, None, scale, t, n, entries, lr, factor, weight_decay,
            shrink, most, beta1, lost, newest, beta2, rest2, log_beta2, eps, COUPLED, MEAN,
        )  # fmt: skip
        part = gather(part, found, PHI)
    for first in range(whole, length, BLOCK):
        found = tile(
            P, G, M, OLD, RING, V, AGE, first + step, first + step < length, scale, t, n, entries, lr, factor,
            weight_decay, shrink, most, beta1, lost, newest, beta2, rest2, log_beta2, eps, COUPLED, MEAN,
        )  # fmt: skip
        part = gather(part, found, PHI)
    if PART is not None:
        tl.store(PART + tl.program_id(0), together(part, 0, PHI))


@triton.jit
def update_rows(
    TABLE, WORK, LR, GRAD_SCALE, FOUND, n, lr, sign, weight_decay, shrink, most, beta1, lost, newest,
    beta2, rest2, log_beta2, eps,
    ELEMENT: tl.constexpr, KEPT: tl.constexpr, PHI: tl.constexpr, MOMENT: tl.constexpr, MEAN: tl.constexpr,
    COUPLED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of WORK [programs, 2] int32: tensor, and which BLOCK_R of its rows, which are its blocks.

    A row belongs to one program, so v, age and phi_ring are complete here. ALIGNED: every address and every row is a
    multiple of 16 long.
    """
    if FOUND is not None:
        if tl.load(FOUND) != 0:
            return
    if LR is not None:
        lr = tl.load(LR)
    factor = sign
    if GRAD_SCALE is not None:
        factor = sign / tl.load(GRAD_SCALE)
    work = WORK + tl.program_id(0) * 2
    row = TABLE + tl.load(work).to(tl.int64) * FIELDS
    entries, rows = tl.load(row + 8), tl.load(row + 9)
    width = (entries // rows).to(tl.int32)
    t = tl.load(address(row, 2, tl.float32)).to(tl.int32) + 1
    slot = ((t - 1) % n).to(tl.int64)
    P, G = address(row, 0, ELEMENT, 0, ALIGNED), address(row, 1, ELEMENT, 0, ALIGNED)
    M, RING, OLD = None, None, None
    if MOMENT:
        M = address(row, 6, tl.float32, 0, ALIGNED)
    if KEPT is not None:
        RING, OLD = address(row, 7, KEPT, 0, ALIGNED), address(row, 7, KEPT, slot * entries, ALIGNED)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    block = tl.load(work + 1) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = block < rows
    v_at, age_at = address(row, 3, tl.float32) + block, address(row, 4, tl.int32) + block
    squares_at = address(row, 5, tl.float32) + slot * rows + block
    v, age = tl.load(v_at, mask=there, other=0.0), tl.load(age_at, mask=there, other=0)
    squares = tl.load(squares_at, mask=there, other=0.0)
    v, age, scale = second_moment(v, age, squares, beta2, rest2, log_beta2, eps)
    part = tl.zeros([BLOCK_R, BLOCK], tl.int32 if PHI == "max" else tl.float32)
    start = block.to(tl.int64)[:, None] * width
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        found = tile(
            P, G, M, OLD, RING, None, None, start + column, there[:, None] & (column < width), scale[:, None], t, n,
            entries, lr, factor, weight_decay, shrink, most, beta1, lost, newest, beta2, rest2, log_beta2, eps,
            COUPLED, MEAN,
        )  # fmt: skip
        part = gather(part, found, PHI)
    tl.store(v_at, v, mask=there)
    tl.store(age_at, age, mask=there)
    tl.store(squares_at, spatial(together(part, 1, PHI), width, PHI), mask=there)


@triton.jit
def finish(
    TABLE, FIRST, PART, FOUND, n, beta2, rest2, log_beta2, eps, PHI: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tensor: its parts put together in order, v and age as `update` used them, and the step counted.

    FIRST [tensors + 1] int32 holds each tensor's first program of `update`; None, or no program, where v is complete.
    """
    if FOUND is not None:
        if tl.load(FOUND) != 0:
            return
    tensor = tl.program_id(0)
    row = TABLE + tensor.to(tl.int64) * FIELDS
    step_at = address(row, 2, tl.float32)
    step = tl.load(step_at)
    if FIRST is not None:
        begin, end = tl.load(FIRST + tensor), tl.load(FIRST + tensor + 1)
        if begin < end:
            at = begin + tl.arange(0, BLOCK)
            part = tl.zeros([BLOCK], tl.int32 if PHI == "max" else tl.float32)
            for first in range(0, end - begin, BLOCK):
                found = tl.load(PART + at + first, mask=at + first < end, other=0.0)
                if PHI == "max":
                    part = tl.maximum(part, found.to(tl.int32, bitcast=True))
                else:
                    part += found
            v_at, age_at = address(row, 3, tl.float32), address(row, 4, tl.int32)
            squares_at = address(row, 5, tl.float32) + step.to(tl.int32) % n
            v, age = tl.load(v_at), tl.load(age_at)
            v, age, _ = second_moment(v, age, tl.load(squares_at), beta2, rest2, log_beta2, eps)
            tl.store(v_at, v)
            tl.store(age_at, age)
            tl.store(squares_at, spatial(together(part, 0, PHI), tl.load(row + 8), PHI))
    tl.store(step_at, step + 1)

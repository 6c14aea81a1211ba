"""The Triton kernels of importance: all adapters in one launch, then the scores of their triplets in a second."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update_importance(
    WORK, GRADS, WEIGHTS, SENSITIVITY, UNCERTAINTY, PART, beta1, rest1, beta2, rest2, R,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, SMOOTH_ONLY: tl.constexpr,
):  # fmt: skip
    """One program per row of WORK: (tensor, where it starts in the flat buffers, first vector entry, vector entries,
    stride of the entries, stride of the triplets). P, Q and l are all walked as [entries, R].

    GRADS holds the addresses of the gradients, 0 for none. Updates I-bar and U-bar (equations 8 to 10) in place and
    writes the column sums of the tile's scores to PART[program, R]; no atomics, so runs repeat bit for bit.
    """
    work = WORK + tl.program_id(0) * 6
    tensor, start = tl.load(work), tl.load(work + 1)
    first, entries = tl.load(work + 2), tl.load(work + 3)
    entry = first + tl.arange(0, BLOCK)
    rank = tl.arange(0, BLOCK_R)
    place = entry[:, None] * tl.load(work + 4) + rank[None, :] * tl.load(work + 5)
    inside = (entry < entries)[:, None] & (rank < R)[None, :]
    address = tl.load(GRADS + tensor)
    grad_at = address.to(tl.pointer_type(tl.float32), bitcast=True) + place
    held = (entry < tl.where(address != 0, entries, 0))[:, None] & (rank < R)[None, :]
    grad = tl.load(grad_at, mask=held, other=0.0)
    weight = tl.load(WEIGHTS + start + place, mask=inside, other=0.0)
    smooth = tl.load(SENSITIVITY + start + place, mask=inside, other=0.0)
    spread = tl.load(UNCERTAINTY + start + place, mask=inside, other=0.0)
    raw = tl.abs(weight * grad)
    smooth = beta1 * smooth + rest1 * raw
    spread = beta2 * spread + rest2 * tl.abs(raw - smooth)
    tl.store(SENSITIVITY + start + place, smooth, mask=inside)
    tl.store(UNCERTAINTY + start + place, spread, mask=inside)
    score = smooth if SMOOTH_ONLY else smooth * spread
    part = tl.sum(tl.where(inside, score, 0.0), 0)
    tl.store(PART + tl.program_id(0).to(tl.int64) * R + rank, part, mask=rank < R)


@triton.jit
def add_scores(PART, FIRST, LENGTH, SCORES, R, BLOCK_R: tl.constexpr):
    """S of one matrix [R] (equation 7): for its P, l and Q, the partial sums in order, over the length of a vector.

    FIRST [3n + 1] holds each tensor's first program, LENGTH [3n] fp32 the entries of its vectors.
    """
    rank = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R], tl.float32)
    for part in range(3):
        tensor = tl.program_id(0) * 3 + part
        mean = tl.zeros([BLOCK_R], tl.float32)
        for program in range(tl.load(FIRST + tensor), tl.load(FIRST + tensor + 1)):
            mean += tl.load(PART + program * R + rank, mask=rank < R, other=0.0)
        total += mean / tl.load(LENGTH + tensor)
    tl.store(SCORES + tl.program_id(0).to(tl.int64) * R + rank, total, mask=rank < R)

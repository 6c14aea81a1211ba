"""The Triton kernels of a mask step: the importance of every row of all matrices, and zeroing rows.

Both walk a table WORK [programs, 2] int64 of (matrix, its first row) and read MATRICES [n, 3] int64 of (rows N, width
K, place of the matrix in the buffers of one number per row). Addresses come from tables too: one launch for a model.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update_rows(
    WORK, MATRICES, SPARSE, GRADS, WINDOW, AVERAGE, beta, rest, position,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ELEMENT: tl.constexpr, EVERY_STEP: tl.constexpr,
):  # fmt: skip
    """I = mean over a row of |S * grad|, then its running averages, in place; a program has BLOCK rows.

    SPARSE and GRADS hold addresses of contiguous [N, K] of type ELEMENT, a gradient's may be 0 for none. `position` is
    the step within the window. EVERY_STEP: AVERAGE follows each step, and WINDOW is neither read nor written.
    """
    work = WORK + tl.program_id(0) * 2
    matrix = tl.load(work)
    row = tl.load(work + 1) + tl.arange(0, BLOCK)
    rows, width = tl.load(MATRICES + matrix * 3), tl.load(MATRICES + matrix * 3 + 1)
    column = tl.arange(0, BLOCK_K)
    address = tl.load(GRADS + matrix)
    at = row[:, None] * width + column[None, :]
    sparse = tl.load(SPARSE + matrix).to(tl.pointer_type(ELEMENT), bitcast=True) + at
    grad = address.to(tl.pointer_type(ELEMENT), bitcast=True) + at
    held = (row < tl.where(address != 0, rows, 0))[:, None]
    total = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for first in range(0, width, BLOCK_K):
        inside = held & (first + column < width)[None, :]
        s = tl.load(sparse + first, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + first, mask=inside, other=0.0).to(tl.float32)
        total += tl.abs(s * g)
    raw = tl.sum(total, 1) / width.to(tl.float32)
    slot = tl.load(MATRICES + matrix * 3 + 2) + row
    average = tl.load(AVERAGE + slot, mask=row < rows, other=0.0)
    if EVERY_STEP:
        tl.store(AVERAGE + slot, beta * average + rest * raw, mask=row < rows)
    else:
        window = tl.load(WINDOW + slot, mask=row < rows, other=0.0)
        opens = position == 0  # the window that has just closed enters the average, and a new one begins
        tl.store(AVERAGE + slot, tl.where(opens, beta * average + rest * window, average), mask=row < rows)
        mean = (window * position + raw) / (position + 1.0)
        tl.store(WINDOW + slot, tl.where(opens, raw, mean), mask=row < rows)


@triton.jit
def zero_rows(
    WORK, MATRICES, SPARSE, KEEP, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ELEMENT: tl.constexpr
):  # fmt: skip
    """Write zeros over the rows whose KEEP, one int8 per row of all matrices, is 0; nothing else is touched."""
    work = WORK + tl.program_id(0) * 2
    matrix = tl.load(work)
    row = tl.load(work + 1) + tl.arange(0, BLOCK)
    rows, width = tl.load(MATRICES + matrix * 3), tl.load(MATRICES + matrix * 3 + 1)
    slot = tl.load(MATRICES + matrix * 3 + 2) + row
    dropped = (tl.load(KEEP + slot, mask=row < rows, other=1) == 0)[:, None]
    column = tl.arange(0, BLOCK_K)
    at = tl.load(SPARSE + matrix).to(tl.pointer_type(ELEMENT), bitcast=True) + row[:, None] * width + column[None, :]
    zero = tl.zeros([BLOCK, BLOCK_K], ELEMENT)
    for first in range(0, width, BLOCK_K):
        tl.store(at + first, zero, mask=dropped & (first + column < width)[None, :])

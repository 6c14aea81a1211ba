"""What MASFormer's forward and backward kernels share: where a tile's keys begin and end, and the launch table.

All bounds are indices on the key axis; query t stands at index S - T + t. A text of the batch fills [first, last); its
place in the text is index - first + gap, where `gap` keys behind the sinks have been dropped by a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zq_lib.core.kernels_launch import INTERPRETED, Settings, look_up

# No row has been timed on a GPU: each is the largest tile tried that spills no register on sm_80, sm_90 and gfx942,
# starting from PASTA's. A window of w keys costs a tile w + m of them, so "narrow" windows take fewer rows at a time.
# "few" is for decoding. Two stages for "keys" of width 128 spill 8 bytes a thread on sm_80, as do 32 rows for "sinks".
LAUNCH: dict[tuple[str, bool, int], Settings] = {
    ("forward", True, 64): Settings(128, 64, 8, 3),
    ("forward", True, 128): Settings(128, 32, 8, 3),
    ("forward", True, 256): Settings(64, 16, 8, 2),
    ("forward", False, 64): Settings(32, 32, 4, 2),
    ("forward", False, 256): Settings(16, 16, 4, 1),
    ("narrow", True, 128): Settings(64, 32, 4, 3),
    ("narrow", True, 256): Settings(32, 16, 4, 2),
    ("narrow", False, 256): Settings(16, 16, 4, 1),
    ("few", True, 128): Settings(16, 64, 4, 3),
    ("few", True, 256): Settings(16, 32, 4, 2),
    ("few", False, 256): Settings(16, 16, 4, 1),
    ("queries", True, 64): Settings(128, 32, 8, 2),
    ("queries", True, 128): Settings(64, 32, 8, 2),
    ("queries", True, 256): Settings(32, 16, 8, 1),
    ("queries", False, 64): Settings(32, 16, 4, 2),
    ("queries", False, 256): Settings(16, 16, 4, 2),
    ("keys", True, 64): Settings(16, 128, 8, 2),
    ("keys", True, 128): Settings(16, 64, 8, 1),
    ("keys", True, 256): Settings(16, 32, 8, 1),
    ("keys", False, 256): Settings(16, 16, 4, 1),
    ("sinks", True, 64): Settings(32, 16, 4, 2),
    ("sinks", True, 128): Settings(16, 16, 4, 2),
    ("sinks", True, 256): Settings(16, 16, 4, 1),
    ("sinks", False, 256): Settings(16, 16, 4, 1),
}
TOY = Settings(16, 16, 4, 1)  # in the interpreter a program costs about 3 ms whatever its size
NARROW, FEW = 256, 16
WINDOW, BLOCK, TWO_BLOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KIND_NUMBERS = {"window": 0, "block": 1, "two_block": 2}


def settings(kernel: str, dtype: torch.dtype, width: int) -> Settings:
    """The launch settings of `kernel`, a name in LAUNCH, for tensors of `dtype` and heads of `width`."""
    return TOY if INTERPRETED else look_up(LAUNCH, kernel, dtype, width)


@triton.jit
def read_text(TEXT, b, S):
    """first, last, gap of row b; without TEXT it is the whole key axis."""
    if TEXT is not None:
        return tl.load(TEXT + 3 * b), tl.load(TEXT + 3 * b + 1), tl.load(TEXT + 3 * b + 2)
    else:
        return 0, S, 0


@triton.jit
def lowest(query, span, shift, KIND: tl.constexpr):
    """The first key that a query sees, besides sinks. `shift` is gap - first."""
    if KIND == WINDOW:
        return query - span + 1
    elif KIND == BLOCK:
        return (query + shift) // span * span - shift
    else:
        return ((query + shift) // span - 1) * span - shift


@triton.jit
def highest(key, span, shift, KIND: tl.constexpr):
    """The last query that sees a key other than as a sink."""
    if KIND == WINDOW:
        return key + span - 1
    elif KIND == BLOCK:
        return ((key + shift) // span + 1) * span - shift - 1
    else:
        return ((key + shift) // span + 2) * span - shift - 1


@triton.jit
def key_range(here, stop, span, shift, first, last, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    """Keys for queries [here, stop): from `start` to `end` masked but for [full, edge), which all of them see whole.

    `start`, `full` and `edge` are multiples of BLOCK_N unless nothing follows them.
    """
    start = tl.maximum(lowest(here, span, shift, KIND), first) // BLOCK_N * BLOCK_N
    end = tl.minimum(stop, last)
    full = tl.cdiv(tl.maximum(lowest(stop - 1, span, shift, KIND), first), BLOCK_N) * BLOCK_N
    full = tl.maximum(tl.minimum(full, end), start)
    edge = tl.maximum(tl.minimum(here + 1, last) // BLOCK_N * BLOCK_N, full)
    return start, full, edge, end

"""What the forward and the backward kernels of PASTA share: visibility, and the launch table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zq_lib.core.kernels_launch import INTERPRETED, Settings, look_up

# Keys: (kernel, half precision?, head width up to). No row has been timed on a GPU yet: each is the largest tile tried
# that spills no register on sm_80, sm_90 and gfx942 (bench/results/aot.csv), starting from the usual 128 x 64.
# - half, width 128: 64 keys instead of 32 spill 144 bytes a thread on gfx942;
# - "keys" holds two fp32 sums of width D per key: 32 queries instead of 16 spill on all three at width 128;
# - fp32 in ieee precision has no tensor cores, its products unroll into registers, hence the small tiles;
# - one stage where the tile alone is near the limit; two or three hide the loads otherwise.
LAUNCH: dict[tuple[str, bool, int], Settings] = {
    ("forward", True, 64): Settings(128, 64, 8, 3),
    ("forward", True, 128): Settings(128, 32, 8, 3),
    ("forward", True, 256): Settings(64, 16, 8, 2),
    ("forward", False, 64): Settings(32, 32, 4, 2),
    ("forward", False, 256): Settings(16, 16, 4, 1),
    ("decode", True, 128): Settings(1, 64, 4, 3),
    ("decode", True, 256): Settings(1, 32, 4, 2),
    ("decode", False, 128): Settings(1, 16, 4, 2),
    ("decode", False, 256): Settings(1, 16, 4, 1),
    ("queries", True, 64): Settings(128, 32, 8, 2),
    ("queries", True, 128): Settings(64, 32, 8, 2),
    ("queries", True, 256): Settings(32, 16, 8, 1),
    ("queries", False, 64): Settings(32, 16, 4, 2),
    ("queries", False, 256): Settings(16, 16, 4, 2),
    ("keys", True, 64): Settings(16, 128, 8, 2),
    ("keys", True, 128): Settings(16, 64, 8, 2),
    ("keys", True, 256): Settings(16, 32, 8, 1),
    ("keys", False, 64): Settings(16, 32, 4, 1),
    ("keys", False, 256): Settings(16, 16, 4, 1),
}
# In the interpreter a program costs about 3 ms whatever its size; small tiles keep several blocks in a toy example.
TOY = Settings(16, 16, 4, 1)
MERGE = Settings(1, 1, 4, 1)  # one row of at most 32 partial rows: 32 fp32 values a thread at width 128


def settings(kernel: str, dtype: torch.dtype, width: int) -> Settings:
    """The launch settings of `kernel` ("forward", "decode", "queries", "keys") for tensors of `dtype`, head `width`."""
    return TOY if INTERPRETED else look_up(LAUNCH, kernel, dtype, width)


def spans(mask: Tensor, dim: int, block: int) -> Tensor:
    """For every block of `dim` (2 queries, 3 keys), the range along the other dimension that holds all it can see.

    `mask` [B or 1, 1, T, S] bool. Returns [B or 1, blocks, 2] int32: first, one past the last; (0, 0) if there is none.
    A window or a padded prompt thus costs what it shows and not T times S.
    """
    seen = mask[:, 0] if dim == 2 else mask[:, 0].transpose(1, 2)  # [B or 1, this, other]
    short = -seen.shape[1] % block
    seen = torch.nn.functional.pad(seen, (0, 0, 0, short)).unflatten(1, (-1, block)).any(2).to(torch.int32)
    first, back = seen.argmax(-1), seen.flip(-1).argmax(-1)
    last = torch.where(seen.any(-1), seen.shape[-1] - back, 0)
    return torch.stack([first, last], -1).to(torch.int32).contiguous()


@triton.jit
def is_visible(MASK, stride_mask, query, key, T, S, CAUSAL: tl.constexpr):
    """Whether each query sees each key; `query` and `key` broadcast against each other. A given mask decides alone."""
    if MASK is not None:
        inside = (query < T) & (key < S)
        return tl.load(MASK + query.to(tl.int64) * stride_mask + key, mask=inside, other=0) != 0
    elif CAUSAL:
        return (key <= query + (S - T)) & (key < S)
    else:
        return (key < S) & (query >= 0)  # the second part only gives it the tile's shape

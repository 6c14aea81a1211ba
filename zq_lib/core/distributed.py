"""What trains in several processes at once has to agree on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over all processes, in place, the same bits in each of them."""
    if processes() > 1:
        dist.all_reduce(values)
        values /= processes()
    return values

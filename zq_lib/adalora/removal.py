"""Cut dropped triplets out of the parameters and out of the optimiser's state while training goes on (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from zq_lib.adalora.adapter import Triplets
from zq_lib.core.surgery import cut_parameters


def shrink(adapters: Sequence[Triplets], keep: Tensor, optimizer: Optimizer | None) -> None:
    """Keep the triplets of `keep` [n, R] bool. The Parameter objects stay the same; raises as `cut_parameters` does."""
    cuts: list[tuple[nn.Parameter, Tensor, int]] = []
    for adapter, row in zip(adapters, keep, strict=True):
        index = row.nonzero()[:, 0].to(adapter.values.device)
        cuts += [(adapter.left, index, 1), (adapter.values, index, 0), (adapter.right, index, 0)]
    cut_parameters(cuts, optimizer)

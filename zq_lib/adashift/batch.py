"""What one step works on: the tensors of one device and dtype, and the settings of their group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from zq_lib.adashift.spatial import Phi


class Slot(NamedTuple):
    """One parameter with its gradient and state; what a setting does not need is None."""

    param: Tensor
    grad: Tensor
    step: Tensor  # [], float32: steps before this one
    v: Tensor  # one number per block
    age: Tensor  # integers, as v
    phi_ring: Tensor | None  # [n, *blocks]; None for phi = none
    exp_avg: Tensor | None  # as the parameter; None for beta1 = 0
    ring: Tensor | None  # [n, *shape]; None for beta1 = 0, unless phi = none reads its squares


class Batch(NamedTuple):
    """The slots of many parameters, a list for each field, in one order."""

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    vs: list[Tensor]
    ages: list[Tensor]
    phi_rings: list[Tensor] | None
    exp_avgs: list[Tensor] | None
    rings: list[Tensor] | None

    def slots(self) -> Iterator[Slot]:
        """One parameter after the other."""
        nothing = [None] * len(self.params)
        yield from map(Slot, *(nothing if field is None else field for field in self))

    @classmethod
    def of(cls, slots: list[Slot]) -> Batch:
        """The inverse of `slots`, for at least one."""
        return cls(*(None if column[0] is None else list(column) for column in zip(*slots, strict=True)))


@dataclass(frozen=True)
class Settings:
    """A group's settings at one step. `lr` is a tensor only where it is read on the device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    n: int
    phi: str | Phi
    block: str
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    max_step: float | None

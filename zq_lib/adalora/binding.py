"""Tie a schedule to the optimiser that trains certain parameters, whichever that will be, so it cannot be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Binding:
    """Calls `before` and `after` at every step of the optimiser that holds `own`; `optimizer` is None until its first.

    A step that mixed precision skips calls neither. Raises ValueError, at the optimiser's step, for one that was made
    before there were adapters (it holds some of `frozen` and none of `own`), for one that holds only some of `own`, and
    for a second one that holds them.
    """

    def __init__(
        self,
        own: Sequence[nn.Parameter],
        frozen: AbstractSet[nn.Parameter],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self.own, self.frozen, self.before, self.after = own, frozen, before, after
        self.optimizer: Optimizer | None = None
        self._others: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # those not ours, and their size
        self._hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._call(self.before, optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._call(self.after, optimizer)),
        ]

    def remove(self) -> None:
        """Follow no optimiser any more. Safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _call(self, what: Callable[[], None], optimizer: Optimizer) -> None:
        if self._owns(optimizer):
            what()

    def _owns(self, optimizer: Optimizer) -> bool:
        if optimizer is self.optimizer:
            return True
        held: set[Any] = {p for group in optimizer.param_groups for p in group["params"]}
        if self._others.get(optimizer) == len(held):
            return False
        own = [p for p in self.own if p.requires_grad]
        count = sum(p in held for p in own)
        if count == 0:
            if self.frozen & held:
                raise ValueError(
                    "this optimiser holds the model's frozen weights and none of the adapters; make it after attach, "
                    "from handle.parameters()"
                )
            self._others[optimizer] = len(held)
            return False
        if count < len(own):
            raise ValueError(
                f"this optimiser holds {count} of the {len(own)} tensors of the adapters; give it handle.parameters()"
            )
        if self.optimizer is not None:
            raise ValueError("a second optimiser trains the same adapters; use one, or attach anew for the second")
        self.optimizer = optimizer
        return True

"""Tie a schedule to the optimiser that trains certain parameters, whichever that will be, so it cannot be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


@dataclass(frozen=True)
class Words:
    """What a method calls its parameters, the others, and where an optimiser gets all it needs."""

    own: str
    others: str
    source: str


class Binding:
    """Calls `before` and `after` at every step of the optimiser that holds `own`; `optimizer` is None until its first.

    A step that mixed precision skips calls neither. Raises ValueError, at the optimiser's step, for one that was made
    before there were any of `own` (it holds some of `others` and none of `own`), for one that holds only some of `own`,
    and for a second one that holds them.
    """

    def __init__(
        self,
        own: Sequence[nn.Parameter],
        others: Container[nn.Parameter],
        before: Callable[[], None],
        after: Callable[[], None],
        words: Words,
    ) -> None:
        self.own, self.others, self.before, self.after, self.words = own, others, before, after, words
        self.optimizer: Optimizer | None = None
        self._strangers: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # those not ours, and their size
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
        if self._strangers.get(optimizer) == len(held):
            return False
        own = [p for p in self.own if p.requires_grad]
        count, words = sum(p in held for p in own), self.words
        if count == 0:
            if any(p in self.others for p in held):
                raise ValueError(
                    f"this optimiser holds {words.others} and none of {words.own}; make it after attach, from "
                    f"{words.source}"
                )
            self._strangers[optimizer] = len(held)
            return False
        if count < len(own):
            raise ValueError(
                f"this optimiser holds {count} of the {len(own)} tensors of {words.own}; give it {words.source}"
            )
        if self.optimizer is not None:
            raise ValueError(
                f"a second optimiser trains the same {words.own.removeprefix('the ')}; use one, or attach "
                "anew for the second"
            )
        self.optimizer = optimizer
        return True

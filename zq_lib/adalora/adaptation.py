"""Attach AdaLoRA to a model: `attach`, then an ordinary training loop; `report`, `merge`, `finish`, `detach`.

The schedule runs in hooks of the optimiser's own `step`, so a plain loop needs no extra call and cannot forget one:
before the step the penalty's gradient is added, after it importance is updated and ranks are shared out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zq_lib.adalora import checkpoint, orthogonality
from zq_lib.adalora.adapter import Adapted, Triplets, kind_of
from zq_lib.adalora.allocation import allocate
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.adalora.importance import Importance
from zq_lib.adalora.removal import shrink
from zq_lib.adalora.schedule import Schedule
from zq_lib.adalora.targets import find_targets, find_trained, places_of
from zq_lib.adalora.trace import RankTrace
from zq_lib.core.binding import Binding, Words
from zq_lib.core.distributed import average_over_processes, processes
from zq_lib.core.targets import per_matrix

WORDS = Words("the adapters", "the model's frozen weights", "handle.parameters()")


@dataclass(frozen=True)
class AdaptationReport:
    """What an adaptation has done so far.

    `phase` is "warm-up", "budget", "final" or "no pruning"; `ranks` maps each layer to its rank; `budget` is b(t) of
    the last step in the config's unit. `finished` says that the ranks are final. Parameters count the adapters alone.
    """

    name: str
    step: int
    total_steps: int
    phase: str
    budget: int
    active: int
    ranks: dict[str, int]
    parameters_at_start: int
    parameters: int
    penalty: float
    allocations: int
    finished: bool


def attach(
    model: nn.Module, config: AdaLoraConfig | None = None, *, name: str = "default", **settings: Any
) -> Adaptation:
    """Put adapters into `model`, freeze the rest of it, and tie the rank schedule to whatever optimiser trains them.

    Args: `config`, or its fields as keywords (`attach(model, init_rank=8)`); `name`, if a model is to have several
    adapters: those attached before stay in the forward pass and are frozen. Returns a handle that is also a context
    manager; `detach()` leaves no trace. Raises ValueError, with the model as it was, for targets that match nothing.

    >>> handle = adalora.attach(model, total_steps=1000)
    >>> optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, weight_decay=0)
    >>> for batch in batches:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    """
    if config is None:
        config = AdaLoraConfig(**settings)
    elif settings:
        config = replace(config, **settings)
    return Adaptation(model, config, name)


class Adaptation:
    """The handle that `attach` returns. Bounds, scores and masks follow the order of `triplets`."""

    def __init__(self, model: nn.Module, config: AdaLoraConfig, name: str = "default") -> None:
        if not name.isidentifier():
            raise ValueError(f"name={name!r} must be a word such as 'default', for it becomes part of parameter names")
        self.model, self.config, self.name = model, config, name
        layers = find_targets(model, config.targets)
        trained = find_trained(model, config.train_also)
        existing = {m.base: m for m in model.modules() if isinstance(m, Adapted)}
        if any(name in wrapper.adapters for wrapper in existing.values()):
            raise ValueError(f"name={name!r} is attached to this model already; detach it or choose another name")
        self._bounds = (
            per_matrix("min_rank", config.min_rank, layers, 0, "adapted"),
            per_matrix("max_rank", config.max_rank, layers, config.init_rank, "adapted"),
        )
        self._places = places_of(model, set(layers.values()))
        self._frozen = {p: p.requires_grad for p in model.parameters()}
        for p in self._frozen:
            p.requires_grad_(False)
        self.layers: dict[str, Adapted] = {}
        self.triplets: dict[str, Triplets] = {}
        for path, layer in layers.items():
            wrapper = existing.get(layer) or self._wrap(layer)
            size = wrapper.size(layer)
            triplets = Triplets(*size, config.init_rank, config.scale, layer.weight, config.init_std, config.dropout)
            triplets.train(layer.training)
            wrapper.adapters[name] = triplets
            wrapper.backend = config.backend
            self.layers[path], self.triplets[path] = wrapper, triplets
        self.trained = trained
        for module in trained.values():
            module.requires_grad_(True)
        self.adapters = list(self.triplets.values())
        self.costs = torch.tensor([a.cost for a in self.adapters])
        self.importance: Importance | None = None
        self.keep = torch.ones(len(self.adapters), config.init_rank, dtype=torch.bool)
        self.trace = RankTrace(tuple(self.triplets))
        self.step = 0
        self.finished = False  # whether the ranks are final
        self.shrunk = False  # whether dropped triplets are gone from the parameters
        self.parameters_at_start = self.parameter_count()
        self._schedule: Schedule | None = None
        self._grad_masks: list[Any] = []
        trained_in_full = {p for module in trained.values() for p in module.parameters()}
        self._binding = Binding(
            [p for a in self.adapters for p in (a.left, a.values, a.right)],
            self._frozen.keys() - trained_in_full,
            self._before_step,
            self._after_step,
            WORDS,
        )
        try:
            self.importance = Importance(self.adapters, config.score, config.beta1, config.beta2, config.backend)
            if config.total_steps is not None:
                self.set_total_steps(config.total_steps)
        except (TypeError, ValueError):
            self.detach()
            raise

    # --- building and undoing ------------------------------------------------------------------------------------
    def _wrap(self, layer: nn.Module) -> Adapted:
        wrapper = kind_of(layer)(layer)
        wrapper.train(layer.training)
        for parent, child in self._places[layer]:
            setattr(parent, child, wrapper)
        return wrapper

    def detach(self) -> None:
        """Take this adapter out of the model, which is then as before `attach`. Safe to call twice."""
        self._binding.remove()
        for wrapper in self.layers.values():
            wrapper.unmerge()
            if self.name in wrapper.adapters:
                del wrapper.adapters[self.name]
            if not wrapper.adapters:
                for parent, child in self._places[wrapper.base]:
                    setattr(parent, child, wrapper.base)
        for p, flag in self._frozen.items():
            p.requires_grad_(flag)
        self._frozen = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.step and not self.finished:
            warnings.warn(
                f"training stopped after step {self.step} of {self.schedule.total}, before the ranks were final; give "
                "total_steps the steps you take, or call finish()",
                stacklevel=2,
            )
        self.detach()

    def parameters(self) -> list[nn.Parameter]:
        """What to hand to the optimiser: P, l and Q of every layer and the modules of `train_also`.

        Use weight_decay=0: decay would pull l, P and Q to zero whatever the data say.
        """
        own = [p for a in self.adapters for p in (a.left, a.values, a.right) if p.requires_grad]
        return own + [p for module in self.trained.values() for p in module.parameters()]

    def parameter_count(self) -> int:
        """Numbers in the adapters as they are now."""
        return sum(p.numel() for a in self.adapters for p in (a.left, a.values, a.right))

    # --- the schedule --------------------------------------------------------------------------------------------
    @property
    def schedule(self) -> Schedule:
        """The budget over time. Raises ValueError while the number of steps is unknown."""
        if self._schedule is None:
            raise ValueError(
                "total_steps=None: give attach the number of optimiser steps of the training, or use AdaLoraCallback"
            )
        return self._schedule

    def set_total_steps(self, total: int) -> None:
        """Fix the number of optimiser steps, if the config left it open. Raises ValueError once training has begun."""
        if self.step and total != self.schedule.total:
            raise ValueError(f"total_steps={total} comes after step {self.step} of {self.schedule.total}; set it first")
        cost = int(self.costs.sum()) if self.config.budget_unit == "parameters" else len(self.adapters)
        schedule = self.config.schedule(cost, total)
        least = self._bounds[0]
        needed = int((least * self.costs).sum() if self.config.budget_unit == "parameters" else least.sum())
        if needed > schedule.target:
            raise ValueError(
                f"min_rank={self.config.min_rank!r} needs {needed} {self.config.budget_unit}, but the final budget is "
                f"{schedule.target}; raise the budget or lower min_rank"
            )
        if not schedule.prunes:
            warnings.warn(
                f"the final budget {schedule.target} is not below the initial {schedule.start}, so no rank will be "
                "pruned: this trains a LoRA in SVD form",
                stacklevel=4,
            )
        self._schedule = schedule
        self.finished = not schedule.prunes

    def _before_step(self) -> None:
        if any(layer.merged for layer in self.layers.values()):
            raise RuntimeError("the adapters are merged into the weights; call unmerge() before training on")
        self._check_gradients()
        if self.config.penalty_at == "step" and self.config.orthogonality:
            keep = self.keep if self.finished and self.schedule.prunes and not self.shrunk else None
            orthogonality.add_gradient(self.adapters, self.config.orthogonality, self.config.penalty, keep)
        if self.config.sensitivity_at == "pre_step":
            self._update_importance()

    def _after_step(self) -> None:
        if self.config.sensitivity_at == "post_step":
            self._update_importance()
        self._allocate()
        self.step += 1

    def after_step(self) -> None:
        """One step of the schedule by hand, for an optimiser that is not a `torch.optim.Optimizer`.

        Call it after the optimiser's step and before the gradients are cleared. Raises RuntimeError after `zero_grad`,
        and where the schedule has bound itself to an optimiser and runs without you.
        """
        if self._binding.optimizer is not None:
            raise RuntimeError("the schedule is bound to your optimiser and runs by itself; remove this call")
        self._check_gradients()
        self._update_importance()
        self._allocate()
        self.step += 1

    def _check_gradients(self) -> None:
        """A gradient must be there, and at the first step it must not be all zero, as after `zero_grad`."""
        grads = [p.grad for a in self.adapters for p in (a.left, a.values, a.right) if p.grad is not None]
        if self.finished and not any(a.rank for a in self.adapters):
            return
        if not grads or (self.step == 0 and not any(bool(g.any()) for g in grads)):
            raise RuntimeError(
                "no adapter has a gradient: the order is backward, optimizer.step, zero_grad, and the loss must depend "
                "on the adapted layers"
            )

    def _update_importance(self) -> None:
        schedule = self.schedule
        if schedule.prunes and not self.finished and self.step < schedule.total - schedule.final:
            self.importance.update()

    @torch.no_grad()
    def _allocate(self) -> None:
        schedule = self.schedule
        if not schedule.prunes or self.shrunk:
            return
        if self.finished:
            self._mask()
        elif schedule.allocates(self.step):
            self._choose(schedule.budget(self.step))
            if self.step >= schedule.last:
                self._finalise()

    def _choose(self, budget: int) -> None:
        """Share out `budget`, with the scores of all processes if there are several."""
        scores = average_over_processes(self.importance.scores())
        values = torch.stack([a.values.detach() for a in self.adapters])
        device = scores.device
        self.keep = allocate(
            scores,
            budget,
            costs=self.costs.to(device) if self.config.budget_unit == "parameters" else None,
            least=self._bounds[0].to(device),
            most=self._bounds[1].to(device),
            ties=self.config.ties,
        )
        self.trace.add(self.step, budget, scores, values, self.keep)
        self._mask()

    def _mask(self) -> None:
        for adapter, keep in zip(self.adapters, self.keep.to(self.adapters[0].values.device), strict=True):
            adapter.values.data.masked_fill_(~keep, 0.0)

    def _finalise(self) -> None:
        """The ranks are final: cut the dropped triplets out, or keep them at zero where cutting is not possible."""
        self.finished, self.importance = True, None
        if self.config.shrink and processes() == 1:  # DDP's buckets have the size of the old parameters
            self.shrink()
        else:
            self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Dropped values get no gradient, so that clipping by norm sees what it would see without them."""
        for adapter, keep in zip(self.adapters, self.keep, strict=True):
            mask = keep.to(adapter.values)
            self._grad_masks.append(adapter.values.register_hook(lambda grad, mask=mask: grad * mask))

    @torch.no_grad()
    def shrink(self) -> None:
        """Cut the dropped triplets out of parameters and optimiser state for good. Happens by itself at the last
        allocation unless `shrink=False` or several processes train.

        Raises RuntimeError before the ranks are final.
        """
        if not self.finished:
            raise RuntimeError(f"step {self.step} is before the ranks are final; train on, or call finish() first")
        if not self.shrunk and self.schedule.prunes:
            for hook in self._grad_masks:
                hook.remove()
            self._grad_masks = []
            shrink(self.adapters, self.keep, self._binding.optimizer)
            self.shrunk = True

    def finish(self) -> None:
        """Cut to the final budget now, when training stopped before its schedule did. Does nothing afterwards.

        Raises RuntimeError when no step was taken yet.
        """
        if not self.step:
            raise RuntimeError("no optimiser step was taken yet, so there are no scores to cut by; train first")
        if not self.finished:
            with torch.no_grad():
                self._choose(self.schedule.target)
                self._finalise()

    # --- looking ---------------------------------------------------------------------------------------------------
    def penalty(self) -> Tensor:
        """gamma times the orthogonality penalty, differentiable. Add it to the loss only if penalty_at="loss"."""
        return self.config.orthogonality * orthogonality.penalty(self.adapters, self.config.penalty)

    def ranks(self) -> dict[str, int]:
        """Rank of every layer: triplets that the latest allocation kept. Not the count of l that are not zero, which
        grows again between two allocations."""
        return dict(zip(self.triplets, self.keep.sum(1).tolist(), strict=True))

    def report(self) -> AdaptationReport:
        """What has happened so far. Raises RuntimeError when no optimiser has made a step with the adapters."""
        if not self.step:
            raise RuntimeError(
                "no optimiser has stepped with these adapters yet; make the optimiser from handle.parameters() after "
                "attach, and train"
            )
        schedule, done = self.schedule, self.step - 1
        if not schedule.prunes:
            phase = "no pruning"
        else:
            phase = "final" if self.finished else "warm-up" if done <= schedule.warmup else "budget"
        with torch.no_grad():
            penalty = float(self.penalty())
        return AdaptationReport(
            name=self.name,
            step=self.step,
            total_steps=schedule.total,
            phase=phase,
            budget=schedule.target if self.finished and schedule.prunes else schedule.budget(done),
            active=int(self.keep.sum()),
            ranks=self.ranks(),
            parameters_at_start=self.parameters_at_start,
            parameters=self.parameter_count(),
            penalty=penalty,
            allocations=len(self.trace),
            finished=self.finished,
        )

    # --- using ----------------------------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return all(a.active for a in self.adapters)

    @active.setter
    def active(self, on: bool) -> None:
        for adapter in self.adapters:
            adapter.active = on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter inside a `with` block."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def merge(self) -> None:
        """Put all active adapters of these layers into their weights; inference then costs nothing extra.

        Raises ValueError for a weight that another layer shares, which would change too.
        """
        owners: dict[int, list[str]] = {}
        for path, p in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(p), []).append(path)
        for path, layer in self.layers.items():
            names = {n.removesuffix(".base.weight").removesuffix(".weight") for n in owners[id(layer.base.weight)]}
            places = sum(len(v) for m, v in self._places.items() if m is layer.base)
            if len(names) > max(1, places):
                other = next(n for n in sorted(names) if n != path)
                raise ValueError(f"{path!r} shares its weight with {other!r}, which merging would change; untie them")
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Give the layers their own weights back, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    # --- keeping --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything that the adaptation is, apart from the optimiser: see `checkpoint`."""
        return checkpoint.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError for one of another config or other layers."""
        checkpoint.restore(self, state)

    def save(self, folder: Any, optimizer: Optimizer | None = None) -> None:
        """Write a checkpoint, with the optimiser and the random state, that resumes bit for bit."""
        checkpoint.save(self, folder, optimizer)

    def load(self, folder: Any, optimizer: Optimizer | None = None) -> None:
        """Continue from what `save` wrote."""
        checkpoint.load(self, folder, optimizer)

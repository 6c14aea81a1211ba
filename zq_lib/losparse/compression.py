"""Compress a model: `attach`, then an ordinary training loop; `report`, `finish`, `merge`.

The schedule runs in a hook of the optimiser's own `step`, so a plain loop needs no extra call and cannot forget one:
after the step the rows' importance is updated, and at the schedule's steps the least important are zeroed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from zq_lib.core.binding import Binding, Words
from zq_lib.core.distributed import average_over_processes, processes
from zq_lib.core.surgery import cut_parameters
from zq_lib.core.targets import places_of
from zq_lib.losparse import checkpoint
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Factors
from zq_lib.losparse.importance import RowImportance
from zq_lib.losparse.layer import LowRankSparse, size_of
from zq_lib.losparse.pruning import choose_rows, round_rows
from zq_lib.losparse.report import CompressionReport, describe
from zq_lib.losparse.schedule import Schedule
from zq_lib.losparse.targets import check_factors, find_layers, row_bounds
from zq_lib.losparse.trace import DensityTrace

WORDS = Words("the compressed layers", "weights from before the compression", "model.parameters()")


def attach(
    model: nn.Module, config: LoSparseConfig | None = None, *, factors: Factors | None = None, **settings: Any
) -> Compression:
    """Write the layers of `model` as U V + S, and tie the dropping of rows to whatever optimiser trains them.

    Args: `config`, or its fields as keywords; `factors`, U [N, r] and V [r, K] for every layer by name, instead of
    those of the singular value decomposition (init="activation" needs them). The model computes what it did before.
    Returns a handle that is also a context manager; leaving it merges everything into dense layers. Raises ValueError,
    with the model as it was, for layers or settings that do not fit it.

    >>> handle = losparse.attach(model, total_steps=1000)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    >>> for batch in batches:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> handle.finish()
    """
    config = LoSparseConfig(**settings) if config is None else replace(config, **settings)
    return Compression(model, config, factors)


class Compression:
    """The handle that `attach` returns. Scores and masks [rows] follow the order of `layers`."""

    def __init__(self, model: nn.Module, config: LoSparseConfig, factors: Factors | None = None) -> None:
        self.model, self.config = model, config
        found, self.left_dense = find_layers(model, config.targets, config.skip)
        check_factors(config, found, factors)
        self._bounds = row_bounds(config, found)
        names = list(found)
        self._schedule = None if config.total_steps is None else config.schedule()
        self.parameters_at_start = sum(p.numel() for p in model.parameters())
        self._places = {name: places_of(model, {layer})[layer] for name, layer in found.items()}
        self.layers: dict[str, LowRankSparse] = {}
        replaced = WeakIdKeyDictionary()  # the dense weights are not kept alive
        for name in names:
            dense = found.pop(name)
            given = None if factors is None else factors[name]
            rank = config.rank(*size_of(dense)) if given is None else given[0].shape[1]
            layer = LowRankSparse.from_dense(dense, rank, given)
            layer.backend = config.backend
            replaced[dense.weight] = name
            self.layers[name] = layer
            self._put(name, layer)
        self.importance: RowImportance | None = RowImportance(
            [m.sparse for m in self.layers.values()], config.score, config.form, config.interval, config.beta,
            config.backend,
        )  # fmt: skip
        self.counts = torch.tensor([m.out_features for m in self.layers.values()])
        self.inputs = torch.tensor([m.in_features for m in self.layers.values()])
        self.keep = torch.ones(int(self.counts.sum()), dtype=torch.bool)
        self.trace = DensityTrace(tuple(names), tuple(self.counts.tolist()), tuple(self.inputs.tolist()))
        self.step = 0
        self.fixed = False  # whether the kept rows are final
        self.shrunk = False  # whether the others are gone from the parameters
        self._grad_masks: list[Any] = []
        self._binding = Binding(self.factors(), replaced, self._before_step, self._after_step, WORDS)

    # --- the schedule ------------------------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole training, or None while they are unknown."""
        return None if self._schedule is None else self._schedule.total

    @property
    def schedule(self) -> Schedule:
        """The share of S over time. Raises ValueError while the number of steps is unknown."""
        if self._schedule is None:
            raise ValueError(
                "total_steps=None: give attach the number of optimiser steps of the training, or use LoSparseCallback"
            )
        return self._schedule

    def set_total_steps(self, total: int) -> None:
        """Fix the number of optimiser steps, if the config left it open. Raises ValueError once training has begun."""
        if self.step and total != self.schedule.total:
            raise ValueError(f"total_steps={total} comes after step {self.step} of {self.schedule.total}; set it first")
        self._schedule = self.config.schedule(total)

    def _before_step(self) -> None:
        """At the first step the gradients must be there, and not be all zero, as after `zero_grad`."""
        grads = [m.sparse.grad for m in self.layers.values() if m.sparse.grad is not None]
        if self.step == 0 and self.config.score == "sensitivity" and not any(bool(g.any()) for g in grads):
            raise RuntimeError(
                "no compressed layer has a gradient: the order is backward, optimizer.step, zero_grad, and the loss "
                "must depend on these layers"
            )

    @torch.no_grad()
    def _after_step(self) -> None:
        step, schedule = self.step, self.schedule
        if self.fixed:
            if not self.shrunk:
                self.importance.zero(self.keep)
        else:
            self.importance.update(step)
            if schedule.masks(step):
                self._choose(schedule.share(step))
                self.importance.zero(self.keep)
            if step >= schedule.last and self.config.shrink:
                self._fix()
        self.step += 1

    def _choose(self, share: float, scores: Tensor | None = None) -> None:
        """Choose the rows that stay, by the scores of all processes if there are several."""
        scores = average_over_processes(self.importance.scores()) if scores is None else scores
        counts, inputs = self.counts.to(scores.device), self.inputs.to(scores.device)
        least, most = (None if b is None else b.to(scores.device) for b in self._bounds)
        keep = choose_rows(scores, counts, inputs, share, exact=self.config.exact, least=least, most=most)
        if self.config.round_to > 1 and share == self.config.remaining:
            keep = round_rows(keep, scores, counts, self.config.round_to)
        before, self.keep = self.keep.to(keep.device), keep
        self.trace.add(self.step, share, self.kept(), int((keep & ~before).sum()))

    def _fix(self) -> None:
        """The kept rows are final: cut the others out, or hold them at zero where cutting is not possible."""
        self.fixed = True
        if processes() == 1:  # DDP's buckets have the size of the old parameters
            self.shrink()
        else:
            self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Dropped rows get no gradient, so that clipping by norm sees what it would see without them."""
        for layer, keep in zip(self.layers.values(), self._parts(), strict=True):
            mask = keep[:, None].to(layer.sparse)
            self._grad_masks.append(layer.sparse.register_hook(lambda grad, mask=mask: grad * mask))

    @torch.no_grad()
    def shrink(self, scores: Mapping[str, Tensor] | None = None) -> None:
        """Cut the dropped rows out of parameters and optimiser state for good, so that the model is smaller and faster.

        Happens by itself in the final phase, unless `shrink=False` or several processes train. Before it, the rows are
        chosen now and to the final share, by `scores` [N] for every layer or by what training has found so far. Does
        nothing the second time. Raises RuntimeError when there is nothing to choose by, ValueError for scores that do
        not fit the layers or an optimiser whose state cannot be cut; nothing has changed then.
        """
        if self.shrunk:
            return
        if not self.fixed:
            if scores is None and not self.step and self.config.score == "sensitivity":
                raise RuntimeError(
                    "no optimiser step was taken yet, so there is nothing to choose rows by; train, give scores, or "
                    "use score='magnitude'"
                )
            self._choose(self.config.remaining, None if scores is None else self._flat(scores))
        rows = {name: keep.nonzero()[:, 0] for name, keep in zip(self.layers, self._parts(), strict=True)}
        layers = self.layers.items()
        cut_parameters([(m.sparse, rows[n].to(m.sparse.device), 0) for n, m in layers], self._binding.optimizer)
        for name, layer in layers:
            layer.rows = rows[name].to(layer.sparse.device)
        for hook in self._grad_masks:
            hook.remove()
        self._grad_masks, self.importance = [], None
        self.fixed = self.shrunk = True

    def finish(self) -> CompressionReport:
        """End the compression: cut, make layers dense that are cheaper so (`auto_dense`), follow no optimiser any more.

        What is left is an ordinary model. Raises as `shrink` does.
        """
        self.shrink()
        if self.config.auto_dense:
            for name, layer in self.layers.items():
                if not layer.pays:
                    self._put(name, layer.merge())
        self._binding.remove()
        return self.report()

    def merge(self) -> None:
        """Turn every layer back into the dense layer that it computes. Safe to call twice."""
        self._binding.remove()
        for name in self.layers:
            if isinstance(module := self.module(name), LowRankSparse):
                self._put(name, module.merge())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.step and not self.fixed and self.step <= self.schedule.last:
            warnings.warn(
                f"training stopped after step {self.step} of {self.schedule.total}, before the kept rows were final; "
                "give total_steps the steps you take, or call finish()",
                stacklevel=2,
            )
        self.merge()

    # --- looking -----------------------------------------------------------------------------------------------------
    def factors(self) -> list[nn.Parameter]:
        """U, V and S of every layer that has such entries. The optimiser needs all of these; the paper trains the whole
        model, `model.parameters()`."""
        return [p for m in self.layers.values() for p in (m.left, m.right, m.sparse) if p.numel()]

    def scores(self) -> dict[str, Tensor]:
        """The present score of every row, [N] fp32 for each layer. Raises RuntimeError once the rows are cut."""
        if self.importance is None:
            raise RuntimeError("the dropped rows are cut, so there are no scores any more; look before the final phase")
        return dict(zip(self.layers, self.importance.scores().split(self.counts.tolist()), strict=True))

    def kept(self) -> list[int]:
        """Rows of S that the latest mask kept, of each layer. Not those that are not zero, which grow again between two
        masks."""
        return [int(part.sum()) for part in self._parts()]

    def report(self) -> CompressionReport:
        """What has happened so far. Raises RuntimeError when nothing has: no step was made and nothing was cut."""
        if not self.step and not self.shrunk:
            raise RuntimeError(
                "no optimiser has stepped with the compressed layers yet, and nothing was cut; make the optimiser from "
                "model.parameters() after attach, and train, or call shrink(scores)"
            )
        return describe(self)

    # --- keeping -----------------------------------------------------------------------------------------------------
    def save(self, folder: Any, optimizer: Optimizer | None = None, weights: bool = True) -> None:
        """Write a checkpoint that resumes bit for bit; `weights=False` if the model's own are saved elsewhere."""
        checkpoint.save(self, folder, optimizer, weights)

    def load(self, folder: Any, optimizer: Optimizer | None = None) -> None:
        """Continue from what `save` wrote, before or after the rows were cut."""
        checkpoint.load(self, folder, optimizer)

    # --- the model ---------------------------------------------------------------------------------------------------
    def module(self, name: str) -> nn.Module:
        """What stands in the model at `name` now: a LowRankSparse, or a dense layer again."""
        parent, child = self._places[name][0]
        return getattr(parent, child)

    def _put(self, name: str, module: nn.Module) -> None:
        for parent, child in self._places[name]:
            setattr(parent, child, module)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.keep.split(self.counts.tolist())

    def _flat(self, scores: Mapping[str, Tensor]) -> Tensor:
        for name, layer in self.layers.items():
            if name not in scores or scores[name].shape != (layer.out_features,):
                found = tuple(scores[name].shape) if name in scores else "none"
                raise ValueError(
                    f"scores of layer {name!r} must be one number for each of its {layer.out_features} outputs, got "
                    f"{found}; hand in a tensor [{layer.out_features}]"
                )
        return torch.cat([scores[name].detach().float().to(self.counts.device) for name in self.layers])

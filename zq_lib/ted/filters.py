"""Task-aware filters: one behind every matched layer of a model, and the heads that they are trained with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from zq_lib.core.distributed import average_over_processes
from zq_lib.ted import heads
from zq_lib.ted.cache import StateCache, look
from zq_lib.ted.config import TedConfig
from zq_lib.ted.filtered import Filtered
from zq_lib.ted.layers import Batch, bare, blocks, check_layers, mask_of, match, width

MOMENTUM = 0.05  # of the running variance, once the plain mean of the first 20 batches is behind
SAMPLED = 128  # rows of a batch that the running variance looks at


class Filter(nn.Module):
    """F: a linear layer d -> d_f, or an MLP whose inner layer is square; without either, the identity."""

    def __init__(self, inner: nn.Linear | None, outer: nn.Linear | None, act: str) -> None:
        super().__init__()
        self.inner, self.outer, self.act = inner, outer, ACT2FN[act]

    def filtered(self, hidden: Tensor) -> Filtered:
        """The filter on `hidden` [..., d] up to its last product, which `filtered_error` does."""
        if self.outer is None:
            return Filtered(hidden)
        if self.inner is not None:
            hidden = self.act(self.inner(hidden.to(self.inner.weight.dtype)))
        return Filtered(hidden, self.outer.weight, self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., d_f], in the filter's type."""
        if self.outer is None:
            return hidden
        hidden = hidden.to(self.outer.weight.dtype)
        return self.outer(hidden if self.inner is None else self.act(self.inner(hidden)))


@dataclass(frozen=True)
class LayerReport:
    """How well a layer's head solves the task behind its filter: mean loss, and the share of right answers if any."""

    layer: int
    loss: float
    accuracy: float | None


class TaskFilters(nn.Module):
    """K filters of one model, and a head for each while the first stage trains them.

    layers    the model's blocks behind which they stand, counted from 1; by default all
    dim       d_f; by default `config.filter_dim`, or else the model's width
    origin    how the filters came to be: "untrained", "trained", or a baseline's name
    task, pool   what the heads solve and read, see `heads`

    The model is not a part of this module: neither `parameters()` nor `state_dict()` nor `to()` reach it.

    >>> teacher_filters, student_filters = task_filters(teacher, student, TedConfig(filter_dim=16))
    >>> for step in fit(teacher_filters, batches): print(step.losses)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TedConfig | None = None,
        layers: Sequence[int] | None = None,
        dim: int | None = None,
        task: str | None = None,
    ) -> None:
        """Raises ValueError for layers that the model does not have, a task that is unknown or does not fit."""
        super().__init__()
        model, config = bare(model), config or TedConfig()
        depth = len(blocks(model))
        self.layers = tuple(range(1, depth + 1) if layers is None else layers)
        check_layers(self.layers, depth, "model")
        self.config, self.origin, self._model = config, "untrained", (model,)
        self.dim = dim or config.filter_dim or width(model)
        if task is not None and task not in heads.TASKS:
            raise ValueError(f"task={task!r} is not known; choose one of {', '.join(heads.TASKS)}")
        self.task = task or heads.task_of(model)
        self.pool = heads.pool_of(model, self.task, config.pool)
        self.filters = nn.ModuleList(self._filter() for _ in self.layers)
        self.heads = nn.ModuleList(
            heads.make_head(model, self.task, self.dim, self.pool, config.dropout) for _ in self.layers
        )
        self._initialise()
        self.register_buffer("mean", torch.zeros(len(self.layers), self.dim, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(len(self.layers), self.dim, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        first = next(model.parameters())
        self.to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32)
        self.mean, self.square = self.mean.double(), self.square.double()

    @property
    def model(self) -> nn.Module:
        """The model whose states are filtered."""
        return self._model[0]

    def _filter(self) -> Filter:
        d, config = width(self.model), self.model.config
        act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or "gelu"
        return Filter(nn.Linear(d, d) if self.config.filter == "mlp" else None, nn.Linear(d, self.dim), act)

    def _initialise(self) -> None:
        std = getattr(self.model.config, "initializer_range", 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.task == "language" and self.config.filter == "linear" and self.dim == width(self.model):
            for module in self.filters:  # the logit lens, which a little training makes a tuned one
                nn.init.eye_(module.outer.weight)

    def filtered(self, states: Sequence[Tensor]) -> list[Filtered]:
        """The filters on states [B, S, d] of each layer, up to their last product, for `filtered_error`."""
        self._check(states)
        return [f.filtered(h) for f, h in zip(self.filters, states, strict=True)]

    def states(self, hidden: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
        """Filtered states [B, S, d_f] of each layer's `hidden` [B, S, d]; zero where `mask` [B, S] is."""
        self._check(hidden)
        found = [f(h) for f, h in zip(self.filters, hidden, strict=True)]
        return found if mask is None else [z.masked_fill(~mask.bool()[..., None], 0) for z in found]

    def logits(self, place: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the head of the layer at `place` in `layers` says of its states [B, S, d]."""
        return heads.read(self.task, self.heads[place], self.filters[place], hidden, mask, self.pool)

    def loss(self, place: int, hidden: Tensor, batch: Batch, sample: int | None = None) -> Tensor:
        """The task's loss behind the filter at `place`, for `hidden` [B, S, d] and the batch's labels; a scalar.

        `sample` is how many rows of a language model it is computed on, drawn at random.
        """
        return heads.head_loss(*self._answers(place, hidden, batch, sample))

    def _answers(
        self, place: int, hidden: Tensor, batch: Batch, sample: int | None = None
    ) -> tuple[str, Tensor, Batch]:
        """The kind of task, the head's logits and what would be right, for `head_loss` and `head_accuracy`."""
        mask = mask_of(batch, hidden.shape[:2])
        if self.task != "language":
            return self.task, self.logits(place, hidden, mask), batch
        rows, wanted = self._language_rows(batch, mask, sample)
        return "token", self.heads[place](self.filters[place](hidden.flatten(0, 1)[rows])), {"labels": wanted}

    def _language_rows(self, batch: Batch, mask: Tensor, sample: int | None) -> tuple[Tensor, Tensor]:
        """Positions [n] in the flattened batch and the tokens [n] that follow them."""
        rows = heads.rows_with_labels("language", batch["labels"], mask).flatten().nonzero()[:, 0]
        if sample is not None and len(rows) > sample:
            rows = rows[torch.randperm(len(rows), device=rows.device)[:sample]]
        return rows, batch["labels"].flatten()[rows + 1]

    @torch.no_grad()
    def measure(self, states: Sequence[Tensor], mask: Tensor) -> None:
        """Let the running variance of filtered states take in `states` [B, S, d] of each layer, where `mask` is set."""
        rows = mask.flatten().nonzero()[:, 0]
        if len(rows) > SAMPLED:  # evenly, but in no step with the rows' length: first tokens have states of their own
            rows = rows[torch.linspace(0, len(rows) - 1, SAMPLED, device=rows.device).long()]
        share = max(MOMENTUM, 1 / (int(self.batches) + 1))
        for k, (module, h) in enumerate(zip(self.filters, states, strict=True)):
            z = module(h.flatten(0, 1)[rows]).double()  # [n, d_f]
            for running, now in ((self.mean, z.mean(0)), (self.square, z.square().mean(0))):
                running[k] += share * (average_over_processes(now) - running[k])
        self.batches += 1

    @property
    def variance(self) -> Tensor:
        """Variance of the filtered states of each layer over tokens, mean over d_f, [K]; NaN before `measure`."""
        if not int(self.batches):
            return torch.full_like(self.mean[:, 0], math.nan)
        return (self.square - self.mean.square()).mean(1)

    @torch.no_grad()
    def report(self, batches: Iterable[Batch], cache: StateCache | None = None) -> list[LayerReport]:
        """Loss and accuracy of every layer's head on batches with labels: where does the model know the answer?"""
        was = self.training
        self.eval()
        sums, right, count = [0.0] * len(self.layers), [0] * len(self.layers), 0
        for batch in batches:
            seen = look(self.model, batch, self.layers, cache)
            for k, hidden in enumerate(seen.states):
                found = self._answers(k, hidden, batch)
                hits, size = heads.head_accuracy(*found)
                sums[k] += float(heads.head_loss(*found)) * size
                right[k] += hits
            count += size
        self.train(was)
        if not count:
            raise ValueError("batches is empty, and a report needs at least one with labels")
        shares = [None if self.task == "regression" else hits / count for hits in right]
        return [LayerReport(n, total / count, a) for n, total, a in zip(self.layers, sums, shares, strict=True)]

    def _check(self, states: Sequence[Tensor]) -> None:
        if len(states) != len(self.layers):
            raise ValueError(f"{len(states)} states for {len(self.layers)} filters; give those of layers {self.layers}")


def task_filters(
    teacher: nn.Module, student: nn.Module, config: TedConfig, task: str | None = None
) -> tuple[TaskFilters, TaskFilters]:
    """Untrained filters of one width behind the matched layers of both models: (teacher's, student's).

    Raises ValueError where `match` does, and for models whose tasks differ.
    """
    found = match(bare(student), bare(teacher), config)
    theirs = TaskFilters(teacher, config, found.teacher, found.filter_dim, task)
    own = TaskFilters(student, config, found.student, found.filter_dim, task)
    if theirs.task != own.task:
        raise ValueError(
            f"the teacher's task is {theirs.task!r} and the student's {own.task!r}; give models of one task"
        )
    return theirs, own

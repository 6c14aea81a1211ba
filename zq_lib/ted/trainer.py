"""TED in transformers' `Trainer`: the second stage's loss in the place of the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zq_lib.ted.cache import StateCache
from zq_lib.ted.distillation import average_gradients
from zq_lib.ted.layers import EXAMPLE, see
from zq_lib.ted.loss import TedLoss, Terms

FILTERS = "ted_student_filters.safetensors"


class TedTrainer(Trainer):
    """A Trainer whose model is the student, and which trains its filters along.

    Evaluation gives the model's own loss. The log has `ted_task`, `ted_kd` and `ted_layer`, means since its last entry.
    Checkpoints hold the student, as any Trainer writes it, and its filters in a file beside it; a run is resumed with
    `resume_from_checkpoint`. `max_grad_norm` holds for student and filters each. `cache` has what the teacher shows,
    and needs `remove_unused_columns=False`, so that examples keep their number.

    >>> TedTrainer(student, args, ted=TedLoss(teacher, teacher_filters, student_filters), train_dataset=data).train()
    """

    def __init__(self, *args: Any, ted: TedLoss, cache: StateCache | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if cache is not None and self.args.remove_unused_columns:
            raise ValueError(
                f"remove_unused_columns=True takes {EXAMPLE!r} out of the batches, by which the cache knows examples; "
                "set remove_unused_columns=False"
            )
        self.ted, self.cache, self.terms = ted.to(self.args.device), cache, list[Terms]()
        if ted.teacher is not None:
            ted.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, so accumulation divides it
        self.add_callback(_Filters(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the student's filters in a group of their own."""
        optimizer = super().create_optimizer(model)
        own = [p for p in self.ted.parameters() if p.requires_grad]
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if own and own[0] not in held:
            optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The second stage's loss in training, the model's own in evaluation."""
        if not model.training:
            plain = {key: value for key, value in inputs.items() if key != EXAMPLE}
            return super().compute_loss(model, plain, return_outputs)
        shown = None if self.cache is None else self.cache.seen(inputs)
        terms = self.ted(see(model, inputs, self.ted.layers), inputs, shown, overwrite=True)
        self.terms.append(terms)
        return terms.total

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ever; the examples' numbers are not for the model."""
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k != EXAMPLE}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the loss to a training entry of the log."""
        if "loss" in logs and self.terms:
            for name in ("task", "kd", "layer"):
                logs[f"ted_{name}"] = float(torch.stack([getattr(t, name) for t in self.terms]).mean())
            self.terms.clear()
        super().log(logs, *args, **kwargs)


class _Filters(TrainerCallback):
    """What the Trainer does for its model's parameters only: average, clip, zero, save and load, for the filters."""

    def __init__(self, trainer: TedTrainer) -> None:
        self.ted = trainer.ted

    @property
    def _own(self) -> list[nn.Parameter]:
        return [p for p in self.ted.parameters() if p.requires_grad]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILTERS
        if state.global_step and self._own:
            self.ted.load_state_dict(load_file(file))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        average_gradients(self._own)
        if args.max_grad_norm and self._own:
            nn.utils.clip_grad_norm_(self._own, args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ted.zero_grad()  # the Trainer clears the gradients of its model alone

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._own:
            tensors: dict[str, Tensor] = {name: t.contiguous() for name, t in self.ted.state_dict().items()}
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILTERS)

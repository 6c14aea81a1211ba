"""AdaLoRA in transformers' `Trainer`: the callback brings the number of steps, logs, and checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zq_lib.adalora.adaptation import Adaptation


class AdaLoraCallback(TrainerCallback):
    """Tell an adaptation how long the training is, and keep its state in every checkpoint.

    The ranks themselves follow the optimiser and need no callback. Metrics `adalora_*` join the Trainer's log. A run is
    resumed with the Trainer's own `resume_from_checkpoint`, from a checkpoint in its output folder.

    >>> handle = adalora.attach(model, AdaLoraConfig())
    >>> Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback(handle)]).train()
    """

    def __init__(self, handle: Adaptation) -> None:
        self.handle = handle

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fix the schedule's length. Raises ValueError if the config says another number of steps."""
        total = self.handle.config.total_steps
        if total is not None and total != state.max_steps:
            raise ValueError(
                f"total_steps={total}, but this training takes {state.max_steps} steps; leave total_steps out and the "
                "callback sets it"
            )
        if total is None:
            self.handle.set_total_steps(state.max_steps)
        if state.global_step and not self.handle.step:
            self.handle.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adaptation's state beside the Trainer's."""
        self.handle.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add budget, active ranks and penalty to the latest entry of the log."""
        if self.handle.step and state.log_history:
            report = self.handle.report()
            state.log_history[-1] |= {
                "adalora_budget": report.budget,
                "adalora_active": report.active,
                "adalora_penalty": report.penalty,
            }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the ranks are not final. Raises RuntimeError if the Trainer brought back weights of other ranks."""
        handle = self.handle
        if not handle.finished:
            warnings.warn(
                f"training ended after step {handle.step} of {handle.schedule.total}, before the ranks were final; "
                "call finish() or train on",
                stacklevel=2,
            )
        if handle.shrunk and [a.rank for a in handle.adapters] != handle.keep.sum(1).tolist():
            raise RuntimeError(
                "load_best_model_at_end brought back a checkpoint from before the ranks were final; save and compare "
                "in the final phase only"
            )

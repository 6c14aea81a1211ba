"""LoSparse in transformers' `Trainer`: the callback brings the number of steps, logs, and checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zq_lib.losparse.compression import Compression


class LoSparseCallback(TrainerCallback):
    """Tell a compression how long the training is, and keep its state in every checkpoint.

    The rows themselves follow the optimiser and need no callback. Metrics `losparse_*` join the Trainer's log. A run is
    resumed with the Trainer's own `resume_from_checkpoint`, from a checkpoint in its output folder, before the rows
    were cut or after.

    >>> handle = losparse.attach(model, LoSparseConfig())
    >>> Trainer(model, args, train_dataset=data, callbacks=[LoSparseCallback(handle)]).train()
    >>> handle.finish()
    """

    def __init__(self, handle: Compression) -> None:
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
        """Write the compression's state beside the Trainer's, which has the model's weights."""
        self.handle.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", weights=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the share of S that may survive and the ratio that remains to the latest entry of the log."""
        if self.handle.step and state.log_history:
            report = self.handle.report()
            state.log_history[-1] |= {"losparse_share": report.share, "losparse_ratio": report.ratio}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the rows are not final. Raises RuntimeError if the Trainer brought back weights with other rows."""
        handle = self.handle
        if handle.step <= handle.schedule.last:
            warnings.warn(
                f"training ended after step {handle.step} of {handle.schedule.total}, before the kept rows were final; "
                "call finish() or train on",
                stacklevel=2,
            )
        if handle.shrunk and [m.sparse.shape[0] for m in handle.layers.values()] != handle.kept():
            raise RuntimeError(
                "load_best_model_at_end brought back a checkpoint from before the rows were final; save and compare in "
                "the final phase only"
            )

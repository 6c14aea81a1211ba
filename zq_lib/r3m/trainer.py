"""Rewards and policies in transformers' `Trainer`, with the suspected pairs in its log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zq_lib.r3m.cache import ReferenceCache
from zq_lib.r3m.config import R3MConfig
from zq_lib.r3m.data import EXAMPLE, REFERENCE, PreferenceCollator, Row
from zq_lib.r3m.loss import PreferenceLoss, RobustDPOLoss, RobustRewardLoss
from zq_lib.r3m.losses import cutoff
from zq_lib.r3m.policy import preference_terms
from zq_lib.r3m.report import OutlierReport, outlier_report
from zq_lib.r3m.reward import rewards_of

BUDGET = "r3m_budget.safetensors"


class _PreferenceTrainer(ABC, Trainer):
    """A Trainer on rows of `encode`, whose log has `r3m_accuracy`, `r3m_flagged` and `r3m_margin` since its last entry.

    Evaluation gives `eval_loss`. It needs `remove_unused_columns=False`: the model does not read the rows itself.
    """

    loss_of: type[PreferenceLoss]

    def __init__(
        self, model: nn.Module, args: Any, *, config: R3MConfig, train_dataset: Sequence[Row], **kwargs: Any
    ) -> None:
        if args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would take everything out of the rows, which the collator reads; set "
                "remove_unused_columns=False"
            )
        self.loss = self.loss_of(config)
        self._seen: list[Tensor] = []
        pad = getattr(model.config, "pad_token_id", None)
        kwargs.setdefault("data_collator", PreferenceCollator(0 if pad is None else pad))
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.loss.to(self.args.device)
        if self.loss.budget is not None:
            self.add_callback(_Budget(self.loss))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, so accumulation divides it

    @abstractmethod
    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean loss and margins [B] of a batch."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The config's loss; while training its margins are kept for the log."""
        self.loss.train(model.training)
        loss, margin = self.terms(model, inputs)
        if model.training:
            self._seen.append(margin.detach())
        return (loss, {"margin": margin.detach()}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, None]:
        """The loss and the margins of a batch, which take the place of predictions."""
        with torch.no_grad():
            loss, found = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss, found["margin"], None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the margins said to a training entry of the log."""
        if "loss" in logs and self._seen:
            margin = torch.cat(self._seen)
            logs["r3m_accuracy"] = float((margin > 0).double().mean())
            logs["r3m_flagged"] = float((margin < cutoff(self.loss.lam)).double().mean())
            logs["r3m_margin"] = float(margin.mean())
            self._seen.clear()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def report(self, rows: Sequence[Row] | None = None) -> OutlierReport:
        """The suspected pairs among the training rows, or other rows of `encode`, with the model as it is now.

        Every process looks at all of them.
        """
        rows = self.train_dataset if rows is None else rows
        model, margins = self.accelerator.unwrap_model(self.model), []
        mode, size = model.training, self.args.per_device_eval_batch_size
        model.eval()
        for start in range(0, len(rows), size):
            part = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            margins.append(self.terms(model, self._prepare_inputs(part))[1])
        model.train(mode)
        numbers = torch.tensor([rows[i][EXAMPLE] for i in range(len(rows))])
        return outlier_report(margins, [numbers], lam=self.loss.lam)


class RobustRewardTrainer(_PreferenceTrainer):
    """Train a sequence classifier with `num_labels=1` as a reward of whole texts.

    >>> args = TrainingArguments("out", remove_unused_columns=False)
    >>> RobustRewardTrainer(model, args, config=R3MConfig(lam=0.3), train_dataset=encode(rows, tokenizer)).train()
    """

    loss_of = RobustRewardLoss

    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean loss and margins [B] of a batch."""
        rewards = rewards_of(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        margin = self.loss.margin(*rewards.chunk(2))
        return self.loss.of_margins(margin), margin


class RobustDPOTrainer(_PreferenceTrainer):
    """Train a causal language model by R3M-DPO, or a peer.

    `reference` holds the reference's log-probabilities of the training rows, `eval_reference` those of the rows to
    evaluate on. By default they are computed here, by the model as it is before training.

    >>> args = TrainingArguments("out", remove_unused_columns=False)
    >>> RobustDPOTrainer(model, args, config=R3MConfig.paper("dialogue"), train_dataset=encode(rows, tokenizer)).train()
    """

    loss_of = RobustDPOLoss

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        config: R3MConfig,
        train_dataset: Sequence[Row],
        eval_dataset: Sequence[Row] | None = None,
        reference: ReferenceCache | None = None,
        eval_reference: ReferenceCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, config=config, train_dataset=train_dataset, **kwargs)
        self.train_dataset = self._joined(train_dataset, reference)
        self.eval_dataset = None if eval_dataset is None else self._joined(eval_dataset, eval_reference)

    def _joined(self, rows: Sequence[Row], cache: ReferenceCache | None) -> list[Row]:
        average = self.loss.config.average
        if cache is None:
            size, pad = self.args.per_device_eval_batch_size, self.data_collator.pad_token_id
            cache = ReferenceCache.of(self.model, rows, size=size, average=average, pad_token_id=pad)
        if cache.average != average:
            raise ValueError(
                f"the reference has average={cache.average} and the config average={average}; make it anew with the "
                "config's"
            )
        return cache.join(rows)

    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean loss and margins [B] of a batch."""
        if REFERENCE not in inputs:
            raise ValueError("these rows have no reference; join them first, with ReferenceCache.of(...).join(rows)")
        found = preference_terms(model, inputs, inputs[REFERENCE], self.loss)
        return found.loss, found.margin


class _Budget(TrainerCallback):
    """Keep the cut-off of an outlier budget in checkpoints."""

    def __init__(self, loss: PreferenceLoss) -> None:
        self.loss = loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            self.loss.load_state_dict(load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / BUDGET))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_file(self.loss.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / BUDGET)

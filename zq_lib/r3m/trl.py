"""R3M in TRL's own trainers, for who already uses them; TRL itself is optional and imported by the caller alone.

>>> from trl import DPOTrainer
>>> RobustTRL = robust_dpo(DPOTrainer, R3MConfig.paper("dialogue"))
>>> RobustTRL(model, args=DPOConfig("out", precompute_ref_log_probs=True), train_dataset=data).train()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zq_lib.r3m.config import R3MConfig
from zq_lib.r3m.loss import RobustDPOLoss, RobustRewardLoss
from zq_lib.r3m.policy import preference_terms
from zq_lib.r3m.reward import rewards_of


def robust_dpo(trainer: type, config: R3MConfig) -> type:
    """A subclass of TRL's `DPOTrainer` (1.x) with the config's loss and beta in the place of its own.

    It reads the same batches and needs `precompute_ref_log_probs=True`. TRL's metrics of rewards are not logged.
    """

    class RobustDPO(trainer):
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            if any(name not in inputs for name in names):
                raise ValueError(f"the batch has no {names[0]!r}; set precompute_ref_log_probs=True in DPOConfig")
            reference = torch.cat([inputs[name] for name in names])
            loss = _loss(self, RobustDPOLoss, config, model)
            return _given(preference_terms(model, inputs, reference, loss).loss, return_outputs)

    return RobustDPO


def robust_reward(trainer: type, config: R3MConfig) -> type:
    """A subclass of TRL's `RewardTrainer` (1.x) with the config's loss; batches hold the chosen first. Its static
    `margin` column and its centring of rewards are not used."""

    class RobustReward(trainer):
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            rewards = rewards_of(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
            return _given(_loss(self, RobustRewardLoss, config, model)(*rewards.chunk(2)), return_outputs)

    return RobustReward


def _loss(trainer: Any, kind: type, config: R3MConfig, model: nn.Module) -> Any:
    """The trainer's loss module, made on first use: TRL's constructors may compute losses before they return."""
    if not hasattr(trainer, "robust_loss"):
        trainer.robust_loss = kind(config).to(next(model.parameters()).device)
    return trainer.robust_loss.train(model.training)


def _given(loss: Tensor, return_outputs: bool) -> Any:
    return (loss, {}) if return_outputs else loss

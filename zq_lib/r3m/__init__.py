"""R3M: robust reward learning from corrupted preferences (Bukharin et al., NeurIPS 2024, arXiv 2406.15568).

>>> from zq_lib import r3m
>>> loss = r3m.RobustRewardLoss(r3m.R3MConfig(lam=0.3))
>>> batches = r3m.PairBatches(chosen, rejected, size=64, generator=torch.Generator().manual_seed(0))
>>> for step in r3m.fit_reward(model, batches, torch.optim.AdamW(model.parameters()), loss, epochs=5): ...
>>> report = r3m.outlier_report(*r3m.pair_margins(model, batches), lam=0.3)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zq_lib.r3m import noise
from zq_lib.r3m.alternating import (
    alternating_optimum,
    alternating_step,
    joint_optimum,
    linear_fit,
    profile_optimum,
)
from zq_lib.r3m.config import R3MConfig
from zq_lib.r3m.fused import Terms, preference_from_hidden
from zq_lib.r3m.logps import Head, logits_logps, sequence_logps
from zq_lib.r3m.loss import OutlierBudget, RobustDPOLoss, RobustRewardLoss, outlier_offset, preference_loss
from zq_lib.r3m.losses import LOSSES, Rule, cutoff, value_and_slope
from zq_lib.r3m.report import OutlierReport, outlier_report
from zq_lib.r3m.reward import PairBatch, PairBatches, SegmentReward, Standardised, fit_reward, pair_margins, rewards_of
from zq_lib.r3m.selection import Selection, Trimmed, select_lambda, trim_refit

# Imported on first use: their bases pull in transformers, and the two trainers the whole Trainer.
LATER = {
    "PreferenceCollator": "data",
    "ReferenceCache": "cache",
    "RobustDPOTrainer": "trainer",
    "RobustRewardTrainer": "trainer",
    "encode": "data",
    "head_of": "policy",
    "labels_of": "data",
    "policy_logps": "policy",
    "preference_terms": "policy",
    "robust_dpo": "trl",
    "robust_reward": "trl",
}

__all__ = [
    "LOSSES",
    "Head",
    "OutlierBudget",
    "OutlierReport",
    "PairBatch",
    "PairBatches",
    "R3MConfig",
    "RobustDPOLoss",
    "RobustRewardLoss",
    "Rule",
    "SegmentReward",
    "Selection",
    "Standardised",
    "Terms",
    "Trimmed",
    "alternating_optimum",
    "alternating_step",
    "cutoff",
    "fit_reward",
    "joint_optimum",
    "linear_fit",
    "logits_logps",
    "noise",
    "outlier_offset",
    "outlier_report",
    "pair_margins",
    "preference_from_hidden",
    "preference_loss",
    "profile_optimum",
    "rewards_of",
    "select_lambda",
    "sequence_logps",
    "trim_refit",
    "value_and_slope",
    *LATER,
]


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

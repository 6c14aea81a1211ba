"""TED: task-aware layer-wise distillation (Liang et al., ICML 2023, arXiv 2210.01351).

>>> from zq_lib import ted
>>> config = ted.TedConfig(filter_dim=16, kd_weight=5.0)
>>> of_teacher, of_student = ted.task_filters(teacher, student, config)
>>> for filters in (of_teacher, of_student):
...     losses = [step.losses for step in ted.fit(filters, batches, epochs=2)]
>>> loss = ted.TedLoss(teacher, of_teacher, of_student, config)
>>> optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=5e-5)
>>> for step in ted.distil(student, loss, batches, optimizer): ...
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zq_lib.ted.baselines import baseline_filters, layerwise, projected
from zq_lib.ted.cache import StateCache
from zq_lib.ted.config import TedConfig
from zq_lib.ted.distillation import DistilStep, distil
from zq_lib.ted.divergence import divergence
from zq_lib.ted.filtered import Filtered, filtered_error
from zq_lib.ted.filters import LayerReport, TaskFilters, task_filters
from zq_lib.ted.layers import Match, Seen, match, see, watch
from zq_lib.ted.loss import TedLoss, Terms, check_tokenizers
from zq_lib.ted.probe import probe
from zq_lib.ted.stage_one import FilterStep, fit
from zq_lib.ted.storage import load_filters, save_filters

__all__ = [
    "DistilStep",
    "FilterStep",
    "Filtered",
    "LayerReport",
    "Match",
    "Seen",
    "StateCache",
    "TaskFilters",
    "TedConfig",
    "TedLoss",
    "TedTrainer",
    "Terms",
    "baseline_filters",
    "check_tokenizers",
    "distil",
    "divergence",
    "filtered_error",
    "fit",
    "layerwise",
    "load_filters",
    "match",
    "probe",
    "projected",
    "save_filters",
    "see",
    "task_filters",
    "watch",
]


def __getattr__(name: str) -> Any:
    """The trainer is imported on first use: its base class pulls in the whole Trainer."""
    if name == "TedTrainer":
        return import_module(f"{__name__}.trainer").TedTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

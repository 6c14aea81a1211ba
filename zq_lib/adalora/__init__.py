"""AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning (Zhang et al., ICLR 2023, arXiv 2303.10512).

>>> from zq_lib import adalora
>>> handle = adalora.attach(model, total_steps=1000)
>>> optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, weight_decay=0)
>>> # train as ever; the ranks find their place by themselves
>>> handle.report().ranks
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zq_lib.adalora.adaptation import Adaptation, AdaptationReport, attach
from zq_lib.adalora.allocation import allocate
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.adalora.peft_format import from_loralib, from_peft, to_peft_adalora, to_peft_lora
from zq_lib.adalora.planner import Plan, plan
from zq_lib.adalora.schedule import Schedule
from zq_lib.adalora.trace import RankTrace

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "Adaptation",
    "AdaptationReport",
    "Plan",
    "RankTrace",
    "Schedule",
    "allocate",
    "attach",
    "from_loralib",
    "from_peft",
    "plan",
    "to_peft_adalora",
    "to_peft_lora",
]


def __getattr__(name: str) -> Any:
    """The callback is imported on first use: its base class pulls in the whole Trainer."""
    if name == "AdaLoraCallback":
        return import_module(f"{__name__}.trainer").AdaLoraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

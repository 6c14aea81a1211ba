"""LoSparse: low-rank plus structured-sparse compression (Li et al., ICML 2023, arXiv 2306.11222).

>>> from zq_lib import losparse
>>> handle = losparse.attach(model, low_rank=0.05, remaining=0.15, total_steps=1000)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
>>> # train as ever; rows are dropped and, in the end, cut by themselves
>>> handle.finish().ratio
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zq_lib.losparse.calibration import calibrate, compress_once
from zq_lib.losparse.compression import Compression, attach
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.distill import DistillationLoss
from zq_lib.losparse.layer import LowRankSparse
from zq_lib.losparse.peft_format import to_peft_lora
from zq_lib.losparse.planner import Plan, plan
from zq_lib.losparse.report import CompressionReport, LayerReport
from zq_lib.losparse.schedule import Schedule
from zq_lib.losparse.storage import load_compressed, merge, save_compressed, save_dense
from zq_lib.losparse.trace import DensityTrace

__all__ = [
    "Compression",
    "CompressionReport",
    "DensityTrace",
    "DistillationLoss",
    "LayerReport",
    "LoSparseCallback",
    "LoSparseConfig",
    "LowRankSparse",
    "Plan",
    "Schedule",
    "attach",
    "calibrate",
    "compress_once",
    "load_compressed",
    "merge",
    "plan",
    "save_compressed",
    "save_dense",
    "to_peft_lora",
]


def __getattr__(name: str) -> Any:
    """The callback is imported on first use: its base class pulls in the whole Trainer."""
    if name == "LoSparseCallback":
        return import_module(f"{__name__}.trainer").LoSparseCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

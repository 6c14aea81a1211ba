"""The folder that PEFT keeps an adapter in, written without `peft`: its names, and what every kind of adapter has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def write_adapter(
    folder: str | Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    model: nn.Module,
    fan_in_fan_out: bool,
    dropout: float = 0.0,
    trained: Sequence[str] = (),
) -> Path:
    """Write an adapter of `model` (its name is kept, unless it is a folder) with the `settings` of its kind.

    `fan_in_fan_out` if its layers are Conv1D; `trained` are the modules that are stored whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = getattr(model, "name_or_path", "") or None
    common = {
        "base_model_name_or_path": None if source is None or Path(source).exists() else source,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_dropout": dropout,
        "modules_to_save": sorted(trained) or None,
        "task_type": None,
    }
    (folder / CONFIG).write_text(json.dumps(common | dict(settings), indent=2) + "\n")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def lora_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """A plain LoRA with a rank for every layer and alpha = rank, so that its update is B A as it stands."""
    most = max(ranks.values())
    return {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": dict(ranks), "alpha_pattern": dict(ranks),
        "target_modules": sorted(ranks), "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip

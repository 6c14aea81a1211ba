"""A compressed model as a base with few rows and a plain LoRA: any program that reads PEFT's folders can run it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zq_lib.core.peft import PREFIX, lora_settings, write_adapter
from zq_lib.losparse.storage import compressed_layers, save_dense

BASE = "base"


@torch.no_grad()
def to_peft_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write S as the base model, into `base`, and U V as its LoRA: A = V, B = U, alpha = rank, so nothing is rescaled.

    The base has its weights dense, zeros and all. The model itself stays compressed. Raises ValueError for a model
    without LoSparse layers, or whose layers have no low-rank part.

    >>> losparse.to_peft_lora(model, "lora")
    >>> PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("lora/base"), "lora")
    """
    folder, layers = Path(folder), compressed_layers(model)
    able = {name: layer for name, layer in layers.items() if layer.rank}
    if not able:
        raise ValueError("every layer has rank 0, and PEFT's LoRA has no such adapter; use save_dense")
    tensors = {}
    for name, layer in able.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.right.detach().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.left.detach().cpu()
    save_dense(model, folder / BASE, low_rank=False)
    settings = lora_settings({name: layer.rank for name, layer in able.items()})
    conv = any(layer.kind == "Conv1D" for layer in able.values())
    return write_adapter(folder, settings, tensors, model=model, fan_in_fan_out=conv)

"""Adapters to and from PEFT's folders (AdaLoRA and plain LoRA), and from the original code's state dictionaries.

The formats are written and read directly, so `peft` itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zq_lib.adalora.adaptation import Adaptation, attach
from zq_lib.adalora.adapter import AdaptedConv1D, AdaptedConv2d, AdaptedEmbedding, Triplets
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.core.peft import CONFIG, PREFIX, WEIGHTS, lora_settings, write_adapter


class Part(NamedTuple):
    """One adapter as read from a file: P [N, R], l [R], Q [R, K] and the factor in front."""

    left: Tensor
    values: Tensor
    right: Tensor
    scale: float


def to_peft_lora(handle: Adaptation, folder: str | Path) -> Path:
    """Write a plain PEFT LoRA adapter that computes the same: A = sqrt|s l| Q, B = P sign(l) sqrt|s l|.

    Layers of rank 0 are left out, and every other one has its own rank. Any consumer of LoRA can read it. Raises
    RuntimeError before the ranks are final and ValueError if no rank is left at all.
    """
    tensors, ranks = _trained(handle), {}
    for path, part in _final(handle).items():
        if not len(part.values):
            continue
        root = (part.scale * part.values).abs().sqrt()
        a, b = root[:, None] * part.right, part.left * (part.values.sign() * root)
        base = handle.layers[path].base
        if isinstance(handle.layers[path], AdaptedEmbedding):
            tensors[f"{PREFIX}{path}.lora_embedding_A"], tensors[f"{PREFIX}{path}.lora_embedding_B"] = a, b
        else:
            if isinstance(handle.layers[path], AdaptedConv2d):
                a, b = a.view(-1, *base.weight.shape[1:]), b[:, :, None, None]
            tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
        ranks[path] = len(part.values)
    if not ranks:
        raise ValueError("every layer has rank 0, and PEFT's LoRA has no such adapter; raise the budget")
    return _write(handle, folder, lora_settings(ranks), tensors)


def to_peft_adalora(handle: Adaptation, folder: str | Path) -> Path:
    """Write a PEFT AdaLoRA adapter; layers of rank 0 stay in it, empty.

    Raises RuntimeError before the ranks are final and ValueError for embeddings, which PEFT's AdaLoRA does not have.
    """
    tensors, pattern = _trained(handle), {}
    for (path, part), keep in zip(_final(handle).items(), handle.keep.tolist(), strict=True):
        if isinstance(handle.layers[path], AdaptedEmbedding):
            raise ValueError(f"{path!r} is an embedding, which PEFT's AdaLoRA cannot hold; use to_peft_lora")
        tensors[f"{PREFIX}{path}.lora_A"], tensors[f"{PREFIX}{path}.lora_B"] = part.right, part.left
        tensors[f"{PREFIX}{path}.lora_E"] = part.values[:, None]
        pattern[f"{path}.lora_E"] = keep
    config, schedule = handle.config, handle.schedule
    settings = {
        "peft_type": "ADALORA", "init_r": config.init_rank, "target_r": max(1, round(float(config.target_rank))),
        "tinit": schedule.warmup, "tfinal": schedule.final, "deltaT": schedule.interval,
        "beta1": config.beta1, "beta2": config.beta2, "orth_reg_weight": config.orthogonality,
        "total_step": schedule.total, "lora_alpha": config.scale * (config.init_rank + 1e-5),
        "target_modules": list(handle.layers), "rank_pattern": pattern, "init_lora_weights": True,
    }  # fmt: skip
    return _write(handle, folder, settings, tensors)


def _final(handle: Adaptation) -> dict[str, Part]:
    """The kept triplets of every layer."""
    if not handle.finished:
        raise RuntimeError(
            f"step {handle.step} is before the ranks are final, so the adapter would miss its budget; train on, or "
            "call finish() first"
        )
    parts = {}
    for (path, adapter), keep in zip(handle.triplets.items(), handle.keep, strict=True):
        index = torch.arange(adapter.rank) if handle.shrunk else keep.nonzero()[:, 0].cpu()
        left, values, right = (t.detach().cpu() for t in (adapter.left, adapter.values, adapter.right))
        parts[path] = Part(left[:, index], values[index], right[index], adapter.scale)
    return parts


def _trained(handle: Adaptation) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.{name}": p.detach().cpu()
        for path, module in handle.trained.items()
        for name, p in module.named_parameters()
    }


def _write(handle: Adaptation, folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    conv = any(isinstance(layer, AdaptedConv1D) for layer in handle.layers.values())
    return write_adapter(
        folder, settings, tensors, model=handle.model, fan_in_fan_out=conv, dropout=handle.config.dropout,
        trained=list(handle.trained),
    )  # fmt: skip


def from_peft(model: nn.Module, folder: str | Path, name: str = "default") -> Adaptation:
    """Attach an adapter from a PEFT folder (LoRA or AdaLoRA) to `model`. Its ranks are final; it can be trained on.

    Raises FileNotFoundError for a folder that holds none, and ValueError for other kinds of adapter and for variants
    (DoRA, trained biases) that are no low-rank update.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder.name!r} holds no PEFT adapter; it needs {CONFIG} and {WEIGHTS}")
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"the adapter's peft_type is {kind!r}; only LORA and ADALORA can be read")
    for field, plain in (("use_dora", False), ("bias", "none")):
        if config.get(field, plain) != plain:
            raise ValueError(f"the adapter has {field}={config[field]!r}, which is no low-rank update of the weights")
    found: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        hit = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([ABE])(?:\.weight)?", key.removeprefix(PREFIX))
        if hit is None:
            trained[key.removeprefix(PREFIX)] = tensor
        else:
            found.setdefault(hit[1], {})[hit[2]] = tensor
    parts = {}
    for path, t in found.items():
        if kind == "ADALORA":
            scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
            parts[path] = Part(t["B"], t["E"].view(-1), t["A"], scale)
        else:
            rank, alpha = t["A"].shape[0], _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            parts[path] = Part(t["B"].flatten(1), torch.ones(rank), t["A"].flatten(1), scale)
    return _attach(model, parts, trained, name)


def from_loralib(model: nn.Module, state: Mapping[str, Tensor], alpha: float, name: str = "default") -> Adaptation:
    """Attach the adapters in a state dictionary of the paper's own code: `<layer>.lora_A`, `.lora_E`, `.lora_B`,
    `.ranknum`. That code does not store `alpha`, so it must be given. Raises ValueError if there are none."""
    paths = [key.removesuffix(".lora_E") for key in state if key.endswith(".lora_E")]
    if not paths:
        raise ValueError("the state has no key that ends in '.lora_E', so it is none of the original AdaLoRA code")
    parts = {}
    for path in paths:
        left, values, right = (state[f"{path}.lora_{x}"] for x in "BEA")
        parts[path] = Part(left, values.view(-1), right, alpha / (float(state[f"{path}.ranknum"]) + 1e-5))
    return _attach(model, parts, {}, name)


def _pattern(pattern: Mapping[str, float] | None, path: str, default: float) -> float:
    """PEFT's rule: the first key that is a regular expression for the path's end."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", path)), default)


@torch.no_grad()
def _attach(model: nn.Module, parts: Mapping[str, Part], trained: Mapping[str, Tensor], name: str) -> Adaptation:
    most = max(1, max((len(p.values) for p in parts.values()), default=1))
    modules = tuple(dict.fromkeys(key.rpartition(".")[0] for key in trained))
    config = AdaLoraConfig(
        init_rank=most, target_rank=most, total_steps=1, warmup=0, final=0, orthogonality=0.0, targets=tuple(parts),
        train_also=modules,
    )  # fmt: skip
    with warnings.catch_warnings():  # ranks are final, so there is nothing to prune
        warnings.simplefilter("ignore", UserWarning)
        handle = attach(model, config, name=name)
    if set(handle.triplets) != set(parts):
        missing = next(iter(set(parts) ^ set(handle.triplets)))
        handle.detach()
        raise ValueError(f"the adapter is for another model: {missing!r} does not fit this {type(model).__name__}")
    for i, (path, adapter) in enumerate(handle.triplets.items()):
        _fill(adapter, parts[path], path, handle)
        handle.keep[i] = torch.arange(most) < adapter.rank
    for key, tensor in trained.items():
        model.get_parameter(key).copy_(tensor)
    handle.shrunk, handle.importance = True, None
    return handle


def _fill(adapter: Triplets, part: Part, path: str, handle: Adaptation) -> None:
    shape = (part.left.shape[0], part.right.shape[1])
    if shape != (adapter.left.shape[0], adapter.right.shape[1]):
        handle.detach()
        raise ValueError(
            f"{path!r} is {adapter.left.shape[0]} x {adapter.right.shape[1]} in this model and {shape[0]} x {shape[1]} "
            "in the adapter; give the model it was made for"
        )
    adapter.resize(len(part.values))
    adapter.scale = part.scale
    for own, given in ((adapter.left, part.left), (adapter.values, part.values), (adapter.right, part.right)):
        own.copy_(given)

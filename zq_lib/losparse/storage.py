"""A compressed model on disk: small as it is, or whole and dense for those who know nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zq_lib.core.targets import places_of
from zq_lib.losparse.layer import LowRankSparse, size_of, why_not

WEIGHTS, FACTS, DENSE = "losparse_model.safetensors", "losparse_model.json", "model.safetensors"


def compressed_layers(model: nn.Module) -> dict[str, LowRankSparse]:
    """The LoSparse layers of a model by name. Raises ValueError if there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LowRankSparse)}
    if not found:
        raise ValueError(f"this {type(model).__name__} holds no LoSparse layer; attach and train, or load one first")
    return found


def merge(model: nn.Module) -> nn.Module:
    """Turn every LoSparse layer of `model` into the dense layer that it computes, in place. Returns the model."""
    for layer in compressed_layers(model).values():
        dense = layer.merge()
        for parent, child in places_of(model, {layer})[layer]:
            setattr(parent, child, dense)
    return model


@torch.no_grad()
def dense_state(model: nn.Module, low_rank: bool = True) -> dict[str, Tensor]:
    """The state dictionary of the merged model, without merging it; with `low_rank=False` of S alone, zeros and all."""
    state = dict(model.state_dict())
    for name, layer in compressed_layers(model).items():
        for part in ("left", "right", "sparse", "rows"):
            state.pop(f"{name}.{part}", None)
        whole = layer.merge().weight if low_rank else layer.dense_sparse()
        state[f"{name}.weight"] = whole.detach() if low_rank or layer.kind == "Linear" else whole.detach().T
    return state


def save_dense(model: nn.Module, folder: str | Path, low_rank: bool = True) -> Path:
    """Write the merged model for any program that reads such models: transformers' own folder, or `model.safetensors`.

    `low_rank=False` leaves U V out, for `to_peft_lora`. The model itself stays compressed.
    """
    folder, state = Path(folder), dense_state(model, low_rank)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=state)
    else:
        save_file(_alone(state)[0], folder / DENSE)
    return folder


def save_compressed(model: nn.Module, folder: str | Path) -> Path:
    """Write a model whose rows are cut: all its tensors, each once, and what its layers are. Nothing is pickled.

    A transformers config goes with it. Raises ValueError for a model without LoSparse layers, RuntimeError before the
    rows are cut.
    """
    folder, layers = Path(folder), compressed_layers(model)
    if whole := next((name for name, layer in layers.items() if not layer.shrunk), None):
        raise RuntimeError(f"layer {whole!r} still holds all its rows; call handle.finish() before you save the model")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, same = _alone(model.state_dict())
    facts = {
        "model": type(model).__name__,
        "layers": {
            name: {"outputs": m.out_features, "inputs": m.in_features, "rank": m.rank, "rows": len(m.rows)}
            for name, m in layers.items()
        },
        "same": same,
    }
    save_file(tensors, folder / WEIGHTS)
    if hasattr(config := getattr(model, "config", None), "save_pretrained"):
        config.save_pretrained(folder)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return folder


@torch.no_grad()
def load_compressed(model: nn.Module, folder: str | Path, backend: str = "auto") -> nn.Module:
    """Read what `save_compressed` wrote into a fresh, dense model of the same architecture, in place. Returns it.

    Raises FileNotFoundError for a folder without it, and ValueError, with the model as it was, for another model.

    >>> losparse.save_compressed(model, "small")
    >>> fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("small"))
    >>> losparse.load_compressed(fresh, "small")
    """
    folder = Path(folder)
    if not (folder / FACTS).exists():
        raise FileNotFoundError(f"{folder.name!r} holds no compressed model; it needs {FACTS} and {WEIGHTS}")
    facts, tensors = json.loads((folder / FACTS).read_text()), load_file(folder / WEIGHTS)
    tensors |= {name: tensors[first] for name, first in facts["same"].items()}
    _check(model, facts, tensors)
    for name, size in facts["layers"].items():
        dense = model.get_submodule(name)
        layer = LowRankSparse.from_dense(dense, 0)
        for parent, child in places_of(model, {dense})[dense]:
            setattr(parent, child, layer)
        layer.resize(size["rank"], size["rows"])
        layer.backend = backend
    model.load_state_dict(tensors)
    return model


def _check(model: nn.Module, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the model has the layers, and all other tensors in the same shapes."""
    modules, own = dict(model.named_modules()), {k: tuple(t.shape) for k, t in model.state_dict().items()}
    for name, size in facts["layers"].items():
        layer = modules.get(name)
        if layer is None or why_not(layer):
            reason = "has none of that name" if layer is None else why_not(layer)
            raise ValueError(
                f"the file compresses layer {name!r}, which in this model {reason}; give the same architecture"
            )
        if size_of(layer) != (size["outputs"], size["inputs"]):
            raise ValueError(
                f"layer {name!r} is {size['outputs']} x {size['inputs']} in the file and {size_of(layer)[0]} x "
                f"{size_of(layer)[1]} in this model; give the same architecture"
            )
        own.pop(f"{name}.weight")
        own |= {
            f"{name}.{part}": tuple(tensors[f"{name}.{part}"].shape) for part in ("left", "right", "sparse", "rows")
        }
    found = {k: tuple(t.shape) for k, t in tensors.items()}
    for name in sorted(own.keys() | found.keys()):
        if own.get(name) != found.get(name):
            raise ValueError(
                f"tensor {name!r} has shape {found.get(name)} in the file and {own.get(name)} in this model; give the "
                "same architecture"
            )


def _alone(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, in memory of its own, and the names that mean the same tensor as an earlier one."""
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for name, t in state.items():
        key = (t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,)
        if key in first:
            same[name] = first[key]
        else:
            first[key] = name
            own = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
            tensors[name] = t.detach() if own else t.detach().clone(memory_format=torch.contiguous_format)
    return tensors, same

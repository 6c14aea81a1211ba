"""A compressed prefix on disk: one safetensors file with every tensor of a GearCache and what it belongs to.

No pickle is read or written. A file is written beside its final place and then renamed, and carries a SHA-256 of its
tensors and its description, so that a killed process, a truncated copy or a flipped bit never yields a wrong cache.
The digest finds accidents and careless edits; it is no signature against somebody who writes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from zq_lib.gear.cache import GearCache, GearLayer
from zq_lib.gear.config import GearConfig
from zq_lib.gear.packed import Block, Packed

FORMAT = 1  # raise it whenever a file's meaning changes
ABOUT, DIGEST = "zq_gear", "zq_sha256"  # entries of the safetensors header
PLAIN = [f.name for f in fields(Packed) if f.type in ("str", "int", "bool")]  # what is not a tensor
OPTIONAL = ("columns", "valid")  # tensors of a layer that may be absent


def save(cache: GearCache, path: str | Path) -> None:
    """Write `cache` to `path`; a file that is there is replaced only when the new one is whole.

    Sliding-window layers are saved as they are. Raises ValueError for an empty cache and for layers of other kinds.
    """
    if not cache.get_seq_length():
        raise ValueError("the cache is empty; run the model with it first")
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        about, found = _take_apart(i, layer)
        layers.append(about | {"config": asdict(cache.gear[i])})
        tensors |= {f"{i}.{name}": x.detach().cpu().contiguous() for name, x in found.items()}
    about = json.dumps(
        {"format": FORMAT, "model": fingerprint(cache.model_config), "layers": layers}, sort_keys=True, allow_nan=False
    )
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, beside, {ABOUT: about, DIGEST: _digest(about, tensors)})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path, config: PretrainedConfig, device: str | torch.device = "cpu") -> GearCache:
    """The cache that `save` wrote, on `device`, for the model of this `config`.

    It goes on exactly as the saved one would. The model is recognised by its type and sizes, not by its weights. Raises
    FileNotFoundError, and ValueError for a file that is truncated, changed, of another model or of another format.
    """
    path = Path(path)
    about, tensors = _read(path)
    expected, here = about["model"], fingerprint(config)
    if other := [name for name in here | expected if expected.get(name) != here.get(name)]:
        name = other[0]
        raise ValueError(
            f"path={str(path)!r} was saved for a model with {name}={expected.get(name)!r}, not {here.get(name)!r}; "
            "load it with the config of the model that made it"
        )
    gear = [layer["config"] for layer in about["layers"]]
    if unknown := sorted(set().union(*gear) - {f.name for f in fields(GearConfig)}):
        raise ValueError(
            f"path={str(path)!r} has settings that this version of zq_lib does not know, {', '.join(unknown)}; load it "
            "with the version that wrote it"
        )
    cache = GearCache(config, [GearConfig(**settings) for settings in gear])
    for i, (layer, kept) in enumerate(zip(cache.layers, about["layers"], strict=True)):
        here = _kind(layer)
        if here != kept["kind"]:
            raise ValueError(
                f"path={str(path)!r} holds a {kept['kind']} for layer {i}, where this model has a {here}; load it with "
                "the config of the model that made it"
            )
        _put_together(layer, kept, {name: tensors[f"{i}.{name}"].to(device) for name in kept["tensors"]})
    return cache


def fingerprint(config: PretrainedConfig) -> dict[str, Any]:
    """What tells one model's cache from another's, as far as a config can: type, layers, heads, widths, vocabulary."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "heads": heads,
        "key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "width": text.hidden_size,
        "head_width": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocabulary": text.vocab_size,
    }


def _kind(layer: CacheLayerMixin) -> str:
    window = f" of {layer.sliding_window} tokens" if isinstance(layer, DynamicSlidingWindowLayer) else ""
    return type(layer).__name__ + window


def _take_apart(index: int, layer: CacheLayerMixin) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer as plain numbers and named tensors."""
    about: dict[str, Any] = {"kind": _kind(layer), "record_past": getattr(layer, "record_past", False)}
    found: dict[str, Tensor] = {}
    if isinstance(layer, GearLayer):
        about |= {"sinks": layer.sinks, "blocks": []}
        for j, block in enumerate(layer.blocks):
            sides = {"keys": block.keys, "values": block.values}
            about["blocks"].append(
                {"length": block.length}
                | {side: {name: getattr(packed, name) for name in PLAIN} for side, packed in sides.items()}
            )
            for side, packed in sides.items():
                found |= {f"{j}.{side}.{name}": x for name, x in packed.tensors().items()}
        if layer.is_initialized:
            found |= {"exact_keys": layer.exact_keys, "exact_values": layer.exact_values}
        found |= {name: getattr(layer, name) for name in OPTIONAL if getattr(layer, name) is not None}
    elif type(layer) is DynamicSlidingWindowLayer:
        about["cumulative_length"] = layer.cumulative_length
        if layer.is_initialized:
            found |= {"keys": layer.keys, "values": layer.values}
    else:
        raise ValueError(
            f"layer {index} is a {type(layer).__name__}, which cannot be saved; only caches of full and sliding-window "
            "attention can"
        )
    return about | {"tensors": list(found)}, found


def _put_together(layer: GearLayer | DynamicSlidingWindowLayer, kept: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Inverse of `_take_apart`, into a new layer."""
    layer.record_past = kept["record_past"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = kept["cumulative_length"]
        if found:
            layer.lazy_initialization(found["keys"], found["values"])
            layer.keys, layer.values = found["keys"], found["values"]
        return
    if "exact_keys" in found:
        layer.lazy_initialization(found["exact_keys"], found["exact_values"])
        layer.exact_keys, layer.exact_values = found["exact_keys"], found["exact_values"]
    layer.sinks = kept["sinks"]
    layer.columns, layer.valid = (found.get(name) for name in OPTIONAL)
    layer.blocks = tuple(
        Block(*(_side(found, f"{j}.{side}.", block[side]) for side in ("keys", "values")), block["length"])
        for j, block in enumerate(kept["blocks"])
    )


def _side(found: Mapping[str, Tensor], start: str, plain: dict[str, Any]) -> Packed:
    return Packed(**plain, **{name.removeprefix(start): x for name, x in found.items() if name.startswith(start)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file that is whole, unchanged and of this format."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if ABOUT not in header:
                raise ValueError(f"path={str(path)!r} holds no GEAR cache; give a file that GearCache.save wrote")
            # copies: the file's own memory would stay mapped as a whole, and could change after the check
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"path={str(path)!r} is truncated or no safetensors file ({error}); save the cache again"
        ) from error
    try:
        about = json.loads(header[ABOUT])
        version = about["format"]
    except (ValueError, KeyError, TypeError):
        version = about = None
    if about is not None and version != FORMAT:
        raise ValueError(
            f"path={str(path)!r} has format {version!r}, but this version of zq_lib reads format {FORMAT}; save the "
            "cache again, or load it with the version that wrote it"
        )
    if about is None or header.get(DIGEST) != _digest(header[ABOUT], tensors):
        raise ValueError(
            f"path={str(path)!r} was changed after it was saved: its SHA-256 does not match; save the cache again"
        )
    return about, tensors


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description and every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy() if x.numel() else b"")
    return found.hexdigest()

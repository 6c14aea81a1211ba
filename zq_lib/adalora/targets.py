"""Which layers of a model are meant: patterns of module names, and a clear word when they mean nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from zq_lib.adalora.adapter import Adapted, AdaptedConv1D, AdaptedLinear, kind_of, why_not
from zq_lib.adalora.config import ALL_LINEAR, Ranks


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module name is `pattern`, ends with it after a dot, or fits it as a shell pattern.

    >>> [matches("layer.0.attention.self.query", p) for p in ("query", "self.query", "layer.*.query", "que")]
    [True, True, True, False]
    """
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers to adapt by name, in the model's order; a layer that is used twice is listed once.

    "all-linear" means every linear layer inside a block, that is below a numbered module, so no head and no embedding.
    Raises ValueError for a pattern that matches nothing, or only things that cannot be adapted.
    """
    modules = {name: _bare(module) for name, module in model.named_modules() if not _inside(model, name)}
    if targets == ALL_LINEAR:
        blocks = {n: m for n, m in modules.items() if any(part.isdigit() for part in n.split("."))}
        found = {n: m for n, m in blocks.items() if kind_of(m) in (AdaptedLinear, AdaptedConv1D)}
        if not found:
            raise ValueError(
                f"targets='all-linear' matches nothing in this {type(model).__name__}: no linear layer lies in a "
                'numbered block; name the layers, for example targets=("fc1", "fc2")'
            )
        return found
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        named = [name for name in modules if name and matches(name, pattern)]
        able = [name for name in named if not why_not(modules[name])]
        if not named:
            last = sorted({n.split(".")[-1] for n, m in modules.items() if n and not why_not(m)})
            near = difflib.get_close_matches(pattern.split(".")[-1], last, n=3) or last[:8]
            raise ValueError(
                f"targets has {pattern!r}, which matches no module of this {type(model).__name__}; "
                f"there are for example {', '.join(near) or 'no layers that could be adapted'}"
            )
        if len(able) < len(named):
            bad = next(name for name in named if name not in able)
            raise ValueError(f"targets has {pattern!r}, but {bad!r} {why_not(modules[bad])}; use a narrower pattern")
        chosen |= set(able)
    return {name: module for name, module in modules.items() if name in chosen}


def find_trained(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that are trained in full, by name. Raises ValueError for a pattern that matches nothing."""
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        named = {n: m for n, m in model.named_modules() if n and matches(n, pattern) and list(m.parameters())}
        if not named:
            top = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"train_also has {pattern!r}, which matches no module with parameters; there are {top}")
        found |= named
    return {n: m for n, m in found.items() if not any(n.startswith(other + ".") for other in found)}


def places_of(model: nn.Module, layers: set[nn.Module]) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each layer hangs: parent and name, for every place that uses it."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {layer: [] for layer in layers}
    for parent in model.modules():
        for child, module in parent._modules.items() if not isinstance(parent, Adapted) else ():
            bare = _bare(module)
            if bare in places:
                places[bare].append((parent, child))
    return places


def per_matrix(setting: str, ranks: Ranks | None, layers: Mapping[str, nn.Module], default: int) -> Tensor:
    """One bound per layer; of several patterns that fit, the last counts."""
    bounds = torch.full((len(layers),), default if ranks is None or isinstance(ranks, Mapping) else ranks)
    for pattern, rank in ranks.items() if isinstance(ranks, Mapping) else ():
        hit = [i for i, name in enumerate(layers) if matches(name, pattern)]
        if not hit:
            raise ValueError(f"{setting} has {pattern!r}, which matches none of the {len(layers)} adapted layers")
        bounds[hit] = rank
    return bounds


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Adapted) else module


def _inside(model: nn.Module, name: str) -> bool:
    """Whether a name leads into an adapted layer: its `base`, its adapters."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), Adapted) for i in range(1, len(parts)))

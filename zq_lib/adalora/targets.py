"""Which layers of a model are meant: patterns of module names, and a clear word when they mean nothing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from zq_lib.adalora.adapter import Adapted, AdaptedConv1D, AdaptedLinear, kind_of, why_not
from zq_lib.core import targets as core
from zq_lib.core.targets import choose_layers, matches


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers to adapt by name, in the model's order; a layer that is used twice is listed once.

    "all-linear" means every linear layer inside a block, that is below a numbered module, so no head and no embedding.
    Raises ValueError for a pattern that matches nothing, or only things that cannot be adapted.
    """
    modules = {name: _bare(module) for name, module in model.named_modules() if not _inside(model, name)}
    return choose_layers(
        model, modules, targets, why_not, lambda m: kind_of(m) in (AdaptedLinear, AdaptedConv1D), "adapted"
    )


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
    """Where each layer hangs, adapted already or not: parent and name, for every place that uses it."""
    return core.places_of(model, layers, _bare, lambda parent: isinstance(parent, Adapted))


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Adapted) else module


def _inside(model: nn.Module, name: str) -> bool:
    """Whether a name leads into an adapted layer: its `base`, its adapters."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), Adapted) for i in range(1, len(parts)))

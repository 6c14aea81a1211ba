"""Which layers of a model are meant: patterns of module names, and a clear word when they mean nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

ALL_LINEAR = "all-linear"


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module name is `pattern`, ends with it after a dot, or fits it as a shell pattern.

    >>> [matches("layer.0.attention.self.query", p) for p in ("query", "self.query", "layer.*.query", "que")]
    [True, True, True, False]
    """
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)


def choose_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    targets: str | Iterable[str],
    why_not: Callable[[nn.Module], str],
    linear: Callable[[nn.Module], bool],
    done: str,
) -> dict[str, nn.Module]:
    """The layers that `targets` means among the named `modules` of `model`, in their order.

    "all-linear" means every one that is `linear` inside a block, that is below a numbered module, so no head and no
    embedding. `why_not` says why a layer is not able, or nothing; `done` is the verb for it, "adapted". Raises
    ValueError for a pattern that matches nothing, or a layer that is not able.
    """
    if targets == ALL_LINEAR:
        found = {n: m for n, m in modules.items() if any(part.isdigit() for part in n.split(".")) and linear(m)}
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
                f"there are for example {', '.join(near) or f'no layers that could be {done}'}"
            )
        if len(able) < len(named):
            bad = next(name for name in named if name not in able)
            raise ValueError(f"targets has {pattern!r}, but {bad!r} {why_not(modules[bad])}; use a narrower pattern")
        chosen |= set(able)
    return {name: module for name, module in modules.items() if name in chosen}


def per_matrix(
    setting: str, given: float | Mapping[str, float] | None, names: Iterable[str], default: float, done: str
) -> Tensor:
    """One bound per layer, [n]; of several patterns that fit, the last counts. Raises ValueError for one without a
    match."""
    names = list(names)
    bounds = torch.full((len(names),), default if given is None or isinstance(given, Mapping) else given)
    for pattern, bound in given.items() if isinstance(given, Mapping) else ():
        hit = [i for i, name in enumerate(names) if matches(name, pattern)]
        if not hit:
            raise ValueError(f"{setting} has {pattern!r}, which matches none of the {len(names)} {done} layers")
        bounds[hit] = bound
    return bounds


def places_of(
    model: nn.Module,
    layers: set[nn.Module],
    bare: Callable[[nn.Module], nn.Module] = lambda module: module,
    inner: Callable[[nn.Module], bool] = lambda module: False,
) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each layer hangs: parent and name, for every place that uses it.

    `bare` takes a wrapper off a child; parents that are `inner` do not count.
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {layer: [] for layer in layers}
    for parent in model.modules():
        for child, module in parent._modules.items() if not inner(parent) else ():
            if bare(module) in places:
                places[bare(module)].append((parent, child))
    return places

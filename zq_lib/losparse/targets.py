"""Which layers of a model become U V + S: linear ones of the blocks, whose weight is theirs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn, tensor

from zq_lib.core.targets import ALL_LINEAR, choose_layers, matches, per_matrix
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Factors
from zq_lib.losparse.layer import LowRankSparse, quantised, size_of, why_not


def find_layers(
    model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR, skip: Sequence[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to compress by name, in the model's order, and those left dense with the reason.

    Weights that another module shares are left dense under "all-linear" and refused where they are named: compressing
    one place would untie them. Raises ValueError for a model that is compressed already or quantised, and for patterns
    that match nothing.
    """
    modules = dict(model.named_modules())
    if any(isinstance(m, LowRankSparse) for m in modules.values()):
        raise ValueError("the model holds LoSparse layers already; call merge(model) first, or go on with their handle")
    if codes := next((n for n, m in modules.items() if quantised(m)), None):
        raise ValueError(f"{codes!r} {why_not(modules[codes])}")
    found = choose_layers(model, modules, targets, why_not, lambda m: not why_not(m), "compressed")
    left: dict[str, str] = {}
    for pattern in skip:
        hit = [name for name in found if matches(name, pattern)]
        if not hit:
            raise ValueError(
                f"skip has {pattern!r}, which matches none of the {len(found)} layers of targets; remove it"
            )
        left |= dict.fromkeys(hit, "skip names it")
    tied = _tied(model, found)
    for name, other in tied.items():
        if targets != ALL_LINEAR and name not in left:
            raise ValueError(
                f"targets names {name!r}, which shares its weight with {other!r}; untie them or leave it out"
            )
        left.setdefault(name, f"it shares its weight with {other!r}")
    chosen = {n: m for n, m in found.items() if n not in left}
    if not chosen:
        name, reason = next(iter(left.items()))
        raise ValueError(f"no layer is left to compress: {name!r} stays dense because {reason}")
    if len({m.weight.device for m in chosen.values()}) > 1:
        raise ValueError("the layers are on several devices; put the model on one device before attach")
    return chosen, left


def row_bounds(config: LoSparseConfig, layers: Mapping[str, nn.Module]) -> tuple[Tensor | None, Tensor | None]:
    """Least and most rows that each layer keeps, [n] each, or None without bounds.

    Raises ValueError for a pattern that matches nothing, and where the least is more than `remaining` allows.
    """
    if not config.bounded:
        return None, None
    outputs, inputs = (tensor(sizes) for sizes in zip(*map(size_of, layers.values()), strict=True))
    least = per_matrix("min_rows", config.min_rows, layers, 0, "compressed").long().minimum(outputs)
    most = (per_matrix("max_share", config.max_share, layers, 1.0, "compressed") * outputs).floor().long()
    needed, allowed = int((least * inputs).sum()), config.remaining * int((outputs * inputs).sum())
    if needed > allowed:
        raise ValueError(
            f"min_rows={config.min_rows!r} needs {needed} entries of S and remaining={config.remaining} leaves "
            f"{int(allowed)}; raise remaining or lower min_rows"
        )
    return least, most


def check_factors(config: LoSparseConfig, layers: Mapping[str, nn.Module], factors: Factors | None) -> None:
    """Raise ValueError unless there are factors where the config needs them, and they fit every layer."""
    if factors is None:
        if config.init == "activation":
            raise ValueError(
                "init='activation' needs factors that have seen inputs; use compress_once, or give attach the "
                "factors of find_factors"
            )
        return
    for name, layer in layers.items():
        if name not in factors:
            raise ValueError(f"factors has none for layer {name!r}; give U and V for every layer, or skip it")
        outputs, inputs = size_of(layer)
        left, right = factors[name]
        if left.dim() != 2 or right.shape != (left.shape[1], inputs) or left.shape[0] != outputs:
            raise ValueError(
                f"factors of {name!r} have shapes {tuple(left.shape)} and {tuple(right.shape)}; its weight needs "
                f"[{outputs}, r] and [r, {inputs}]"
            )


def _tied(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Layers whose weight belongs to another module as well -> that module."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append((name, module))
    return {
        name: other
        for name, layer in layers.items()
        for other, module in owners[id(layer.weight)]
        if module is not layer
    }

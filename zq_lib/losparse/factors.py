"""U and V that a layer begins with: of its weight alone, or of what the weight does to the layer's inputs.

The paper takes the weight's own singular value decomposition (section 1.2 of the method's description). The
activation-aware factors are ours (7.3): what is small in W need not be small in W x, so W L is decomposed, where L L^T
is the covariance of the layer's inputs. Layers are visited one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zq_lib.losparse.config import LoSparseConfig

Batch = Mapping[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> U [N, r], V [r, K]
Say = Callable[[str], None]

RIDGE = 0.01  # of the covariance's mean diagonal, so that a direction no batch has used is not free to be destroyed
AT_ONCE = 1 << 29  # bytes of covariances kept at a time; a model with more takes several passes over the batches


@torch.no_grad()
def factorise(weight: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The U [N, rank] and V [rank, K] whose product is nearest to `weight` [N, K], both with scale sqrt(sigma).

    Nearest in the sum of squares, or, with the `covariance` C = X^T X [K, K] of the layer's inputs, in the squared
    error of its outputs. Computed in fp64 from the smaller Gram matrix; the first columns are the factors of a smaller
    rank. Raises ValueError for a covariance that is all zero or not finite.
    """
    w = weight.double()
    m, root = w, None
    if covariance is not None:
        root = _root(covariance.double())
        m = w @ root
    wide = m.shape[0] <= m.shape[1]
    squares, vectors = torch.linalg.eigh(m @ m.T if wide else m.T @ m)  # ascending
    kept = slice(len(squares) - rank, len(squares))
    sigma, vectors = squares[kept].flip(0).clamp_min(0).sqrt(), vectors[:, kept].flip(1)
    size = sigma.sqrt()
    inverse = torch.where(sigma > 1e-7 * squares[-1].clamp_min(0).sqrt(), 1 / size, 0.0)  # below it the Gram is noise
    if wide:
        left, right = vectors * size, inverse[:, None] * (vectors.T @ w)  # A^T (W L) L^-1 is A^T W
    else:
        left, right = (m @ vectors) * inverse, vectors.T
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)  # B^T L^-1
        right = size[:, None] * right
    return left.to(weight.dtype), right.to(weight.dtype)


def _root(covariance: Tensor) -> Tensor:
    """L with L L^T = C + ridge."""
    mean = covariance.diagonal().mean()
    if not (mean > 0 and torch.isfinite(covariance).all()):
        raise ValueError(
            f"covariance has the mean diagonal {float(mean)}: the layer saw only zeros or values that are not finite; "
            'give batches of ordinary inputs, or use init="svd"'
        )
    return torch.linalg.cholesky(covariance + RIDGE * mean * torch.eye(len(covariance)).to(covariance))


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as [N outputs, K inputs], whichever way it is stored."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


@torch.no_grad()
def covariances(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], at_once: int = AT_ONCE
) -> Iterator[tuple[str, Tensor]]:
    """X^T X [K, K] fp32 of each layer's inputs over all batches, padding left out; one (name, C) after the other.

    Raises ValueError for a layer that no batch reaches.
    """
    for names in _groups({n: 4 * matrix(m).shape[1] ** 2 for n, m in layers.items()}, at_once):
        found: dict[str, Tensor] = {}
        with _inputs({n: layers[n] for n in names}, found) as masked:
            for batch in batches:
                masked["mask"] = batch.get("attention_mask")
                model(**batch)
        for name in names:
            if name not in found:
                raise ValueError(
                    f"layer {name!r} saw no input in the {len(batches)} calibration batches; give batches that use it, "
                    "or leave it out with skip"
                )
            yield name, found.pop(name)


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, as many at a time as fit the limit, but at least one."""
    group, total = [], 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


@contextmanager
def _inputs(layers: Mapping[str, nn.Module], found: dict[str, Tensor]) -> Iterator[dict[str, Tensor | None]]:
    """Add X^T X of every layer's inputs to `found`; of padding where the running batch's "mask" is set."""
    now: dict[str, Tensor | None] = {"mask": None}

    def hook(name: str, x: Tensor) -> None:
        mask = now["mask"]
        padded = mask is not None and x.shape[:2] == mask.shape
        tokens = (x[mask.bool()] if padded else x.reshape(-1, x.shape[-1])).float()  # [tokens, K]
        gram = tokens.T @ tokens
        found[name] = found[name] + gram if name in found else gram

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


def find_factors(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: LoSparseConfig,
    batches: Sequence[Batch],
    say: Say = lambda _: None,
) -> Factors:
    """U and V of every layer at the config's rank, and as its `init` says; plain factors need no batch.

    Those of a smaller rank are their first columns and rows, see `cut`.
    """
    found: Factors = {}
    plain = config.init == "svd"
    seen = ((name, None) for name in layers) if plain else covariances(model, layers, batches)
    for name, covariance in seen:
        say(f"factors of {name}")
        weight = matrix(layers[name]).detach()
        found[name] = factorise(weight, config.rank(*weight.shape), covariance)
    return found


def cut(factors: Factors, config: LoSparseConfig) -> Factors:
    """The factors at the config's smaller rank: the leading columns of U and rows of V."""
    ranks = {name: config.rank(len(u), v.shape[1]) for name, (u, v) in factors.items()}
    return {name: (u[:, : ranks[name]], v[: ranks[name]]) for name, (u, v) in factors.items()}

"""Compress without training, from a few batches: rows of S are scored by |S * dLoss/dS| and the best stay (7.3).

>>> handle = compress_once(model, LoSparseConfig(low_rank=0.05, remaining=0.85, init="activation"), batches)
>>> handle.report().ratio
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zq_lib.losparse.compression import Compression, attach
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Batch, Factors, Say, find_factors, matrix
from zq_lib.losparse.layer import size_of
from zq_lib.losparse.pruning import choose_rows
from zq_lib.losparse.targets import find_layers

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Calibration:
    """What a few batches say: `factors` U [N, r] and V [r, K], and `scores` [N] fp32, of every layer by name."""

    factors: Factors
    scores: dict[str, Tensor]


def calibrate(
    model: nn.Module, batches: Sequence[Batch], config: LoSparseConfig, *, inputs: Sequence[Batch] | None = None,
    loss: Loss | None = None, say: Say = lambda _: None,
) -> Calibration:  # fmt: skip
    """Factors and row scores for the layers of `config`, without touching the model.

    Args: `batches`, keyword arguments of the model, each with its labels, for the gradients (score="sensitivity");
    `inputs`, batches for the covariances of init="activation", by default the same; `loss` of model and batch, by
    default the model's own; `say` is told the progress. Scores are empty where the config's score needs no gradient.
    Raises ValueError where there is no batch, no loss or a layer that no batch reaches.
    """
    if not batches and (config.init == "activation" or config.score == "sensitivity"):
        raise ValueError("batches is empty, and activation-aware factors and sensitivities need at least one batch")
    layers, _ = find_layers(model, config.targets, config.skip)
    was = model.training
    model.eval()  # dropout would be noise in both
    try:
        factors = find_factors(model, layers, config, batches if inputs is None else inputs, say)
        wanted = config.score == "sensitivity"
        return Calibration(factors, row_scores(model, layers, factors, batches, loss, say) if wanted else {})
    finally:
        model.train(was)


def compress_once(
    model: nn.Module, config: LoSparseConfig, batches: Sequence[Batch] = (), *, inputs: Sequence[Batch] | None = None,
    loss: Loss | None = None, say: Say = lambda _: None,
) -> Compression:  # fmt: skip
    """Compress `model` in place without training: calibrate, choose rows over all layers, cut them.

    Takes what `calibrate` takes. The baselines are settings: low_rank=0 is rows only, remaining=0 is low rank only, and
    score="magnitude" or "random" needs no batches with init="svd". Returns the handle of a shrunk model, in which
    layers that are cheaper dense are dense; `merge()` makes it an ordinary model of the same function.
    """
    found = calibrate(model, batches, config, inputs=inputs, loss=loss, say=say)
    handle = attach(model, config, factors=found.factors)
    handle.shrink(found.scores or None)
    handle.finish()
    return handle


def row_scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    factors: Factors,
    batches: Sequence[Batch],
    loss: Loss | None = None,
    say: Say = lambda _: None,
) -> dict[str, Tensor]:
    """Mean over the row of |S * dLoss/dS| for every output neuron, [N] fp32 per layer, mean over the batches.

    A gradient of many tokens has less noise, and noise looks like importance: few large batches rank rows better than
    many small ones.

    The model is still whole, and there the gradient of S is that of W. It is used and dropped layer by layer during the
    backward pass, so there is never room for more than one.
    """
    loss = loss or _own_loss
    scores = {name: torch.zeros(len(matrix(m)), device=m.weight.device) for name, m in layers.items()}
    flags = {p: p.requires_grad for p in model.parameters()}

    @torch.no_grad()
    def take(name: str, weight: nn.Parameter) -> None:
        u, v = factors[name]
        rest = matrix(layers[name]) - u @ v
        grad = weight.grad if weight is matrix(layers[name]) else weight.grad.T
        scores[name] += (rest * grad).abs().float().mean(1) / len(batches)
        weight.grad = None

    handles = []
    try:
        for p in flags:
            p.requires_grad_(False)
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)
            hook = layer.weight.register_post_accumulate_grad_hook
            handles.append(hook(lambda weight, name=name: take(name, weight)))
        for i, batch in enumerate(batches):
            say(f"gradients of batch {i + 1} of {len(batches)}")
            with torch.enable_grad():
                loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return scores


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss | None = None) -> float:
    """Mean of the loss over the batches."""
    return sum(float((loss or _own_loss)(model, batch)) for batch in batches) / len(batches)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    found = model(**batch).loss
    if found is None:
        raise ValueError(
            "the model gives no loss for these batches; add labels to each (for a language model labels=input_ids), or "
            "give loss, a function of model and batch"
        )
    return found


@torch.no_grad()
def magnitudes(layers: Mapping[str, nn.Module], factors: Factors) -> dict[str, Tensor]:
    """The baseline's scores, which do not see the loss: root mean square of every row of S, [N] fp32 per layer."""
    return {n: (matrix(m) - factors[n][0] @ factors[n][1]).float().square().mean(1).sqrt() for n, m in layers.items()}


def keep_rows(layers: Mapping[str, nn.Module], scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The rows of S that stay, by one threshold over all layers, [N] bool each. A share of 0 needs no scores."""
    sizes = [size_of(m) for m in layers.values()]
    counts, inputs = torch.tensor(sizes).T
    flat = torch.cat([scores[name] for name in layers]).cpu() if share else torch.zeros(int(counts.sum()))
    return dict(zip(layers, choose_rows(flat, counts, inputs, share).split(counts.tolist()), strict=True))


@contextmanager
@torch.no_grad()
def masked(layers: Mapping[str, nn.Module], factors: Factors, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """The compressed function, in dense weights and for a while: rows of S outside `keep` [N] bool are zero.

    Memory for the weights of the masked rows only. For trying many settings; it is no faster than the whole model.
    """
    saved: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        for name, layer in layers.items():
            gone = (~keep[name]).nonzero()[:, 0]
            u, v = factors[name]
            saved[name] = gone, matrix(layer)[gone].clone()
            matrix(layer)[gone] = u[gone] @ v
        yield
    finally:
        for name, (gone, rows) in saved.items():
            matrix(layers[name])[gone] = rows

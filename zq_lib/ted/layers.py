"""A model's layers from outside: which ones are matched, and their states, taken without leaving a trace.

A state is the output of a block: after its last residual and norm, before the next block and, in a decoder, before the
final norm. (transformers' own `hidden_states` are counted from the embeddings and have the last one after that norm.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zq_lib.ted.config import TedConfig
from zq_lib.ted.reference import interval, uniform

EXAMPLE = "example"  # the batch's key for the examples' numbers [B], which no model is given
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Match:
    """K matched layers of both models, counted from 1, and the filters' width d_f."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    filter_dim: int


@dataclass(frozen=True)
class Seen:
    """What one forward pass showed.

    states   [B, S, d] of each layer asked for, in their order
    logits   [B, V], [B, S, V], or [B, S, 2] for the start and end of a span; None for a model without a head
    loss     the model's own, if the batch had labels
    """

    states: tuple[Tensor, ...]
    logits: Tensor | None
    loss: Tensor | None = None


def blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks that the hidden state runs through.

    Raises ValueError for a model that has none or several, such as an encoder-decoder.
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1 and depth in (None, len(m))
    }
    stacks = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks)}
    if len(stacks) != 1:
        raise ValueError(
            f"model={type(model).__name__} has {len(stacks)} stacks of blocks"
            + (f" ({', '.join(stacks)})" if stacks else "")
            + "; TED needs one nn.ModuleList of equal blocks, as encoders and decoders have"
        )
    return next(iter(stacks.values()))


def width(model: nn.Module) -> int:
    """d, the width of the model's states. Raises ValueError for a model whose config does not say."""
    found = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(found, int):
        raise ValueError(f"model={type(model).__name__} does not say its width; give it config.hidden_size")
    return found


def match(student: nn.Module, teacher: nn.Module, config: TedConfig) -> Match:
    """Which layers of both models learn from each other, by `config.layers`.

    Raises ValueError for layers that a model does not have, or a number of pairs that does not fit.
    """
    depths = {"student": len(blocks(student)), "teacher": len(blocks(teacher))}
    if isinstance(config.layers, str):
        pairs = _mapped(config.layers, config.pairs, **depths)
    else:
        pairs = list(config.layers)
    for place, (name, depth) in enumerate(depths.items()):
        check_layers([pair[place] for pair in pairs], depth, name)
    dim = config.filter_dim or max(width(student), width(teacher))
    return Match(tuple(s for s, _ in pairs), tuple(t for _, t in pairs), dim)


def _mapped(how: str, pairs: int | None, student: int, teacher: int) -> list[tuple[int, int]]:
    if how == "interval":
        most = math.gcd(student, teacher)
        if most % (pairs or most):
            fit = [k for k in range(1, most + 1) if most % k == 0]
            raise ValueError(
                f"pairs={pairs} does not cut {student} student and {teacher} teacher layers into equal groups; use one "
                f"of {', '.join(map(str, fit))}, or layers='uniform'"
            )
        return interval(student, teacher, pairs or most)
    most = min(student, teacher)
    if (pairs or most) > most:
        raise ValueError(
            f"pairs={pairs} is more than the {student} student and {teacher} teacher layers allow; use at most {most}"
        )
    return uniform(student, teacher, pairs or most)


def check_layers(layers: Sequence[int], depth: int, name: str) -> None:
    """Raise ValueError unless `layers` are numbers of blocks of a model of this depth, counted from 1."""
    for layer in layers:
        if not 1 <= layer <= depth:
            raise ValueError(
                f"layer {layer} of the {name} is out of range: it has {depth} blocks, counted from 1; use 1 to {depth}"
            )


@contextmanager
def watch(model: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor | None]]:
    """Collect the outputs of `layers` of a forward pass in a `with` block; the hooks are gone when it ends.

    >>> with watch(model, (2, 4)) as states:
    ...     output = model(**batch)
    """
    stack = blocks(bare(model))
    check_layers(layers, len(stack), "model")
    states: list[Tensor | None] = [None] * len(layers)
    handles = []
    try:
        for place, layer in enumerate(layers):

            def take(module: nn.Module, args: Any, output: Any, place: int = place) -> None:
                states[place] = output[0] if isinstance(output, tuple) else output

            handles.append(stack[layer - 1].register_forward_hook(take))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def see(model: nn.Module, batch: Batch, layers: Sequence[int]) -> Seen:
    """Run the model on a batch, its keyword arguments, and take the states of `layers`, counted from 1."""
    with watch(model, layers) as states:
        output = model(**{key: value for key, value in batch.items() if key != EXAMPLE})
    logits = getattr(output, "logits", None)
    if logits is None and getattr(output, "start_logits", None) is not None:
        logits = torch.stack([output.start_logits, output.end_logits], -1)  # [B, S, 2]
    return Seen(tuple(states), logits, getattr(output, "loss", None))


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of a training in several processes, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def mask_of(batch: Batch, shape: Sequence[int]) -> Tensor:
    """Which positions hold tokens, [B, S] bool, for states of `shape` [B, S]; all if the batch has no attention_mask.

    Raises ValueError for a row of padding alone, which has nothing to learn from.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(tuple(shape), dtype=torch.bool, device=next(iter(batch.values())).device)
    if mask.shape != tuple(shape):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the states {tuple(shape)}; give one mark per position"
        )
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of attention_mask is all padding; drop rows without a token from the batch")
    return mask


def pooled_positions(mask: Tensor, pool: str) -> Tensor:
    """Where a row's head reads, [B, S] bool: all tokens for "mean" and "token", else the first or last real one."""
    if pool in ("mean", "token"):
        return mask
    order = mask.long().cumsum(1)
    return mask & (order == (1 if pool == "first" else order[:, -1:]))


def pool(filtered: Tensor, mask: Tensor, how: str) -> Tensor:
    """The first, the last or the mean of each row's real tokens, wherever its padding is.  [B, S, d] -> [B, d]"""
    if how != "mean":
        return filtered[pooled_positions(mask, how)]
    total = filtered.masked_fill(~mask[..., None], 0).sum(1)  # what stands on padding may be anything, NaN too
    return total / mask.sum(1, keepdim=True)

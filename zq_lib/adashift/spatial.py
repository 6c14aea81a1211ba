"""The spatial function phi: what is left of the squared gradients of one block (section 1.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Phi = Callable[[Tensor], Tensor]
NAMED: dict[str, Phi] = {"max": torch.amax, "mean": torch.mean, "l2": torch.sum}  # l2: the squared norm of the block
NONE = "none"
PHIS = (*NAMED, NONE)
BLOCKS = ("tensor", "row")


def spatial(squares: Tensor, phi: str | Phi = "max", block: str = "tensor") -> Tensor:
    """phi of the squares of every block: [] for the tensor, [rows] for its rows, the squares themselves for "none".

    A row is all that one index of the first dimension holds (what one output of a layer reads, one word's embedding);
    a tensor of at most one dimension is one block. A callable gets the squares of the tensor and returns one number.

    >>> spatial(torch.tensor([[1.0, 4.0], [9.0, 0.0]]), "max", "row")
    tensor([4., 9.])
    """
    if phi == NONE:
        return squares
    function = phi if callable(phi) else NAMED[phi]
    if by_rows(squares, block):
        return function(squares.flatten(1), dim=1)
    return function(squares)


def by_rows(tensor: Tensor, block: str) -> bool:
    """Whether a tensor falls into rows."""
    return block == "row" and tensor.ndim > 1


def blocks_shape(tensor: Tensor, phi: str | Phi, block: str) -> tuple[int, ...]:
    """The shape of v: one number per block."""
    if phi == NONE:
        return tuple(tensor.shape)
    return (tensor.shape[0],) if by_rows(tensor, block) else ()


def name(phi: str | Phi) -> str:
    """What a state dict calls a spatial function: a function itself cannot be saved safely."""
    return phi if isinstance(phi, str) else f"function {getattr(phi, '__name__', type(phi).__name__)}"

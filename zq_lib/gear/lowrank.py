"""The low-rank residual L = A B^T (paper, section 3 and algorithm 2): subspace iteration, batched, in float32.

The iterate is orthonormalised in every round. As published it is so only in the last, and then grows like the largest
singular value to the power of twice the rounds: all but the first direction drown, and ten rounds overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.gear.config import Codec

RIDGE = 4e-6  # of the Gram matrix's trace: above its float32 rounding, so that Cholesky cannot fail


def start_vectors(width: int, rank: int, seed: int) -> Tensor:
    """One [D, R] start for every row and head of a segment: a row compresses alike alone and in a batch."""
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))


def orthonormalise(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of x [..., n, R]: Cholesky of the Gram matrix, twice.

    Much faster than QR for many thin matrices. A zero or rank-deficient x gives finite, shorter columns.
    """
    for _ in range(2):
        gram = x.mT @ x
        squares = gram.diagonal(dim1=-2, dim2=-1)
        squares += RIDGE * squares.sum(-1, keepdim=True) + torch.finfo(x.dtype).tiny
        factor = torch.linalg.cholesky(gram)
        x = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
    return x


def factorise(residual: Tensor, rank: int, codec: Codec, seed: int) -> tuple[Tensor, Tensor]:
    """A [..., n, R] orthonormal and B [..., D, R] with A B^T close to the best rank-R approximation of the residual.

    Rank is clamped to min(n, D). After the last round B = R^T A, so A B^T is the projection of R on span(A).
    """
    n, d = residual.shape[-2:]
    rank = min(rank, n, d)
    if codec.solver == "svd":
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        return u[..., :rank], v.mT[..., :rank] * s[..., None, :rank]
    size = residual.abs().amax((-2, -1), keepdim=True)  # to unit size: squares of 6e4 or 1e-30 leave float32
    scaled = residual / torch.where(size > 0, size, 1.0)
    b = start_vectors(d, rank, seed).to(scaled).expand(*scaled.shape[:-2], d, rank)
    for _ in range(codec.iterations):
        a = orthonormalise(scaled @ b)
        b = scaled.mT @ a
    return a, b * size


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns as int8 with one float16 scale each: x [..., n, R] -> codes and [..., 1, R]."""
    scale = (x.abs().amax(-2, keepdim=True) / 127).to(torch.float16)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale)).to(x.dtype)
    return (x / safe).round().clamp(-127, 127).to(torch.int8), scale

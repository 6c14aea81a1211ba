"""Inputs and comparisons that the interpreter and the GPU tests of MASFormer's kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.reference import span_attention


def tensors(
    T: int, S: int | None = None, *, B: int = 1, H: int = 1, G: int = 1, D: int = 16,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normal q [B, H, T, D] and k, v [B, G, S, D]."""
    source = torch.Generator().manual_seed(0)
    S = T if S is None else S
    return tuple(torch.randn(B, n, t, D, generator=source).to(device, dtype) for n, t in ((H, T), (G, S), (G, S)))


def padding(S: int, *texts: tuple[int, int], device: str = "cpu") -> Tensor:
    """[B, S] bool with one text [first, last) per row."""
    key = torch.arange(S, device=device)
    return torch.stack([(key >= first) & (key < last) for first, last in texts])


def check(q: Tensor, k: Tensor, v: Tensor, *, gradients: bool = True, **named: object) -> list[Launch]:
    """Assert output and gradients of the kernels against the fp64 reference, and untouched inputs."""
    inputs = (q, k, v)
    before = [x.clone() for x in inputs]
    ours = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradients) for x in inputs]
    truth = [x.detach().double().requires_grad_(gradients) for x in inputs]
    with launches() as seen:
        out = local_attention(*ours, backend="triton", **named)
        wanted = span_attention(*truth, **named)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        if gradients:
            out.backward(weight)
            wanted.backward(weight.double())
    bound = tolerance(q.dtype, seen[0].path)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert relative_rms(out, wanted) <= bound.output
    if gradients:
        pairs = [(a.grad, b.grad) for a, b in zip(ours, truth, strict=True)]
        # A query that sees one key has no gradient: there the rounding of the kernel's difference is all there is.
        errors = [relative_rms(a, b) if b.any() else float(a.abs().max()) for a, b in pairs]
        assert all(error <= bound.gradient for error in errors), errors
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    return seen


def visited(T: int, tile: int, **named: object) -> Tensor:
    """Which tiles of keys each tile of queries loads, [tiles, tiles] bool: put NaN in one, and see whom it reaches.

    A weight of zero does not stop a NaN, so what a mask hides shows here; only what is skipped does not.
    """
    q, k, v = tensors(T)
    reached = []
    for start in range(0, T, tile):
        poisoned = v.clone()
        poisoned[:, :, start : start + tile] = float("nan")
        out = local_attention(q, k, poisoned, backend="triton", **named)
        reached.append(out[0, 0].isnan().any(-1).split(tile))
    return torch.tensor([[bool(rows.any()) for rows in column] for column in reached]).T

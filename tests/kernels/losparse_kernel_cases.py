"""Inputs and comparisons that the interpreter and the GPU tests of LoSparse's kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.losparse import reference
from zq_lib.losparse.linear import low_rank_sparse_linear


def tensors(
    M: int, N: int, K: int, r: int, n: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu",
    bias: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """x [M, K], left, right, sparse, rows and bias of a layer with n kept rows, which a seed has chosen."""
    source = torch.Generator().manual_seed(M + N + K + r + n)
    make = lambda *shape: torch.randn(*shape, generator=source).to(device, dtype)  # noqa: E731
    rows = torch.randperm(N, generator=source)[:n].sort().values.to(device)
    return [make(M, K), make(N, r), make(r, K), make(n, K), rows, make(N) if bias else None]


def check(inputs: list[Tensor | None], backend: str = "triton", gradients: bool = True) -> list[Launch]:
    """Assert output and gradients against the fp64 reference, and untouched inputs."""
    before = [None if t is None else t.clone() for t in inputs]
    learn = [t is not None and t.is_floating_point() and gradients for t in inputs]
    ours = [t.detach().requires_grad_(yes) if t is not None else None for t, yes in zip(inputs, learn, strict=True)]
    truth = [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(yes)
        for t, yes in zip(inputs, learn, strict=True)
    ]
    with launches() as seen:
        out = low_rank_sparse_linear(*ours, backend=backend)
        wanted = reference.shrunk_linear(*truth)
    bound = tolerance(out.dtype, seen[0].path if seen else "torch")
    assert out.dtype == ours[0].dtype and out.shape == wanted.shape
    assert relative_rms(out, wanted) <= bound.output
    if gradients:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        out.backward(weight)
        wanted.backward(weight.double())
        for mine, theirs, yes in zip(ours, truth, learn, strict=True):
            assert not yes or relative_rms(mine.grad, theirs.grad) <= bound.gradient
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    return seen

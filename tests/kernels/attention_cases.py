"""Inputs and comparisons that the interpreter tests, the GPU tests and the benchmark tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.pasta.kernels import flash_attention
from zq_lib.pasta.reference import biased_attention

NAMES = ("q", "k", "v", "gate", "beta")


@dataclass
class Case:
    """Tensors of one call. The reference reads the same numbers, rounded to the dtype of `q`, `k`, `v`, in fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    rows: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = True

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)

    @property
    def options(self) -> dict:
        return dict(rows=self.rows, mask=self.mask, causal=self.causal)


def case(
    B: int = 1, H: int = 2, G: int = 1, T: int = 33, S: int | None = None, D: int = 16, *, alpha: float = 0.01,
    marked: tuple[int, int] = (5, 9), dtype: torch.dtype = torch.float32, device: str = "cpu", **options: object,
) -> Case:  # fmt: skip
    """Normal q, k, v; one head steered, one not, one at half strength; keys outside `marked` scaled down."""
    S = T if S is None else S
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, t, D, generator=source).to(device, dtype) for n, t in ((H, T), (G, S), (G, S)))
    gate = torch.tensor([1.0, 0.0, 0.5, 1.0, -0.25, 0.0])[:H].repeat(B, 1).to(device)
    key = torch.arange(S)
    beta = torch.where((key >= marked[0]) & (key < marked[1]), 0.0, math.log(alpha)).repeat(B, 1).to(device)
    return Case(q, k, v, gate, beta, **options)


def causal_mask(T: int, S: int, left: int = 0, right: int = 0, window: int | None = None) -> Tensor:
    """[1, 1, T, S] bool: causal with query i at S - T + i, without `left` and `right` padded keys, within `window`."""
    key, position = torch.arange(S)[None, :], torch.arange(S - T, S)[:, None]
    seen = (key <= position) & (key >= left) & (key < S - right)
    return (seen if window is None else seen & (key > position - window))[None, None]


def check(case: Case, *, gradients: bool = True) -> list[Launch]:
    """Assert outputs and gradients against the fp64 reference, and untouched inputs. Returns the launches."""
    inputs = [getattr(case, n) for n in NAMES]
    before = [x.clone() for x in inputs]
    ours = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradients) for x in inputs]
    truth = [x.detach().double().requires_grad_(gradients) for x in inputs]
    with launches() as seen:
        out, lse = _call(flash_attention, ours, case)
        wanted, _ = _call(biased_attention, truth, case)
        wanted = wanted.transpose(1, 2)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        if gradients:
            out.backward(weight)
            wanted.backward(weight.double())
    bound = tolerance(case.q.dtype, seen[0].path)
    assert out.dtype == case.q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert relative_rms(out, wanted) <= bound.output
    assert relative_rms(_finite(lse), _finite(reference_lse(case))) <= 1e-5
    if gradients:
        errors = {n: relative_rms(a.grad, b.grad) for n, a, b in zip(NAMES, ours, truth, strict=True)}
        assert all(error <= bound.gradient for error in errors.values()), errors
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    return seen


def _call(function, tensors: list[Tensor], case: Case) -> tuple[Tensor, Tensor]:
    q, k, v, gate, beta = tensors
    return function(q, k, v, gate=gate, beta=beta, **case.options)


def reference_lse(case: Case) -> Tensor:
    """Log-sum-exp of the biased scores in fp64: a value column of ones, shifted; [B, H, T]."""
    from zq_lib.pasta.reference import visible_keys

    group = case.q.shape[1] // case.k.shape[1]
    scores = case.q.double() @ case.k.double().repeat_interleave(group, 1).transpose(2, 3) * case.q.shape[-1] ** -0.5
    rows = 1.0 if case.rows is None else case.rows[:, None, :, None].double()
    scores = scores + case.gate[:, :, None, None].double() * rows * case.beta[:, None, None, :].double()
    seen = visible_keys(*scores.shape[2:], case.mask, case.causal, scores.device)
    return scores.masked_fill(~seen, -torch.inf).logsumexp(-1)


def _finite(lse: Tensor) -> Tensor:
    """-inf becomes a number that any disagreement about it would expose."""
    return torch.where(lse == -torch.inf, 1e6, lse.detach().double())

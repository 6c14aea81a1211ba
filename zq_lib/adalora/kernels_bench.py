"""What `make gpu` times for AdaLoRA: the fused layer and its training step, and importance over all adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.adalora import reference
from zq_lib.adalora.adapter import Triplets
from zq_lib.adalora.importance import Importance
from zq_lib.adalora.kernels import fused_linear
from zq_lib.core.kernels import GpuCase
from zq_lib.core.kernels_launch import INTERPRETED
from zq_lib.core.numerics import relative_rms, tolerance

SCALE = 2.0


def cases(
    device: str = "cuda",
    *,
    rows: Sequence[int] = (1, 2048, 4096),
    width: int = 4096,
    ranks: Sequence[int] = (16, 64),
    layers: Sequence[int] = (12, 32),
    hidden: int = 768,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[GpuCase]:
    """A layer of width x width per rank and number of rows, forward and training; importance of whole encoders."""
    for rank in ranks:
        for count in rows:
            yield _layer("forward", count, width, rank, dtype, device)
            yield _layer("training", count, width, rank, dtype, device)
    for depth in layers:
        yield _importance(depth, hidden, device)


def _unfused(x: Tensor, weight: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """As PEFT computes it."""
    return F.linear(x, weight) + ((x @ (right * values[:, None]).to(x.dtype).T) @ left.to(x.dtype).T) * SCALE


def _layer(name: str, m: int, width: int, rank: int, dtype: torch.dtype, device: str) -> GpuCase:
    source = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    x, weight = (t.to(device, dtype) for t in (make(m, width), make(width, width) * width**-0.5))
    left, values, right = (t.to(device) for t in (make(width, rank) * 0.1, make(rank), make(rank, width) * 0.1))
    calls: dict[str, Callable[..., Tensor]] = {
        "triton, fused": lambda x, p, v, q: fused_linear(x, weight, None, p, v, q, SCALE),
        "torch, unfused": lambda x, p, v, q: _unfused(x, weight, p, v, q),
        "base layer alone": lambda x, p, v, q: F.linear(x, weight),
    }
    factors = (x, left, values, right)
    training = name == "training"
    runs = {label: _step(call, factors) if training else _forward(call, factors) for label, call in calls.items()}
    work = 2 * m * width * width + 4 * m * width * rank
    moved = (2 * m * width + width * width) * x.element_size() + 2 * width * rank * 4
    size = dict(M=m, N=width, K=width, R=rank, dtype=str(dtype).removeprefix("torch."))
    times = 2 if training else 1  # the frozen weight needs no gradient of its own
    return GpuCase(name, size, lambda: _parity(weight, factors, training), runs, times * work, times * moved)


def _forward(call: Callable[..., Tensor], factors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: call(*factors)


def _step(call: Callable[..., Tensor], factors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor | None, ...]]:
    def step() -> tuple[Tensor | None, ...]:
        leaves = [t.detach().requires_grad_() for t in factors]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return step


def _parity(weight: Tensor, factors: tuple[Tensor, ...], training: bool) -> tuple[float, float]:
    """The largest error against fp64, output and for training all gradients, in units of what is allowed."""
    bound = tolerance(weight.dtype, "interpreter" if INTERPRETED else "triton")
    leaves = [t.detach().requires_grad_() for t in factors]
    out = fused_linear(leaves[0], weight, None, *leaves[1:], SCALE)
    x, left, values, right = (t.double() for t in factors)
    double = weight.double()
    errors = [relative_rms(out, reference.adapted_linear(x, double, None, left, values, right, SCALE)) / bound.output]
    if training:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        theirs = reference.adapted_linear_gradients(grad.double(), x, double, left, values, right, SCALE)
        ours = torch.autograd.grad(out, leaves, grad)
        errors += [relative_rms(a, b) / bound.gradient for a, b in zip(ours, theirs, strict=True)]
    return max(errors, key=lambda e: float("inf") if e != e else e), 1.0


def _importance(layers: int, hidden: int, device: str) -> GpuCase:
    """Six matrices a layer at rank 12: four square ones and the two of the feed-forward part."""
    shapes = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    like = torch.empty(1, device=device)
    adapters = [Triplets(n, k, 12, SCALE, like, 0.02, 0.0) for _ in range(layers) for n, k in shapes]
    fused, flat = (Importance(adapters, "adalora", 0.85, 0.85, backend) for backend in ("triton", "torch"))
    fused._addresses = [p.data_ptr() for p in fused.parameters]  # `flat` has adopted the parameters since
    fused.weights = flat.weights
    for p in flat.parameters:
        p.grad = torch.randn_like(p)
    entries = sum(p.numel() for p in flat.parameters)

    def parity() -> tuple[float, float]:
        for importance in (fused, flat):
            importance.sensitivity.zero_()
            importance.uncertainty.zero_()
            importance.update()
        return relative_rms(fused.scores(), flat.scores()), 1e-5

    runs = {
        "triton, one launch": fused.update,
        "torch, flat buffer": flat.update,
        "torch, tensor by tensor": _loop(flat.parameters),
    }
    return GpuCase(
        "importance", dict(matrices=len(adapters), R=12, entries=entries), parity, runs, 8 * entries, 24 * entries
    )


def _loop(parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """As PEFT does it: about ten operations for every tensor."""
    stats = [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters]

    @torch.no_grad()
    def run() -> None:
        for p, stat in zip(parameters, stats, strict=True):
            stat[:] = reference.update_importance(p, p.grad, *stat, 0.85, 0.85)

    return run

"""What `make gpu` times for LoSparse: the shrunk layer against the dense one, and the mask step of a whole encoder.

Goals at 20 % of a 4096 wide layer: three times the dense layer at 4096 tokens, twice at one token in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.kernels import GpuCase
from zq_lib.core.kernels_launch import INTERPRETED
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.losparse import reference
from zq_lib.losparse.kernels import RowImportanceTable
from zq_lib.losparse.linear import low_rank_sparse_linear

LOW_RANK = 0.05
BETA = 0.85


def cases(
    device: str = "cuda",
    *,
    tokens: Sequence[int] = (1, 64, 4096),
    widths: Sequence[int] = (768, 4096),
    shares: Sequence[float] = (0.1, 0.2, 0.5),
    layers: int = 12,
    hidden: int = 768,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[GpuCase]:
    """Square layers at total shares of their parameters, forward and training; then importance and masks."""
    for width in widths:
        for share in shares:
            for count in tokens:
                yield _layer("forward", count, width, share, dtype, device)
                yield _layer("training", count, width, share, dtype, device)
    yield _mask_step(layers, hidden, device)


def _layer(name: str, m: int, width: int, share: float, dtype: torch.dtype, device: str) -> GpuCase:
    rank, kept = reference.rank_for(LOW_RANK, width, width), round((share - LOW_RANK) * width)
    source = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=source).to(device, dtype)  # noqa: E731
    x, weight, left, right, sparse = make(m, width), *(make(*s) * width**-0.5 for s in (
        (width, width), (width, rank), (rank, width), (kept, width)
    ))  # fmt: skip
    rows = torch.randperm(width, generator=source)[:kept].sort().values.to(device)
    parts, training = (x, left, right, sparse), name == "training"
    ours = lambda backend: lambda *given: low_rank_sparse_linear(*given, rows, backend=backend)  # noqa: E731
    runs = {
        "triton": _run(ours("triton"), parts, training),
        "torch": _run(ours("torch"), parts, training),
        "dense": _run(F.linear, (x, weight), training),
    }
    if device == "cuda" and not training:
        runs |= {f"{label}, CUDA graph": _graphed(runs[label]) for label in ("triton", "dense")}

    def parity() -> tuple[float, float]:
        """The largest error against fp64, output and for training all gradients, in units of what is allowed."""
        bound = tolerance(dtype, "interpreter" if INTERPRETED else "triton")
        mine, double = ([t.detach().to(kind).requires_grad_() for t in parts] for kind in (dtype, torch.float64))
        out, wanted = ours("triton")(*mine), reference.shrunk_linear(*double, rows)
        errors = [relative_rms(out, wanted) / bound.output]
        if training:
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found = torch.autograd.grad(out, mine, grad)
            theirs = torch.autograd.grad(wanted, double, grad.double())
            errors += [relative_rms(a, b) / bound.gradient for a, b in zip(found, theirs, strict=True)]
        return max(errors, key=lambda e: float("inf") if e != e else e), 1.0

    entries = 2 * rank * width + kept * width
    times = 3 if training else 1
    moved = times * (2 * m * width + entries) * x.element_size()
    size = dict(M=m, N=width, K=width, share=f"{share:g}", R=rank, rows=kept, dtype=str(dtype).removeprefix("torch."))
    return GpuCase(name, size, parity, runs, times * 2 * m * entries, moved)


def _run(call: Callable[..., Tensor], tensors: tuple[Tensor, ...], training: bool) -> Callable[[], object]:
    """A call, or with `training` its output and the gradients of all its tensors."""

    def step() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step if training else lambda: call(*tensors)


def _graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call's launches replayed without the host, recorded at the first use."""
    held: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not held:
            call()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            held.append(graph)
        held[0].replay()

    return replay


def _mask_step(layers: int, hidden: int, device: str) -> GpuCase:
    """Importance of all rows of an encoder and zeroing half of them, in fp32."""
    shapes = ([(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]) * layers
    source = torch.Generator().manual_seed(0)
    sparse, grads = ([torch.randn(*s, generator=source).to(device) for s in shapes] for _ in range(2))
    table = RowImportanceTable(sparse)
    average, window = (torch.zeros(table.rows, device=device) for _ in range(2))
    keep = torch.rand(table.rows, generator=source).to(device) > 0.5
    full = [torch.zeros_like(s) for s in sparse]  # as published: one average per entry

    def ours() -> None:
        table.update(grads, window, average, BETA, None)
        table.zero(keep)

    def published() -> Tensor:
        for s, g, smooth in zip(sparse, grads, full, strict=True):
            smooth.copy_(reference.smooth(smooth, reference.importance(s, g), BETA))
        for s, kept in zip(sparse, keep.split([len(s) for s in sparse]), strict=True):
            s.masked_fill_(~kept[:, None], 0)
        return torch.cat([reference.neuron_scores(smooth) for smooth in full])

    def parity() -> tuple[float, float]:
        """The error of the row means against fp64; infinite if the wrong rows become zero."""
        now = torch.zeros_like(average)
        table.update(grads, window, now, 0.0, None)
        pairs = zip(sparse, grads, strict=True)
        wanted = [reference.neuron_scores(reference.importance(s.double(), g.double())) for s, g in pairs]
        table.zero(keep)
        right = torch.equal(torch.cat([s.any(1) for s in sparse]), keep)
        return relative_rms(now, torch.cat(wanted)) if right else float("inf"), 1e-5

    entries = sum(s.numel() for s in sparse)
    runs = {"triton, two launches": ours, "torch, per entry": published}
    return GpuCase("mask step", dict(matrices=len(sparse), entries=entries), parity, runs, 2 * entries, 10 * entries)

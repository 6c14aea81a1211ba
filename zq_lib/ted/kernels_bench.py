"""What `make gpu` times for TED: the divergence over a vocabulary, and the distance of filtered states.

Goals: the divergence with its gradient three times as fast as plain torch, 1.3 times as fast as Liger's with the
log-softmax that it needs, at 80 % of the memory's speed; the distance of twelve pairs 1.5 times as fast as plain torch
and 1.2 times as fast as torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.kernels import GpuCase
from zq_lib.core.kernels_launch import INTERPRETED
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.ted import reference
from zq_lib.ted.divergence import divergence
from zq_lib.ted.filtered import Filtered, filtered_error

TEMPERATURE = 2.0
CHECKED = 512  # rows of logits that are compared with fp64: all do not fit, and fewer would be split on a GPU


def cases(
    device: str = "cuda",
    *,
    logits: Sequence[tuple[int, int]] = ((8192, 50_257), (4096, 151_936), (16, 50_257)),
    tokens: Sequence[int] = (2048, 16_384),
    widths: tuple[int, int, int] = (384, 768, 768),
    pairs: Sequence[int] = (1, 12),
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[GpuCase]:
    """Rows and vocabularies, forward and training; then tokens and pairs of widths (student, teacher, d_f)."""
    for rows, classes in logits:
        for name in ("kl forward", "kl training"):
            yield _divergence(name, rows, classes, dtype, device)
    for count in tokens:
        for k in pairs:
            yield _filtered(count, widths, k, dtype, device)


def _divergence(name: str, rows: int, classes: int, dtype: torch.dtype, device: str) -> GpuCase:
    source = torch.Generator(device=device).manual_seed(0)
    s, t = (3 * torch.randn(rows, classes, generator=source, device=device, dtype=dtype) for _ in range(2))
    training = name == "kl training"
    s.requires_grad_(training)

    def ours(backend: str, teacher: Tensor = t) -> Callable[[Tensor], Tensor]:
        return lambda student: divergence(student, teacher[: len(student)], temperature=TEMPERATURE, backend=backend)

    def plain(student: Tensor) -> Tensor:
        q, p = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (student, t))
        return F.kl_div(q, p.exp(), reduction="batchmean") * TEMPERATURE**2

    def liger(student: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerKLDIVLoss

        q, p = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (student, t))
        return LigerKLDIVLoss(reduction="batchmean", log_target=True)(q, p) * TEMPERATURE**2

    def parity() -> tuple[float, float]:
        """The largest error against fp64 in some rows, in units of what is allowed."""
        path = "interpreter" if INTERPRETED else "triton"
        few = s[:CHECKED].detach().requires_grad_()
        exact = few.detach().double().requires_grad_()
        found, wanted = ours("triton")(few), reference.divergence(exact, t[:CHECKED].double(), TEMPERATURE)
        errors = [relative_rms(found, wanted) / tolerance(torch.float32, path).output]  # summed in fp32
        if training:
            pairs = (torch.autograd.grad(x, of)[0] for x, of in ((found, few), (wanted, exact)))
            errors.append(relative_rms(*pairs) / tolerance(dtype, path).gradient)
        return max(errors, key=lambda e: float("inf") if e != e else e), 1.0

    runs = _runs({"triton": ours("triton"), "torch, chunked": ours("torch"), "torch, plain": plain, "liger": liger},
                 (s,), training, device)  # fmt: skip
    entries = rows * classes
    size = dict(N=rows, V=classes, dtype=str(dtype).removeprefix("torch."))
    moved = entries * s.element_size() * (5 if training else 2)  # both read, and read again with a gradient written
    return GpuCase(name, size, parity, runs, (14 if training else 8) * entries, moved)


def _filtered(n: int, widths: tuple[int, int, int], pairs: int, dtype: torch.dtype, device: str) -> GpuCase:
    own, other, dim = widths
    source = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=device, dtype=dtype)

    def side(width: int) -> list[Tensor]:
        return [x for _ in range(pairs) for x in (draw(n, width), draw(dim, width) * width**-0.5, draw(dim))]

    given, teacher = side(own), [Filtered(*x) for x in _triples(side(other))]
    for x in given:
        x.requires_grad_()

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda *tensors: filtered_error([Filtered(*x) for x in _triples(tensors)], teacher, backend=backend)

    def plain(*tensors: Tensor) -> Tensor:
        found = []
        for (h, w, b), (h_t, w_t, b_t) in zip(_triples(tensors), teacher, strict=True):
            found.append(F.mse_loss(F.linear(h, w, b).float(), F.linear(h_t, w_t, b_t).float()))
        return torch.stack(found)

    def parity() -> tuple[float, float]:
        """The largest error against fp64 of the first pair, value and gradients, in units of what is allowed."""
        bound = tolerance(dtype, "interpreter" if INTERPRETED else "triton")
        found = ours("triton")(*given)
        exact = [x.detach().double().requires_grad_() for x in given[:3]]
        z = reference.filter_linear(*exact), reference.filter_linear(*(x.double() for x in teacher[0]))
        wanted = (z[0] - z[1]).square().mean()
        grads = [torch.autograd.grad(x, of) for x, of in ((found[0], given[:3]), (wanted, exact))]
        errors = [relative_rms(found[0], wanted) / bound.output]
        errors += [relative_rms(a, b) / bound.gradient for a, b in zip(*grads, strict=True)]
        errors.append(relative_rms(found, ours("torch")(*given)) / bound.output)  # the other pairs
        return max(errors, key=lambda e: float("inf") if e != e else e), 1.0

    ways = {"triton": ours("triton"), "torch, chunked": ours("torch"), "torch, plain": plain}
    if device == "cuda":
        ways["torch.compile"] = torch.compile(plain, dynamic=False)
    runs = _runs(ways, tuple(given), True, device)
    flops = 2 * n * dim * (own + other) + 4 * n * dim * own
    moved = (
        n * (3 * own + other + 3 * dim) * given[0].element_size()
    )  # states, their gradient, D written and read twice
    size = dict(N=n, pairs=pairs, d_s=own, d_t=other, d_f=dim, dtype=str(dtype).removeprefix("torch."))
    return GpuCase("filtered error training", size, parity, runs, pairs * flops, pairs * moved)


def _triples(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[k : k + 3] for k in range(0, len(tensors), 3)]


def _runs(
    ways: dict[str, Callable[..., Tensor]], tensors: tuple[Tensor, ...], training: bool, device: str
) -> dict[str, Callable[[], object]]:
    """Each way as a call of its own, in training with the gradients of all tensors. Liger's has no path on a CPU."""

    def step(way: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            found = way(*tensors)
            return torch.autograd.grad(found.sum(), tensors) if training else found

        return run

    return {name: step(way) for name, way in ways.items() if device == "cuda" or name != "liger"}

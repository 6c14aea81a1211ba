"""What `make gpu` times for MASFormer: banded attention against FlexAttention and SDPA, forward and with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.kernels import GpuCase
from zq_lib.core.kernels_launch import INTERPRETED
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.reference import sees, span_attention
from zq_lib.masformer.spans import entries

MASK_UP_TO = 16384  # a dense mask of more tokens is gigabytes
CHECKED = 2048  # the last tokens, on which fp64 attention is affordable


def cases(
    device: str = "cuda",
    *,
    lengths: Sequence[int] = (8192, 16384, 32768),
    windows: Sequence[int] = (256, 1024),
    heads: tuple[int, int] = (16, 16),
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[GpuCase]:
    """One case per span, length and direction; `heads` is (H, G).

    Goals: as fast as FlexAttention, and at 16k tokens 80 % of the saving that the score entries promise over full SDPA.
    """
    for T in lengths:
        for span in windows:
            for kind, sinks in (("window", 0), ("window", 4), ("block", 0)):
                for gradients in (False, True):
                    yield _case(kind, span, sinks, gradients, T, heads, width, dtype, device)


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _case(
    kind: str, span: int, sinks: int, gradients: bool, T: int, heads: tuple[int, int], D: int, dtype: torch.dtype,
    device: str,
) -> GpuCase:  # fmt: skip
    H, G = heads
    held: dict[str, object] = {}  # made at the first use and dropped with the case

    def tensors() -> tuple[Tensor, ...]:
        if "q" not in held:
            source = torch.Generator().manual_seed(0)
            made = [torch.randn(1, n, T, D, generator=source).to(device, dtype) for n in (H, G, G, H)]
            held["q"] = [x.requires_grad_(gradients) for x in made[:3]] + made[3:]
        return tuple(held["q"])

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        q, k, v, weight = tensors()
        with torch.set_grad_enabled(gradients):
            out = attend(q, k, v)
        if gradients:
            torch.autograd.grad(out, (q, k, v), weight)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, span=span, kind=kind, sinks=sinks, backend="triton")

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if "mask" not in held:
            place = torch.arange(T, device=device)
            held["mask"] = sees(place[:, None], place[None, :], span, kind, sinks)
        return F.scaled_dot_product_attention(q, k, v, held["mask"], enable_gqa=True)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if "blocks" not in held:
            from torch.nn.attention.flex_attention import create_block_mask

            def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return sees(i, j, span, kind, sinks)

            held["blocks"] = create_block_mask(rule, None, None, T, T, device=device)
        return _compiled_flex()(q, k, v, block_mask=held["blocks"], enable_gqa=True)

    def parity() -> tuple[float, float]:
        """The output, or the largest error of the gradients, on a text that fp64 attention can still do."""
        n = min(T, CHECKED)
        q, k, v, weight = (x.detach()[:, :, :n].requires_grad_(gradients) for x in tensors())
        wanted_inputs = [x.detach().double().requires_grad_(gradients) for x in (q, k, v)]
        out, wanted = ours(q, k, v), span_attention(*wanted_inputs, span, kind, sinks)
        bound = tolerance(dtype, "interpreter" if INTERPRETED else "triton")
        if not gradients:
            return relative_rms(out, wanted), bound.output
        got = torch.autograd.grad(out, (q, k, v), weight)
        truth = torch.autograd.grad(wanted, wanted_inputs, weight.double())
        return max(relative_rms(a, b) for a, b in zip(got, truth, strict=True)), bound.gradient

    runs: dict[str, Callable[[], object]] = {"triton": lambda: run(ours)}
    if device == "cuda":  # FlexAttention compiles for minutes elsewhere
        runs["flex"] = lambda: run(flex)
    runs["sdpa, full"] = lambda: run(full)
    if T <= MASK_UP_TO:
        runs["sdpa, mask"] = lambda: run(masked)
    name = f"{kind} {span}{f', {sinks} sinks' if sinks else ''}, {'forward and backward' if gradients else 'forward'}"
    size = dict(B=1, H=H, G=G, T=T, D=D, dtype=str(dtype).removeprefix("torch."))
    flops = 4 * H * D * entries(T, span, kind, sinks) * (3.5 if gradients else 1)
    moved = 2 * (H + G) * T * D * dtype.itemsize * (3 if gradients else 1)
    return GpuCase(name, size, parity, runs, flops, moved)

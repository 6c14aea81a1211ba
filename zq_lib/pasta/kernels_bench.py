"""What `make gpu` times for PASTA: prefill, decode and training steps against the peers that could do the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zq_lib.core.kernels import GpuCase
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.pasta.attention import add_bias_column, extra_columns
from zq_lib.pasta.kernels import INTERPRETED, flash_attention
from zq_lib.pasta.reference import biased_attention, visible_keys

ALPHA = 0.01
CHECKED_ROWS = 256  # the fp64 reference materialises [H, rows, S]: 0.5 GB for 32 heads and 8192 keys


def cases(
    device: str = "cuda",
    *,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    caches: Sequence[int] = (1024, 4096, 16384, 65536),
    widths: Sequence[int] = (64, 128),
    heads: tuple[int, int] = (32, 8),
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[GpuCase]:
    """One case per length and width: prefill and training step at T = S, decode at T = 1. `heads` is (H, G)."""
    for D in widths:
        for T in lengths:
            yield _case("prefill", T, T, D, heads, dtype, device)
            yield _case("training", T, T, D, heads, dtype, device)
        for S in caches:
            yield _case("decode", 1, S, D, heads, dtype, device)


def _case(name: str, T: int, S: int, D: int, heads: tuple[int, int], dtype: torch.dtype, device: str) -> GpuCase:
    H, G = heads
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, t, D, generator=source).to(device, dtype) for n, t in ((H, T), (G, S), (G, S)))
    beta = torch.where((torch.arange(S) % 64) < 8, 0.0, math.log(ALPHA)).to(device)[None]  # marked spans of 8
    on, off = torch.ones(1, H, device=device), torch.zeros(1, H, device=device)
    calls = {
        "triton, steered": lambda q, k, v: flash_attention(q, k, v, gate=on, beta=beta)[0],
        "triton, gate 0": lambda q, k, v: flash_attention(q, k, v, gate=off, beta=beta)[0],
        **_peers(T, S, H, D, beta, dtype, device),
    }
    work = 4 * H * T * S * D * (0.5 if T > 1 else 1.0)  # causal: half of the scores
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    if name == "training":  # five products instead of two in the backward pass
        runs = {label: _step(call, q, k, v) for label, call in calls.items()}
        work, moved = 3.5 * work, 3 * moved
    else:
        runs = {label: _forward(call, q, k, v) for label, call in calls.items()}
    size = dict(B=1, H=H, G=G, T=T, S=S, D=D, dtype=str(dtype).removeprefix("torch."))
    return GpuCase(name, size, lambda: _parity(q, k, v, on, beta, name == "training"), runs, work, moved)


def _forward(call: Callable, *inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: call(*inputs)


def _step(call: Callable, *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; `autograd.grad` leaves no gradients behind to add to."""

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def _peers(
    T: int, S: int, H: int, D: int, beta: Tensor, dtype: torch.dtype, device: str
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Unsteered flash SDPA (the floor), and the ways to steer without a kernel of one's own."""
    causal, scale = T > 1, D**-0.5

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        strength = torch.ones(1, 1, 1, 1, device=device)
        q, k, v = add_bias_column(q, k, v, strength, beta, scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)[..., : -extra_columns(q.dtype)]

    def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias(), enable_gqa=True)

    cache: list[Tensor] = []

    def bias() -> Tensor:
        """[1, H, T, S], built at the first call, outside the timing; PASTA's official code builds it in every layer."""
        if not cache:
            seen = visible_keys(T, S, None, causal, device)
            cache.append(torch.where(seen, beta, -torch.inf).to(dtype).expand(1, H, T, S).contiguous())
        return cache[0]

    peers = {
        "sdpa flash, unsteered": flash,
        "sdpa, bias column": column,
        "sdpa, materialised mask": materialised,
    }
    if device == "cuda":  # on a CPU it would call a C++ compiler
        peers["flex_attention"] = _flex(T, S, beta, device)
    return peers


def _flex(T: int, S: int, beta: Tensor, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's own compiled attention with the bias as `score_mod`; compiled at the first call."""
    compiled: list[Callable] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not compiled:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def steer(score, b, h, i, j):
                return score + beta[0, j]

            def causal(b, h, i, j):
                return j <= i + S - T

            mask = create_block_mask(causal, None, None, T, S, device=device) if T > 1 else None
            kernel = torch.compile(flex_attention, dynamic=False)
            compiled.append(lambda q, k, v: kernel(q, k, v, score_mod=steer, block_mask=mask, enable_gqa=True))
        return compiled[0](q, k, v)

    return call


def _parity(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, training: bool) -> tuple[float, float]:
    """Relative RMS error of the output, and for training of dq, dk and dv, against fp64, with its bound.

    The loss looks at CHECKED_ROWS evenly spaced queries, so that the reference fits; the kernel computes all of them.
    """
    T, S = q.shape[2], k.shape[2]
    pick = torch.linspace(0, T - 1, min(T, CHECKED_ROWS), device=q.device).round().long().unique()
    ours = [x.detach().requires_grad_(training) for x in (q, k, v)]
    truth = [x.detach().double().requires_grad_(training) for x in (q, k, v)]
    out = flash_attention(*ours, gate=gate, beta=beta)[0].transpose(1, 2)[:, :, pick]
    seen = visible_keys(T, S, None, T > 1, q.device)[:, :, pick]
    wanted, _ = biased_attention(
        truth[0][:, :, pick], *truth[1:], gate=gate.double(), beta=beta.double(), mask=seen
    )  # [1, H, rows, D]
    bound = tolerance(q.dtype, "interpreter" if INTERPRETED else "triton")
    worst = relative_rms(out, wanted) / bound.output
    if training:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        ours, truth = torch.autograd.grad(out, ours, weight), torch.autograd.grad(wanted, truth, weight.double())
        errors = [relative_rms(a, b) / bound.gradient for a, b in zip(ours, truth, strict=True)]
        worst = max([worst, *errors], key=lambda e: math.inf if math.isnan(e) else e)
    return worst, 1.0

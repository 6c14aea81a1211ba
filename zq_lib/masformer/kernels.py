"""Banded flash attention: what a query's span does not hold is neither loaded nor computed.

Four layers: the Triton kernels (`kernels_forward.py`, `kernels_backward.py`), then here host wrappers, autograd
function and `banded_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.kernels import KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, NAMES, dense_rows, operand, padded, run
from zq_lib.masformer import kernels_backward, kernels_forward
from zq_lib.masformer.kernels_common import FEW, KIND_NUMBERS, NARROW, settings
from zq_lib.masformer.layout import Text

EVERYTHING = 2**29  # a span longer than any text, of which two still fit 32 bits
ROWS_PER_CHUNK = 32 if INTERPRETED else 512  # of the sinks' gradient: as many as a usual window holds (untimed)


@lru_cache(maxsize=256)
def _integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Spans or texts on the device; layers of a model ask for the same ones again and again."""
    with torch.inference_mode(False):  # or a later backward pass could not save it
        return torch.tensor(numbers, dtype=torch.int32, device=device)


def _spans(spans: Sequence[int | None], device: torch.device) -> tuple[Tensor | None, int]:
    """The pointer SPANS [H], or None and the one span of all heads."""
    sizes = tuple(EVERYTHING if span is None else min(span, EVERYTHING) for span in spans)
    return (None, sizes[0]) if len(set(sizes)) == 1 else (_integers(sizes, device), 0)


def _texts(texts: Sequence[Text], batch: int, keys: int, device: torch.device) -> Tensor | None:
    """The pointer TEXT, [B, 3] int32, or None for one whole text."""
    if len(texts) == 1 and texts[0] == Text(0, keys):
        return None
    rows = texts if len(texts) == batch else texts * batch
    return _integers(tuple(n for text in rows for n in (text.first, text.last, text.gap)), device)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, text: Tensor | None, span: int, kind: int, sinks: int,
    scale: float, widest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Host wrapper of the forward kernel: out [B, T, H, D] in q's type, lse [B, H, T] fp32."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    launch = settings("few" if T <= FEW else "narrow" if widest <= NARROW else "forward", q.dtype, D)
    out, lse = q.new_empty(B, T, H, D), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    args = (
        q, k, v, spans, text, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0), out.stride(2), out.stride(1),
        H, H // G, T, S, scale, span, sinks,
    )  # fmt: skip
    meta = dict(D=D, BLOCK_D=padded(D), BLOCK_M=launch.m, BLOCK_N=launch.n, KIND=kind, DOT=operand(q.dtype))
    run(kernels_forward.forward, "masformer.forward", triton.cdiv(T, launch.m) * B * H, q, args, launch, **meta)
    return out, lse


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, text: Tensor | None, out: Tensor, lse: Tensor,
    span: int, kind: int, sinks: int, scale: float, texts: Sequence[Text],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Host wrapper of the backward kernels: dq, dk, dv in their types. `grad` is [B, T, H, D] like `out`."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    grad = dense_rows(grad)
    sizes = (H, H // G, T, S, scale, span)
    tile = dict(D=D, BLOCK_D=padded(D), KIND=kind, DOT=operand(q.dtype))
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    grad_strides = (grad.stride(0), grad.stride(2), grad.stride(1))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)

    launch = settings("queries", q.dtype, D)
    args = (
        q, k, v, spans, text, out, grad, lse, delta, dq,
        *inputs, out.stride(0), out.stride(2), out.stride(1), *grad_strides, *sizes, sinks,
    )  # fmt: skip
    meta = dict(tile, BLOCK_M=launch.m, BLOCK_N=launch.n)
    grid = triton.cdiv(T, launch.m) * B * H
    run(kernels_backward.backward_queries, "masformer.backward_queries", grid, q, args, launch, **meta)

    launch = settings("keys", q.dtype, D)
    args = (q, k, v, spans, text, grad, lse, delta, dk, dv, *inputs, *grad_strides, *sizes)
    meta = dict(tile, BLOCK_M=launch.m, BLOCK_N=launch.n)
    grid = triton.cdiv(S, launch.n) * B * G
    run(kernels_backward.backward_keys, "masformer.backward_keys", grid, q, args, launch, **meta)

    sinks = min(sinks, S)
    if sinks:
        launch, chunks = settings("sinks", q.dtype, D), triton.cdiv(T, ROWS_PER_CHUNK)
        parts = [lse.new_empty(B, G, chunks, sinks, D) for _ in "kv"]
        args = (q, k, v, spans, text, grad, lse, delta, *parts, *inputs, *grad_strides, *sizes, sinks, chunks)
        meta = dict(tile, BLOCK_M=launch.m, BLOCK_N=launch.n)
        grid = triton.cdiv(sinks, launch.n) * chunks * B * G
        run(
            kernels_backward.backward_sinks,
            "masformer.backward_sinks",
            grid,
            q,
            (*args, ROWS_PER_CHUNK),
            launch,
            **meta,
        )
        for total, part in zip((dk, dv), parts, strict=True):
            _add_sinks(total, part.sum(2), texts)
    return dq, dk, dv


def _add_sinks(total: Tensor, part: Tensor, texts: Sequence[Text]) -> None:
    """Add the gradient of the sinks, [B, G, sinks, D], where they stand in `total` [B, G, S, D]."""
    for b, text in enumerate(texts):
        count = min(part.shape[2], text.last - text.first)
        rows = slice(None) if len(texts) == 1 else slice(b, b + 1)
        total[rows, :, text.first : text.first + count] += part[rows, :, :count].to(total.dtype)


class _Attention(torch.autograd.Function):
    """Autograd of the attention in q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, spans, text, texts, span, kind, sinks, scale, widest):
        out, lse = _attend(q, k, v, spans, text, span, kind, sinks, scale, widest)
        ctx.save_for_backward(q, k, v, spans, text, out, lse)
        ctx.named = dict(span=span, kind=kind, sinks=sinks, scale=scale, texts=texts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_gradients(grad, *ctx.saved_tensors, **ctx.named), *[None] * 8


def banded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[int | None],
    kind: str,
    sinks: int,
    texts: Sequence[Text],
    scale: float,
) -> Tensor:
    """What `local.local_attention` runs on a GPU, after it has checked its arguments and read padding and positions.

    `query` [B, H, T, D]; `key`, `value` [B, G, S, D], not repeated; fp32, fp16 or bf16, D up to 256, any strides.
    `spans` holds one span, or one per query head; `texts` one text, or one per row. Returns [B, H, T, D] in the query's
    type, laid out as [B, T, H, D]. Differentiable in query, key and value.
    """
    pointer, span = _spans(spans, query.device)
    text = _texts(tuple(texts), query.shape[0], key.shape[2], query.device)
    query, key, value = (dense_rows(x) for x in (query, key, value))
    S = key.shape[2]
    widest = max(S if one is None else min(S, one * (2 if kind == "two_block" else 1)) for one in spans)
    named = (pointer, text, tuple(texts), span, KIND_NUMBERS[kind], sinks, scale, widest)
    return _Attention.apply(query, key, value, *named).transpose(1, 2)


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: a window for widths 64 and 128, blocks, and heads and rows that differ."""
    kernels = {"few": kernels_forward.forward, "narrow": kernels_forward.forward, "forward": kernels_forward.forward}
    kernels |= {
        name: getattr(kernels_backward, f"backward_{name}") for name in ("queries", "keys", "sinks")
    }  # fmt: skip
    # bf16 is fp16 with another name to the compiler, and wide fp32 takes it minutes: neither is compiled on every run.
    cases = [(torch.float32, 64, "window", False), (torch.float16, 64, "window", False)]
    cases += [(torch.bfloat16, 128, "window", False), (torch.bfloat16, 64, "two_block", True)]
    return [_spec(name, kernel, *case) for name, kernel in kernels.items() for case in cases]


def _spec(name: str, kernel: Any, dtype: torch.dtype, width: int, kind: str, varied: bool) -> KernelSpec:
    """The specialisation that a launch on contiguous tensors of this type and width ends up with."""
    launch = settings(name, dtype, width)
    constants = dict(
        D=width, BLOCK_D=padded(width), BLOCK_M=launch.m, BLOCK_N=launch.n, KIND=KIND_NUMBERS[kind], DOT=DTYPES[dtype]
    )  # fmt: skip
    if not varied:
        constants |= dict(SPANS=None, TEXT=None)
    part = "*fp32:16" if name == "sinks" else f"*{NAMES[dtype]}:16"
    types = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ"), f"*{NAMES[dtype]}:16") | dict(DK=part, DV=part)
    types |= dict.fromkeys(("LSE", "DELTA"), "*fp32:16") | dict.fromkeys(("SPANS", "TEXT"), "*i32:16")
    types |= dict.fromkeys(("H", "GROUP", "T", "S", "span", "sinks", "CHUNKS"), "i32") | dict(scale="fp32")
    arguments = kernel.arg_names
    return KernelSpec(
        f"backward_{name}" if name in ("queries", "keys", "sinks") else name, kernel,
        signature={a: types.get(a, "i32:16") for a in arguments if a not in constants},  # the rest are strides, ROWS
        constexprs={a: constants[a] for a in arguments if a in constants},
        num_warps=launch.warps, num_stages=launch.stages,
        variant=f"{NAMES[dtype]} {width} {kind}{' varied' if varied else ''}",
    )  # fmt: skip


SPECS = _specs()

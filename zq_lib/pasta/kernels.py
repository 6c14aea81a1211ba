"""Flash attention with a rank-one bias: score[b, h, i, j] = scale q_i . k_j + gate[b, h] rows[b, i] beta[b, j].

PASTA's reweighting is this bias with beta = log(alpha) on the tokens to scale down (`reference.py`), so it fits into
the online softmax: nothing of size T S is built, and `gate` picks the steered heads. Four layers: the Triton kernels
(`kernels_forward.py`, `kernels_backward.py`), then here host wrapper, autograd function and `flash_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.kernels import KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, NAMES, WIDEST_HEAD, dense_rows, operand, padded, run
from zq_lib.pasta import kernels_backward, kernels_forward
from zq_lib.pasta.kernels_common import MERGE, settings, spans

MOST_SPLITS = 32  # the merge kernel holds this many partial rows in registers
KEYS_PER_SPLIT = 16 if INTERPRETED else 256  # fewer would not pay for a second launch (untimed)


def _mask_args(mask: Tensor | None, dim: int, block: int) -> tuple[tuple, tuple]:
    """The pointers (MASK, SPAN) and the strides (mask batch, mask row, span batch) that a kernel takes."""
    if mask is None:
        return (None, None), (0, 0, 0)
    span = spans(mask, dim, block)
    step = 0 if mask.shape[0] == 1 else mask.stride(0)
    return (mask.view(torch.uint8), span), (step, mask.stride(2), 0 if mask.shape[0] == 1 else span.stride(0))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, rows: Tensor | None, mask: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Host wrapper of the forward kernel: out [B, T, H, D] in q's type, lse [B, H, T] fp32."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    launch = settings("forward", q.dtype, D)
    out, lse = q.new_empty(B, T, H, D), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    pointers, strides = _mask_args(mask, 2, launch.m)
    args = (
        q, k, v, gate, beta, rows, *pointers, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0), out.stride(2), out.stride(1), *strides,
        H, H // G, T, S, scale,
    )  # fmt: skip
    meta = dict(D=D, BLOCK_D=padded(D), BLOCK_M=launch.m, BLOCK_N=launch.n, CAUSAL=causal, DOT=operand(q.dtype))
    run(kernels_forward.forward, "pasta.forward", triton.cdiv(T, launch.m) * B * H, q, args, launch, **meta)
    return out, lse


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, rows: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Host wrapper of the decode and merge kernels, T = 1: out [B, 1, H, D] in q's type, lse [B, H, 1] fp32."""
    B, H, _, D = q.shape
    G, S = k.shape[1], k.shape[2]
    launch = settings("decode", q.dtype, D)
    splits = _splits(B * G, S, q.device)
    part, part_lse = (torch.empty(B, H, splits, n, dtype=torch.float32, device=q.device) for n in (D, 1))
    out, lse = q.new_empty(B, 1, H, D), torch.empty(B, H, 1, dtype=torch.float32, device=q.device)
    flags = None if mask is None else mask.view(torch.uint8)
    args = (
        q, k, v, gate, beta, rows, flags, part, part_lse,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], 0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        H, H // G, S, scale, splits,
    )  # fmt: skip
    tile = dict(D=D, BLOCK_D=padded(D))
    rows_of_group = max(16, triton.next_power_of_2(H // G))  # 16 is the least that a dot product takes
    meta = dict(tile, BLOCK_M=rows_of_group, BLOCK_N=launch.n, DOT=operand(q.dtype))
    run(kernels_forward.decode, "pasta.decode", B * G * splits, q, args, launch, **meta)
    args = (part, part_lse, out, lse, splits)
    run(kernels_forward.merge, "pasta.merge", B * H, q, args, MERGE, **tile, MOST=triton.next_power_of_2(splits))
    return out, lse


def _splits(owners: int, keys: int, device: torch.device) -> int:
    """Into how many slices to cut the keys: enough programs for two per processor, each with keys enough to pay."""
    processors = 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_SPLITS, triton.cdiv(keys, KEYS_PER_SPLIT), triton.cdiv(2 * processors, owners)))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, rows: Tensor | None, mask: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float, of_gate: bool, of_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Host wrapper of the backward kernels: dq, dk, dv in their types; dgate [B, H], dbeta [B, S] fp32 or None."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    grad = dense_rows(grad)
    sizes = (H, H // G, T, S, scale)
    tile = dict(D=D, BLOCK_D=padded(D), CAUSAL=causal, DOT=operand(q.dtype))
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    grad_strides = (grad.stride(0), grad.stride(2), grad.stride(1))
    empty = torch.empty_like
    dq, dk, dv = (empty(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = empty(lse)

    launch = settings("queries", q.dtype, D)
    blocks = triton.cdiv(T, launch.m)
    gate_parts = lse.new_empty(B, H, blocks) if of_gate else None
    pointers, strides = _mask_args(mask, 2, launch.m)
    args = (
        q, k, v, gate, beta, rows, *pointers, out, grad, lse, delta, dq, gate_parts,
        *inputs, out.stride(0), out.stride(2), out.stride(1), *grad_strides, *strides, *sizes,
    )  # fmt: skip
    run(
        kernels_backward.backward_queries, "pasta.backward_queries", blocks * B * H, q, args, launch,
        BLOCK_M=launch.m, BLOCK_N=launch.n, **tile,
    )  # fmt: skip

    launch = settings("keys", q.dtype, D)
    beta_parts = lse.new_empty(B, G, S) if of_beta else None
    pointers, strides = _mask_args(mask, 3, launch.n)
    args = (
        q, k, v, gate, beta, rows, *pointers, grad, lse, delta, dk, dv, beta_parts,
        *inputs, *grad_strides, *strides, *sizes,
    )  # fmt: skip
    run(
        kernels_backward.backward_keys, "pasta.backward_keys", triton.cdiv(S, launch.n) * B * G, q, args, launch,
        BLOCK_M=launch.m, BLOCK_N=launch.n, **tile,
    )  # fmt: skip
    return dq, dk, dv, gate_parts.sum(-1) if of_gate else None, beta_parts.sum(1) if of_beta else None


class _Attention(torch.autograd.Function):
    """Autograd of the attention; gate [B, H] and beta [B, S] are fp32 and whole, lse has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, gate, beta, rows, mask, causal, scale):
        if q.shape[2] == 1:
            out, lse = _attend_one(q, k, v, gate, beta, rows, mask, scale)
        else:
            out, lse = _attend(q, k, v, gate, beta, rows, mask, causal, scale)
        ctx.save_for_backward(q, k, v, gate, beta, rows, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        need = ctx.needs_input_grad
        grads = _gradients(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, need[3], need[4])
        return *(g if needed else None for g, needed in zip(grads, need, strict=False)), None, None, None, None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the rank-one bias gate[b, h] * rows[b, i] * beta[b, j] added to the scaled scores.

    Args: `q` [B, H, T, D]; `k`, `v` [B, G, S, D], not repeated, H a multiple of G; fp32, fp16 or bf16, D up to 256, any
    strides. `gate` [B or 1, H] and `beta` [B or 1, S] in natural logarithms, finite; `rows` [B or 1, T], 0 where a
    query takes no bias. `mask` [B or 1, 1, T, S] bool, True = visible, decides alone; without it query i sits at key
    position S - T + i if `causal`, else everything is visible. One query (T = 1) runs the split-key kernels.

    Returns the output as [B, T, H, D] contiguous in q's type, which is what transformers wants, and the log-sum-exp of
    the scores [B, H, T] fp32, which has no gradient. A query that sees no key gives 0 and -inf.
    Differentiable in q, k, v, gate and beta. Raises ValueError for what `supports` refuses.

    >>> out, lse = flash_attention(q, k, v, gate=gate, beta=torch.where(unmarked, math.log(0.01), 0.0))
    """
    able, why = supports(q, k, v, mask)
    if not able:
        raise ValueError(f"flash_attention cannot run this call: {why}; use biased_attention of the reference instead.")
    B, H, T, D = q.shape
    S = k.shape[2]
    gate = gate.to(torch.float32).expand(B, H).contiguous()
    beta = beta.to(torch.float32).expand(B, S).contiguous()
    if rows is not None:
        rows = rows.detach().to(torch.float32).expand(B, T).contiguous()
    if mask is not None:
        mask = dense_rows(mask.expand(-1, -1, T, S))
    q, k, v = (dense_rows(x) for x in (q, k, v))
    causal = causal and mask is None and T > 1
    return _Attention.apply(q, k, v, gate, beta, rows, mask, causal, D**-0.5 if scale is None else float(scale))


def supports(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[bool, str]:
    """Whether the kernels can do this call, and if not, why: what a dispatcher asks before it picks them."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return False, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not all float32, all float16 or all bfloat16"
    if k.shape != (B, G, S, D) or v.shape != k.shape or H % max(G, 1):
        return (
            False,
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [B, H, T, D] and twice [B, G, S, D]",
        )
    if not 0 < D <= WIDEST_HEAD or 0 in q.shape or 0 in k.shape:
        return False, f"the head width {D} is outside 1 to {WIDEST_HEAD} or a dimension of q or k is empty"
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, 1, T, S), (1, 1, T, S))):
        return False, f"the mask is {mask.dtype} {tuple(mask.shape)}, not bool [{B} or 1, 1, {T}, {S}]"
    return True, ""


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: each kernel for widths 64 and 128, in fp32, and with a mask."""
    kernels = {
        "forward": kernels_forward.forward,
        "decode": kernels_forward.decode,
        "merge": kernels_forward.merge,
        "backward_queries": kernels_backward.backward_queries,
        "backward_keys": kernels_backward.backward_keys,
    }
    # fp16 is bf16 with another name to the compiler, and wide fp32 takes it minutes: neither is compiled on every run.
    cases = [(torch.float32, 64, False), (torch.bfloat16, 64, False), (torch.bfloat16, 128, False)]
    cases += [(torch.bfloat16, 64, True)]
    return [
        _spec(name, kernel, *case)
        for name, kernel in kernels.items()
        for case in cases
        if name != "merge" or not case[2]
    ]


def _spec(name: str, kernel: Any, dtype: torch.dtype, width: int, masked: bool) -> KernelSpec:
    """The specialisation that a launch on contiguous tensors of this type and width ends up with."""
    launch = MERGE if name == "merge" else settings(name.removeprefix("backward_"), dtype, width)
    here = NAMES[dtype]
    constants = dict(
        D=width, BLOCK_D=padded(width), BLOCK_M=16 if name == "decode" else launch.m, BLOCK_N=launch.n,
        MOST=MOST_SPLITS, CAUSAL=not masked, DOT=DTYPES[dtype],
    )  # fmt: skip
    if not masked:
        constants |= dict(MASK=None, SPAN=None)
    types = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), f"*{here}:16")
    types |= dict.fromkeys(("GATE", "BETA", "ROWS", "LSE", "DELTA", "DGATE", "DBETA", "PART", "PART_LSE"), "*fp32:16")
    types |= dict(MASK="*u8:16", SPAN="*i32:16", scale="fp32", H="i32", GROUP="i32", T="i32", S="i32", SPLITS="i32")
    arguments = kernel.arg_names
    return KernelSpec(
        name, kernel,
        signature={a: types.get(a, "i32:16") for a in arguments if a not in constants},  # the rest are strides
        constexprs={a: constants[a] for a in arguments if a in constants},
        num_warps=launch.warps, num_stages=launch.stages,
        variant=f"{here} {width}{' mask' if masked else ''}",
    )  # fmt: skip


SPECS = _specs()

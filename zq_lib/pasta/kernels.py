"""Flash attention with a rank-one bias: score[b, h, i, j] = scale q_i . k_j + gate[b, h] rows[b, i] beta[b, j].

PASTA's reweighting is this bias with beta = log(alpha) on the tokens to scale down (`reference.py`), so it fits into the
online softmax: nothing of size T S is built and the steered heads are picked by `gate`. Four layers: kernel, host
wrapper, autograd function, `flash_attention`. Dot products take operands in the input's type (ieee for fp32) and
accumulate in fp32; everything else is fp32. The backward kernels are in `kernels_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.backend import Launch, record
from zq_lib.core.kernels import KernelSpec
from zq_lib.pasta import kernels_backward
from zq_lib.pasta.kernels_common import (
    DTYPES,
    FILL,
    INTERPRETED,
    LOG2E,
    MERGE,
    WIDEST_HEAD,
    Settings,
    is_visible,
    load_tile,
    operand,
    padded,
    settings,
    spans,
    store_tile,
)

MOST_SPLITS = 32  # the merge kernel holds this many partial rows in registers
KEYS_PER_SPLIT = 16 if INTERPRETED else 256  # fewer would not pay for a second launch (untimed)


@triton.jit
def _fold(
    acc, top, total, q, K, V, BETA, MASK, stride_k, stride_v, stride_mask, query, gain, reach, scale, start, stop, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fold the keys of [start, stop) into the online softmax. EDGE: some of them may be out of sight.

    acc [M, BLOCK_D], top, total, query, gain [M]; scale and gain carry log2(e); all pointers are those of one (b, g).
    """
    for first in range(start, stop, BLOCK_N):
        offset = tl.cast(first, tl.int64)
        key = first + tl.arange(0, BLOCK_N)
        k = load_tile(K + offset * stride_k, stride_k, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # `reach` is 0 for an unsteered program, which then reads no bias and adds an exact zero.
        scores += gain[:, None] * tl.load(BETA + key, mask=key < reach, other=0.0)[None, :]
        if EDGE:
            visible = is_visible(MASK, stride_mask, query[:, None], key[None, :], T, S, CAUSAL)
            scores = tl.where(visible, scores, FILL)
        peak = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        if EDGE:
            p = tl.where(visible, p, 0.0)  # FILL - FILL is 0, whose exponential is 1
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(p, 1)
        top = peak
        v = load_tile(V + offset * stride_v, stride_v, S - first, BLOCK_N, D, BLOCK_D, EDGE).to(DOT)
        # Rounded to V's type first, so that the interpreter, whose operands are fp32, rounds where a GPU does.
        p = p.to(V.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def _forward(
    Q, K, V, GATE, BETA, ROWS, MASK, SPAN, OUT, LSE,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_mb, stride_mt, stride_sb,
    H, GROUP, T, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, query block); a head's blocks are neighbours, so its keys stay in the L2 cache."""
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first, the tail is short
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    first = block * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    row = first.to(tl.int64)
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    BETA += b * S
    q = load_tile(Q + b * stride_qb + h * stride_qh + row * stride_qt, stride_qt, T - first, BLOCK_M, D, BLOCK_D, True)
    q = q.to(DOT)
    gate = tl.load(GATE + bh)
    gain = tl.zeros([BLOCK_M], tl.float32) + gate * LOG2E
    if ROWS is not None:
        gain *= tl.load(ROWS + b * T + query, mask=query < T, other=0.0)
    reach = tl.where(tl.max(tl.abs(gain), 0) > 0, S, 0)
    start = 0
    if MASK is not None:
        MASK += b * stride_mb
        start = tl.load(SPAN + b * stride_sb + 2 * block) // BLOCK_N * BLOCK_N
        stop = tl.load(SPAN + b * stride_sb + 2 * block + 1)
        full = start
    elif CAUSAL:
        stop = tl.minimum(tl.maximum(S - T + first + BLOCK_M, 0), S)
        full = tl.minimum(tl.maximum(S - T + first + 1, 0), S) // BLOCK_N * BLOCK_N
    else:
        stop = S
        full = S // BLOCK_N * BLOCK_N
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    if MASK is None:
        acc, top, total = _fold(
            acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain, reach, scale,
            start, full, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, False, DOT,
        )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, stride_mt, query, gain, reach, scale,
        full, stop, T, S, D, BLOCK_D, BLOCK_N, CAUSAL, True, DOT,
    )  # fmt: skip
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    out = OUT + b * stride_ob + h * stride_oh + row * stride_ot
    store_tile(out, stride_ot, T - first, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(LSE + bh.to(tl.int64) * T + query, lse, mask=query < T)


@triton.jit
def _decode(
    Q, K, V, GATE, BETA, ROWS, MASK, PART, PART_LSE,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, stride_mb,
    H, GROUP, S, scale, SPLITS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key/value head, slice of the keys): the group's heads are its rows, so keys are read once."""
    split = tl.program_id(0) % SPLITS
    bg = tl.program_id(0) // SPLITS
    b = (bg // (H // GROUP)).to(tl.int64)
    g = (bg % (H // GROUP)).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    here = member < GROUP
    head = b * H + g * GROUP + member  # over batch and heads
    K += b * stride_kb + g * stride_kg
    V += b * stride_vb + g * stride_vg
    BETA += b * S
    q = load_tile(Q + b * stride_qb + g * GROUP * stride_qh, stride_qh, GROUP, BLOCK_M, D, BLOCK_D, True).to(DOT)
    gain = tl.load(GATE + head, mask=here, other=0.0) * LOG2E
    if ROWS is not None:
        gain *= tl.load(ROWS + b)
    reach = tl.where(tl.max(tl.abs(gain), 0) > 0, S, 0)
    share = tl.cdiv(tl.cdiv(S, BLOCK_N), SPLITS) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, S)
    full = start
    if MASK is not None:
        MASK += b * stride_mb
    else:
        full = tl.maximum(stop // BLOCK_N * BLOCK_N, start)
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + FILL
    total = tl.zeros([BLOCK_M], tl.float32)
    only = tl.zeros([BLOCK_M], tl.int32)  # every row of the tile is the same query
    if MASK is None:
        acc, top, total = _fold(
            acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, 0, only, gain, reach, scale, start, full, 1, S,
            D, BLOCK_D, BLOCK_N, False, False, DOT,
        )  # fmt: skip
    acc, top, total = _fold(
        acc, top, total, q, K, V, BETA, MASK, stride_ks, stride_vs, 0, only, gain, reach, scale, full, stop, 1, S,
        D, BLOCK_D, BLOCK_N, False, True, DOT,
    )  # fmt: skip
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    part = PART + ((b * H + g * GROUP) * SPLITS + split) * D
    store_tile(part, SPLITS * D, GROUP, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), top + tl.log2(total))
    tl.store(PART_LSE + head * SPLITS + split, lse, mask=here)


@triton.jit
def _merge(
    PART, PART_LSE, OUT, LSE, SPLITS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): weigh each slice's output by its share of the softmax sum (base-2 logarithms)."""
    head = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, MOST)
    part = load_tile(PART + head * SPLITS * D, D, SPLITS, MOST, D, BLOCK_D, True)
    lse = tl.load(PART_LSE + head * SPLITS + slot, mask=slot < SPLITS, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), FILL)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    out = tl.sum(part * weight[:, None], 0) / total
    column = tl.arange(0, BLOCK_D)
    tl.store(OUT + head * D + column, out.to(OUT.dtype.element_ty), mask=column < D)
    tl.store(LSE + head, tl.where(dead, float("-inf"), (top + tl.log2(total)) / LOG2E))


def _run(kernel: Any, name: str, grid: int, like: Tensor, args: tuple, launch: Settings, **meta: Any) -> None:
    """Start `kernel` with `grid` programs on the device of `like`, and record it."""
    with torch.cuda.device_of(like):
        kernel[(grid,)](*args, **meta, num_warps=launch.warps, num_stages=launch.stages)
    record(Launch(name, "interpreter" if INTERPRETED else "triton", (grid,), {**meta, "warps": launch.warps}))


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
    _run(_forward, "pasta.forward", triton.cdiv(T, launch.m) * B * H, q, args, launch, **meta)
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
    _run(_decode, "pasta.decode", B * G * splits, q, args, launch, **meta)
    args = (part, part_lse, out, lse, splits)
    _run(_merge, "pasta.merge", B * H, q, args, MERGE, **tile, MOST=triton.next_power_of_2(splits))
    return out, lse


def _splits(owners: int, keys: int, device: torch.device) -> int:
    """Into how many slices to cut the keys: enough programs for two per processor, each with keys enough to pay."""
    processors = 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_SPLITS, triton.cdiv(keys, KEYS_PER_SPLIT), triton.cdiv(2 * processors, owners)))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, rows: Tensor | None, mask: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float, of_gate: bool, of_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Host wrapper of the two backward kernels: dq, dk, dv in their types, dgate [B, H] and dbeta [B, S] fp32 or None."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    grad = _rows_together(grad)
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
    _run(
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
    _run(
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


def _rows_together(x: Tensor) -> Tensor:
    """`x` itself when its last dimension is dense, which is all that the kernels ask; otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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
    strides. `gate` [B or 1, H] and `beta` [B or 1, S] in natural logarithms, finite; `rows` [B or 1, T], 0 where a query
    takes no bias. `mask` [B or 1, 1, T, S] bool, True = visible, decides alone; without it query i sits at key position
    S - T + i if `causal`, else everything is visible. One query (T = 1) runs the split-key kernels.

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
        mask = _rows_together(mask.expand(-1, -1, T, S))
    q, k, v = (_rows_together(x) for x in (q, k, v))
    causal = causal and mask is None and T > 1
    return _Attention.apply(q, k, v, gate, beta, rows, mask, causal, D**-0.5 if scale is None else float(scale))


def supports(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[bool, str]:
    """Whether the kernels can do this call, and if not, why: what a dispatcher asks before it picks them."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return False, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not all float32, all float16 or all bfloat16"
    if k.shape != (B, G, S, D) or v.shape != k.shape or H % max(G, 1):
        return False, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [B, H, T, D] and twice [B, G, S, D]"
    if not 0 < D <= WIDEST_HEAD or 0 in q.shape or 0 in k.shape:
        return False, f"the head width {D} is outside 1 to {WIDEST_HEAD} or a dimension of q or k is empty"
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, 1, T, S), (1, 1, T, S))):
        return False, f"the mask is {mask.dtype} {tuple(mask.shape)}, not bool [{B} or 1, 1, {T}, {S}]"
    return True, ""


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: each kernel in each type for widths 64 and 128, plus the variant with a mask."""
    kernels = {
        "forward": _forward,
        "decode": _decode,
        "merge": _merge,
        "backward_queries": kernels_backward.backward_queries,
        "backward_keys": kernels_backward.backward_keys,
    }
    cases = [(dtype, width, False) for dtype in DTYPES for width in (64, 128)]
    cases += [(torch.bfloat16, 64, True), (torch.bfloat16, 256, False)]
    return [_spec(name, kernel, *case) for name, kernel in kernels.items() for case in cases if name != "merge" or not case[2]]


def _spec(name: str, kernel: Any, dtype: torch.dtype, width: int, masked: bool) -> KernelSpec:
    """The specialisation that a launch on contiguous tensors of this type and width ends up with."""
    launch = MERGE if name == "merge" else settings(name.removeprefix("backward_"), dtype, width)
    here = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
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

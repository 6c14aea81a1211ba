"""Host wrappers of TED's Triton kernels: the divergence over a vocabulary, and the distance of filtered states.

Four layers: the kernels (`kernels_divergence.py`, `kernels_filtered.py`), then here their launches, the autograd
functions, and `fused_divergence` and `fused_filtered_error`, which `divergence` and `filtered_error` run on a GPU after
they have checked their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.kernels import HIP_STAGES, KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, LOG2E, NAMES, dense_rows, operand, run
from zq_lib.ted import kernels_divergence, kernels_filtered
from zq_lib.ted.filtered import Filtered

WAVES = 2  # programs for each processor below which a row of logits is split


@dataclass(frozen=True)
class Settings:
    """One row of the launch table: tile of rows x columns, inner step, warps per program, stages of the pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# No row has been timed on a GPU. Sixteen logits of each model for a thread make two wide loads in half precision. The
# tile of a product is the usual one; fp32 in ieee precision has no tensor cores and unrolls into registers.
LOGITS = Settings(0, 4096, 0, 8, 2)
MERGE = Settings(16, 0, 0, 4, 1)
LAUNCH = {True: Settings(128, 128, 64, 8, 3), False: Settings(32, 32, 32, 4, 2)}
TOY = Settings(32, 32, 16, 4, 1)  # in the interpreter a program costs milliseconds whatever its size
TOY_LOGITS = Settings(0, 512, 0, 4, 1)


def _logits() -> Settings:
    return TOY_LOGITS if INTERPRETED else LOGITS


def _product(dtype: torch.dtype) -> Settings:
    row = TOY if INTERPRETED else LAUNCH[dtype != torch.float32]
    return Settings(row.m, row.n, row.k, row.warps, HIP_STAGES) if torch.version.hip else row


def parts(rows: int, classes: int, device: torch.device) -> int:
    """Into how many parts a row of logits is split: one, unless too few rows would leave processors idle."""
    processors = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    if rows >= WAVES * processors:
        return 1
    return min(triton.cdiv(2 * WAVES * processors, rows), triton.cdiv(classes, _logits().n))


def _forward(s: Tensor, t: Tensor, rows: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Divergence of each kept row, [n] fp32, and what the gradient needs of it, [n, 4] fp32."""
    count, classes = s.shape[0] if rows is None else len(rows), s.shape[1]
    row, split = _logits(), parts(count, classes, s.device)
    columns = triton.cdiv(triton.cdiv(classes, split), row.n) * row.n
    scale = LOG2E.value / temperature
    part = torch.empty(count, split, 5, device=s.device)
    args = (s, t, rows, part, classes, columns, s.stride(0), t.stride(0), scale)
    run(kernels_divergence.kl_forward, "ted.kl_forward", (count, split), s, args, row, BLOCK=row.n)
    loss, stats = torch.empty(count, device=s.device), torch.empty(count, 4, device=s.device)
    meta = dict(BLOCK=MERGE.m, BLOCK_P=triton.next_power_of_2(split))
    args = (part, loss, stats, count, split, scale)
    run(kernels_divergence.kl_merge, "ted.kl_merge", triton.cdiv(count, MERGE.m), s, args, MERGE, **meta)
    return loss, stats


class _Divergence(torch.autograd.Function):
    """s, t [N, V] with dense rows, rows [n] or None."""

    @staticmethod
    def forward(ctx, s, t, rows, temperature, squared, overwrite):
        count = s.shape[0] if rows is None else len(rows)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        ctx.factor = (temperature**2 if squared else 1.0) / max(count, 1)
        if not count:
            ctx.save_for_backward(s, t, rows, s.new_empty(0, 4))
            return torch.zeros((), device=s.device)
        loss, stats = _forward(s, t, rows, temperature)
        ctx.save_for_backward(s, t, rows, stats)
        return (loss.double().sum() * ctx.factor).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        s, t, rows, stats = ctx.saved_tensors
        if not len(stats):
            return torch.zeros_like(s), None, None, None, None, None
        place = None
        if rows is not None:
            place = torch.full((len(s),), -1, dtype=torch.int32, device=s.device)
            place[rows] = torch.arange(len(rows), dtype=torch.int32, device=s.device)
        grad = s.detach() if ctx.overwrite else torch.empty(s.shape, dtype=s.dtype, device=s.device)
        row, (count, classes) = _logits(), s.shape
        scale, factor = LOG2E.value / ctx.temperature, ctx.factor / ctx.temperature
        strides = (s.stride(0), t.stride(0), grad.stride(0))
        args = (s, t, place, stats, outer, grad, classes, *strides, scale, factor)
        grid = (count, triton.cdiv(classes, row.n))
        run(kernels_divergence.kl_backward, "ted.kl_backward", grid, s, args, row, BLOCK=row.n)
        if ctx.overwrite:  # a kernel's writing is hidden from autograd, which has to tell others that need the logits
            torch.autograd.graph.increment_version(s)
        return grad, None, None, None, None, None


def fused_divergence(
    s: Tensor, t: Tensor, rows: Tensor | None, temperature: float, squared: bool, overwrite: bool
) -> Tensor:
    """KL(teacher || student) as the mean over `rows` [n] int64 of logits [N, V], None for all; a scalar in fp32.

    Logits are fp32, fp16 or bf16, of each model its own. The gradient is formed in the backward pass; with `overwrite`
    over the student's logits, which autograd then refuses to an operation that still needs them.
    """
    return _Divergence.apply(dense_rows(s), dense_rows(t), rows, temperature, squared, overwrite)


@lru_cache(maxsize=32)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device; from step to step the allocator hands out the same ones."""
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def _same_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves when their rows are dense and equally far apart, as one launch asks; otherwise copies."""
    found = [dense_rows(t) for t in tensors]
    return found if len({t.stride(0) for t in found}) == 1 else [t.contiguous() for t in found]


def _gap(
    student: Sequence[Filtered], teacher: Sequence[Filtered], rows: Tensor | None, store: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of squared differences [K] fp32, and if `store` the differences D / sqrt(n) [K, n, d_f] in their type."""
    first, pairs = student[0].hidden, len(student)
    count, dim = first.shape[0] if rows is None else len(rows), student[0].dim
    row = _product(first.dtype)
    sides = [[_same_rows(x) for x in zip(*side, strict=True)] for side in (student, teacher)]
    addresses = tuple(x[k].data_ptr() for k in range(pairs) for side in sides for x in side)
    tiles = triton.cdiv(count, row.m) * triton.cdiv(dim, row.n)
    part = torch.empty(pairs, tiles, device=first.device)
    gap = torch.empty(pairs, count, dim, dtype=first.dtype, device=first.device) if store else None
    widths = [hidden[0].shape[1] for hidden, _, _ in sides]
    strides = [x[i][0].stride(0) for i in (0, 1) for x in sides]
    args = (_table(addresses, first.device), rows, gap, part, count, dim, *widths, *strides, 1 / math.sqrt(count))
    meta = dict(BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, ELEMENT=DTYPES[first.dtype], DOT=operand(first.dtype))
    meta["ALIGNED"] = all(a % 16 == 0 for a in addresses)
    run(kernels_filtered.filtered_gap, "ted.filtered_gap", (tiles, pairs), first, args, row, **meta)
    return part.sum(1), gap


class _Errors(torch.autograd.Function):
    """teacher and rows, then hidden [N, d_s], weight [d_f, d_s] and bias [d_f] of each of the student's K layers.

    D is kept over sqrt(n), not D itself: D^T H is a sum over n rows, which need not fit fp16.
    """

    @staticmethod
    def forward(ctx, teacher, rows, *tensors):
        student = [Filtered(*tensors[k : k + 3]) for k in range(0, len(tensors), 3)]
        count, dim = student[0].hidden.shape[0] if rows is None else len(rows), student[0].dim
        ctx.factor = 2 / (max(math.sqrt(count), 1) * dim)
        total, gap = torch.zeros(len(student), device=tensors[0].device), None
        if count:
            total, gap = _gap(student, teacher, rows, store=any(ctx.needs_input_grad))
        ctx.save_for_backward(gap, rows, *tensors)
        return total / max(count * dim, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        gap, rows, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if gap is None:
            return None, None, *(torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True))
        factors = outer.float() * ctx.factor
        grads: list[Tensor | None] = []
        for k, d in enumerate(gap):
            hidden, weight, bias = tensors[3 * k : 3 * k + 3]
            of_hidden, of_weight, of_bias = needed[3 * k : 3 * k + 3]
            factor = factors[k : k + 1]  # of one dimension, so that half precision is multiplied in single
            d_hidden = d_weight = d_bias = None
            if of_hidden:
                d_hidden = (d @ weight).mul_(factor)
                if rows is not None:
                    d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden)
            if of_weight:
                d_weight = (d.T @ (hidden if rows is None else hidden[rows])).mul_(factor)
            if of_bias:
                d_bias = (d.sum(0, dtype=torch.float32) * factor).to(bias.dtype)
            grads += [d_hidden, d_weight, d_bias]
        return None, None, *grads


def fused_filtered_error(student: Sequence[Filtered], teacher: Sequence[Filtered], rows: Tensor | None) -> Tensor:
    """Mean over `rows` [n] int64, None for all, and d_f of (Z_s - Z_t)^2 for each of K pairs, [K] fp32, in one launch.

    All tensors have one type, fp32, fp16 or bf16; `hidden` [N, d] of all layers of a model has one width. What is kept
    for the gradients, which are plain products and the vendor's library does best, is D in that type.
    """
    return _Errors.apply(teacher, rows, *(x for side in student for x in side))


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: both families in half precision and fp32, with kept rows."""
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        name = NAMES[dtype]
        types = dict.fromkeys(("S", "T", "GRAD", "GAP"), f"*{name}:16")
        for part in ("kl_forward", "kl_backward"):
            kernel = getattr(kernels_divergence, part)
            specs.append(_spec(part, kernel, types, dict(BLOCK=LOGITS.n), LOGITS, name))
        row = LAUNCH[dtype != torch.float32]
        sizes = dict(
            BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, ELEMENT=DTYPES[dtype], DOT=DTYPES[dtype], ALIGNED=True
        )
        specs.append(_spec("filtered_gap", kernels_filtered.filtered_gap, types, sizes, row, name))
    specs.append(_spec("kl_merge", kernels_divergence.kl_merge, {}, dict(BLOCK=MERGE.m, BLOCK_P=16), MERGE, "fp32"))
    return specs


def _spec(name: str, kernel: Any, types: dict, constants: dict, row: Settings, variant: str) -> KernelSpec:
    types = types | dict.fromkeys(("PART", "LOSS", "STATS", "OUTER"), "*fp32:16")
    types |= dict.fromkeys(("ROWS", "ADDRESSES"), "*i64:16") | {"PLACE": "*i32:16"}
    types |= dict.fromkeys(("scale", "factor", "shrink"), "fp32") | dict.fromkeys(("rows", "parts"), "i32")
    return KernelSpec(
        name, kernel,
        signature={a: types.get(a, "i32:16") for a in kernel.arg_names if a not in constants},  # sizes and strides
        constexprs=constants, num_warps=row.warps, num_stages=row.stages, variant=variant,
    )  # fmt: skip


SPECS = _specs()

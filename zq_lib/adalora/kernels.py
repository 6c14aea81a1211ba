"""Host wrappers of AdaLoRA's Triton kernels: the fused linear layer, and importance over all adapters in one launch.

Four layers: the kernels (`kernels_linear.py`, `kernels_importance.py`), then here their launches, the autograd function
and `fused_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.adalora import kernels_importance, kernels_linear
from zq_lib.adalora.adapter import Triplets
from zq_lib.core.kernels import HIP_STAGES, KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, dense_rows, operand, padded, run

MOST_RANK = 128
WIDE_RANK = 32  # up to here H is worked out again by every column of tiles, which saves a launch
MOST_SPLITS = 32  # partial sums of the weights' gradients


@dataclass(frozen=True)
class Settings:
    """One row of the launch table: the tile, warps per program, stages of the load pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# No row has been timed on a GPU. Half precision: the usual tile of a dense product, half as wide where a P tile of more
# than 32 ranks would spill on sm_80; fp32 in ieee precision has no tensor cores and unrolls into registers.
LAUNCH = {
    ("matmul", True): Settings(128, 128, 32, 8, 3),
    ("matmul", False): Settings(32, 32, 32, 4, 2),
    ("wide", True): Settings(128, 64, 32, 8, 3),
    ("wide", False): Settings(32, 32, 32, 4, 2),
    ("project", True): Settings(64, 0, 64, 4, 3),
    ("project", False): Settings(32, 0, 32, 4, 2),
    ("outer", True): Settings(32, 64, 0, 4, 2),
    ("outer", False): Settings(16, 32, 0, 4, 2),
}
STREAM, ONE_WARP = Settings(0, 0, 0, 4, 1), Settings(0, 0, 0, 1, 1)
TOY = Settings(16, 16, 16, 4, 1)  # in the interpreter a program costs milliseconds whatever its size


def settings(kernel: str, dtype: torch.dtype) -> Settings:
    """The launch settings of "matmul", "wide" (a matmul with H given), "project" or "outer" for tensors of `dtype`."""
    if INTERPRETED:
        return TOY
    row = LAUNCH[kernel, dtype != torch.float32]
    if torch.version.hip:
        return Settings(row.m, row.n, row.k, row.warps, HIP_STAGES)
    return row


def _project(a: Tensor, u: Tensor) -> Tensor:
    """A U for A [M, K] and U [K, R] of any strides, [M, R] fp32."""
    (m, k), r = a.shape, u.shape[1]
    row, h = settings("project", a.dtype), torch.empty(m, r, dtype=torch.float32, device=a.device)
    args = (a, u, h, m, k, r, a.stride(0), u.stride(0), u.stride(1))
    meta = dict(BLOCK_M=row.m, BLOCK_K=row.k, BLOCK_R=padded(r), DOT=operand(a.dtype))
    run(kernels_linear.project, "adalora.project", triton.cdiv(m, row.m), a, args, row, **meta)
    return h


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None, u: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A B + bias + ((A U) * c) V in A's type, and A U in fp32. A [M, K] has dense rows; B, U, V any strides."""
    (m, k), n, r = a.shape, b.shape[1], u.shape[1]
    given = r > WIDE_RANK
    h = _project(a, u) if given else torch.empty(m, r, dtype=torch.float32, device=a.device)
    row, out = settings("wide" if given else "matmul", a.dtype), torch.empty(m, n, dtype=a.dtype, device=a.device)
    args = (a, b, bias, u, c, v, h, out, m, n, k, r, a.stride(0), *b.stride(), *u.stride(), *v.stride())
    meta = dict(
        BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, BLOCK_R=padded(r), GIVEN=given, DOT=operand(a.dtype)
    )  # fmt: skip
    grid = triton.cdiv(m, row.m) * triton.cdiv(n, row.n)
    run(kernels_linear.low_rank_matmul, "adalora.matmul", grid, a, args, row, **meta)
    return out, h


def _outer(a: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """A^T (H * c), [D, R] fp32, for A [M, D] with dense rows and H [M, R] fp32."""
    (m, d), r = a.shape, h.shape[1]
    row = settings("outer", a.dtype)
    splits = max(1, min(MOST_SPLITS, m // (4 * row.m)))
    rows = triton.cdiv(triton.cdiv(m, splits), row.m) * row.m
    splits = max(1, triton.cdiv(m, rows))
    part = torch.empty(splits, d, r, dtype=torch.float32, device=a.device)
    args = (a, h, c, part, m, d, r, a.stride(0), rows)
    meta = dict(BLOCK_M=row.m, BLOCK_D=row.n, BLOCK_R=padded(r), DOT=operand(a.dtype))
    run(kernels_linear.outer, "adalora.outer", (triton.cdiv(d, row.n), splits), a, args, row, **meta)
    return part.sum(0)


class _Linear(torch.autograd.Function):
    """x [M, K], weight [N, K] and bias [N] frozen, left [N, R], values [R], right [R, K]."""

    @staticmethod
    def forward(ctx, x, weight, bias, left, values, right, scale):
        c = (scale * values).float()
        out, h = _matmul(x, weight.T, bias, right.T, c, left.T)
        ctx.save_for_backward(x, weight, left, right, c, h)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, left, right, c, h = ctx.saved_tensors
        grad = dense_rows(grad)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x, g = _matmul(grad, weight, None, left, c, right)
        else:
            g = _project(grad, left)  # G = dY P
        d_left = _outer(grad, h, c).to(left.dtype)
        d_right = _outer(x, g, c).T.to(right.dtype)
        d_values = ctx.scale * (g * h).sum(0)
        return d_x, None, None, d_left, d_values, d_right, None


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, values: Tensor, right: Tensor, scale: float
) -> Tensor:
    """x W^T + bias + scale ((x Q^T) * l) P^T in one launch, with the gradients of x, P, l and Q.

    Args: `x` [..., K] and frozen `weight` [N, K], `bias` [N] of one type, fp32, fp16 or bf16; `left` [N, R], `values`
    [R], `right` [R, K] fp32, R up to 128. Returns [..., N] in x's type. Raises ValueError for a larger R.
    """
    if not 0 < values.shape[0] <= MOST_RANK:
        raise ValueError(
            f"the adapter has rank {values.shape[0]}; the kernel takes 1 to {MOST_RANK}, use the torch path"
        )
    rows = dense_rows(x.reshape(-1, x.shape[-1]))
    if not rows.shape[0]:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    return _Linear.apply(rows, weight, bias, left, values, right, scale).view(*x.shape[:-1], weight.shape[0])


class ImportanceTable:
    """Where the importance kernel finds every tensor: built once for the adapters' places in the flat buffers."""

    def __init__(self, adapters: Sequence[Triplets], offsets: Sequence[int]) -> None:
        device = adapters[0].values.device
        work, first, lengths, self.rank = [], [0], [], adapters[0].rank
        self.tile = tile = _entries(self.rank)
        for k, adapter in enumerate(adapters):
            shapes = (
                (adapter.left.shape[0], self.rank, 1),  # entries of a vector, stride of entries, stride of triplets
                (1, 0, 1),
                (adapter.right.shape[1], 1, adapter.right.shape[1]),
            )
            for part, (entries, along, across) in enumerate(shapes):
                tensor = 3 * k + part
                work += [(tensor, offsets[tensor], at, entries, along, across) for at in range(0, entries, tile)]
                first.append(len(work))
                lengths.append(float(entries))
        self.work = torch.tensor(work, dtype=torch.int64, device=device)
        self.first = torch.tensor(first, dtype=torch.int64, device=device)
        self.lengths = torch.tensor(lengths, device=device)
        self.part = torch.empty(len(work), self.rank, device=device)
        self._grads: tuple[int, ...] = ()
        self._addresses = torch.empty(0, dtype=torch.int64, device=device)

    def update(
        self, weights: Tensor, grads: Sequence[Tensor | None], sensitivity: Tensor, uncertainty: Tensor,
        beta1: float, beta2: float, smooth_only: bool,
    ) -> None:  # fmt: skip
        """Update the statistics in place from the gradients, wherever these lie now."""
        held = [None if g is None else g.contiguous() for g in grads]  # alive until the launch
        found = tuple(0 if g is None else g.data_ptr() for g in held)
        if found != self._grads:
            self._grads = found
            self._addresses = torch.tensor(found, dtype=torch.int64).to(weights.device)
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, self.rank)
        args = (self.work, self._addresses, weights, sensitivity, uncertainty, self.part, *numbers)
        meta = dict(BLOCK=self.tile, BLOCK_R=triton.next_power_of_2(self.rank), SMOOTH_ONLY=smooth_only)
        run(kernels_importance.update_importance, "adalora.importance", len(self.work), weights, args, STREAM, **meta)

    def scores(self) -> Tensor:
        """S of all triplets at the latest update, [n, R]."""
        n = len(self.lengths) // 3
        out = torch.empty(n, self.rank, device=self.part.device)
        args = (self.part, self.first, self.lengths, out, self.rank)
        meta = dict(BLOCK_R=triton.next_power_of_2(self.rank))
        run(kernels_importance.add_scores, "adalora.scores", n, out, args, ONE_WARP, **meta)
        return out


def _entries(rank: int) -> int:
    """Entries of a vector per program: a tile of about 1024 numbers, eight per thread."""
    return 16 if INTERPRETED else max(16, 1024 // triton.next_power_of_2(rank))


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: the layer forward and backward, its two-launch form, both types; importance."""
    specs = []
    types = dict.fromkeys(("U", "V", "C", "H", "PART"), "*fp32:16") | dict.fromkeys(("M", "N", "K", "D"), "i32:16")
    ways = {
        "forward": dict(stride_bk=1, stride_uk=1, stride_vr=1),  # W^T, Q^T and P^T of contiguous tensors
        "backward": dict(stride_bn=1, stride_ur=1, stride_vn=1, BIAS=None),  # W, P and Q
    }
    for dtype, name, way, rank in (
        (torch.bfloat16, "bf16", "forward", 16),
        (torch.bfloat16, "bf16", "backward", 16),
        (torch.bfloat16, "bf16", "forward", 64),
        (torch.float32, "fp32", "forward", 16),
    ):
        row = LAUNCH["wide" if rank > WIDE_RANK else "matmul", name == "bf16"]
        constants = ways[way] | dict(
            BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, BLOCK_R=rank, GIVEN=rank > WIDE_RANK, DOT=DTYPES[dtype]
        )  # fmt: skip
        here = types | dict.fromkeys(("A", "B", "BIAS", "OUT"), f"*{name}:16") | {"stride_am": "i32:16"}
        specs.append(
            _spec("matmul", kernels_linear.low_rank_matmul, here, constants, row, f"{name} {rank} {way}")
        )  # fmt: skip
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        here = types | {"A": f"*{name}:16", "stride_am": "i32:16"}
        row = LAUNCH["project", name == "bf16"]
        constants = dict(BLOCK_M=row.m, BLOCK_K=row.k, BLOCK_R=64, DOT=DTYPES[dtype], stride_uk=1)
        specs.append(_spec("project", kernels_linear.project, here, constants, row, f"{name} 64"))
        row = LAUNCH["outer", name == "bf16"]
        constants = dict(BLOCK_M=row.m, BLOCK_D=row.n, BLOCK_R=16, DOT=DTYPES[dtype])
        specs.append(_spec("outer", kernels_linear.outer, here, constants, row, f"{name} 16"))
    types = dict.fromkeys(("WEIGHTS", "SENSITIVITY", "UNCERTAINTY", "PART", "LENGTH", "SCORES"), "*fp32:16")
    types |= dict.fromkeys(("WORK", "GRADS", "FIRST"), "*i64:16")
    types |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32")
    constants = dict(BLOCK=64, BLOCK_R=16, SMOOTH_ONLY=False)
    specs.append(_spec("importance", kernels_importance.update_importance, types, constants, STREAM, "fp32 12"))
    specs.append(_spec("scores", kernels_importance.add_scores, types, dict(BLOCK_R=16), ONE_WARP, "fp32 12"))
    return specs


def _spec(name: str, kernel: Any, types: dict, constants: dict, row: Settings, variant: str) -> KernelSpec:
    return KernelSpec(
        name, kernel,
        signature={a: types.get(a, "i32") for a in kernel.arg_names if a not in constants},  # the rest are strides
        constexprs=constants, num_warps=row.warps, num_stages=row.stages, variant=variant,
    )  # fmt: skip


SPECS = _specs()

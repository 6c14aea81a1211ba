"""Host wrappers of LoSparse's Triton kernels: the shrunk linear layer, and the mask step of all matrices in one launch.

Four layers: the kernels (`kernels_linear.py`, `kernels_importance.py`), then here their launches, the autograd function
and `fused_linear`. Its gradients are plain products, which the vendor's library does best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from zq_lib.core.kernels import HIP_STAGES, KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, NAMES, dense_rows, operand, padded, run
from zq_lib.losparse import kernels_importance, kernels_linear
from zq_lib.losparse.linear import state_of

FEW = 64  # tokens; up to here a tile of outputs is narrow, so that enough programs share the weights
MOST_RANK = 64  # of the single launch, which holds X V^T in registers
MOST_REPEATED = 2**16  # entries of V, which every program of the single launch reads (untimed: 128 KB of L2 traffic)


@dataclass(frozen=True)
class Settings:
    """One row of the launch table: tile of tokens x outputs, inner step, warps per program, stages of the pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# No row has been timed on a GPU. "stack" is 64 wide because few columns are left after shrinking: at 4096 tokens, 717
# columns make 384 tiles for an H100's 132 processors, tiles of 128 would make 192. fp32 in ieee precision has no tensor
# cores and unrolls into registers. Where m is 0 a tile holds all tokens.
LAUNCH = {
    ("stack", True): Settings(128, 64, 64, 4, 4),
    ("stack", False): Settings(32, 32, 32, 4, 2),
    ("stack few", True): Settings(0, 16, 128, 4, 4),
    ("stack few", False): Settings(0, 16, 64, 4, 2),
    ("spread", True): Settings(128, 64, 32, 8, 2),
    ("spread", False): Settings(32, 32, 32, 4, 2),
    ("spread few", True): Settings(0, 32, 32, 4, 2),
    ("spread few", False): Settings(0, 32, 32, 4, 2),
    ("decode", True): Settings(0, 16, 64, 4, 4),
    ("decode", False): Settings(0, 16, 32, 8, 2),  # four warps spill 112 bytes at 64 tokens and rank 64
}
STREAM = Settings(0, 8, 256, 4, 2)  # rows x columns of a tile of the mask step
TOY = Settings(16, 16, 16, 4, 1)  # in the interpreter a program costs milliseconds whatever its size


def settings(kernel: str, dtype: torch.dtype, tokens: int) -> Settings:
    """The launch settings of a kernel's name in LAUNCH for tensors of `dtype`."""
    row = LAUNCH[kernel, dtype != torch.float32]
    few = row.m == 0
    if INTERPRETED:
        row = TOY
    stages = min(row.stages, HIP_STAGES) if torch.version.hip else row.stages
    return Settings(padded(tokens) if few else row.m, row.n, row.k, row.warps, stages)


_maps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def maps(rows: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """What the kernels ask about `rows` [n]: `order` [N], all outputs with the kept ones first, and `place` [N], the
    position of an output in `rows` or -1; both int32, remembered until the content of `rows` changes."""
    state = state_of(rows, outputs)
    found = _maps.get(rows)
    if found is None or found[0] != state:
        place = torch.full((outputs,), -1, dtype=torch.int32, device=rows.device)
        place[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        order = torch.cat([rows, (place < 0).nonzero()[:, 0]]).to(torch.int32)
        found = _maps[rows] = (state, order, place)
    return found[1:]


def _in_one(m: int, right: Tensor) -> bool:
    """Whether one launch does it: for few tokens, when working X V^T out again costs less than a launch."""
    return m <= FEW and right.shape[0] <= MOST_RANK and right.numel() <= MOST_REPEATED


def _decode(x: Tensor, left: Tensor, right: Tensor, sparse: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), (n, r) = x.shape, left.shape
    row, out = settings("decode", x.dtype, m), torch.empty(m, n, dtype=x.dtype, device=x.device)
    sizes = (m, n, k, r, sparse.shape[0])
    args = (x, left, right, sparse, order, bias, out, *sizes, *(t.stride(0) for t in (x, left, right, sparse)))
    meta = dict(BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, BLOCK_R=padded(r), DOT=operand(x.dtype))
    run(kernels_linear.decode, "losparse.decode", triton.cdiv(n, row.n), x, args, row, **meta)
    return out


def _stack(x: Tensor, right: Tensor, sparse: Tensor) -> Tensor:
    """X [V; S]^T, [M, r + n] in x's type."""
    (m, k), r, kept = x.shape, right.shape[0], sparse.shape[0]
    row = settings("stack few" if m <= FEW else "stack", x.dtype, m)
    out = torch.empty(m, r + kept, dtype=x.dtype, device=x.device)
    args = (x, right, sparse, out, m, k, r, kept, *(t.stride(0) for t in (x, right, sparse)))
    meta = dict(BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_K=row.k, DOT=operand(x.dtype))
    if out.numel():
        tiles = triton.cdiv(r, row.n) + triton.cdiv(kept, row.n)
        run(kernels_linear.stack, "losparse.stack", triton.cdiv(m, row.m) * tiles, x, args, row, **meta)
    return out


def _spread(z: Tensor, left: Tensor, place: Tensor, bias: Tensor | None) -> Tensor:
    """Y [M, N] from Z [M, r + n]."""
    m, (n, r) = z.shape[0], left.shape
    row = settings("spread few" if m <= FEW else "spread", z.dtype, m)
    out = torch.empty(m, n, dtype=z.dtype, device=z.device)
    args = (z, left, place, bias, out, m, n, r, z.stride(0), left.stride(0))
    meta = dict(BLOCK_M=row.m, BLOCK_N=row.n, BLOCK_R=row.k, DOT=operand(z.dtype))
    grid = triton.cdiv(m, row.m) * triton.cdiv(n, row.n)
    run(kernels_linear.spread, "losparse.spread", grid, z, args, row, **meta)
    return out


class _Linear(torch.autograd.Function):
    """x [M, K], left [N, r], right [r, K], sparse [n, K], rows [n], bias [N] or None."""

    @staticmethod
    def forward(ctx, x, left, right, sparse, rows, bias):
        order, place = maps(rows, left.shape[0])
        h = None  # X V^T, which only the two-launch form leaves behind
        if _in_one(x.shape[0], right):
            out = _decode(x, left, right, sparse, order, bias)
        else:
            z = _stack(x, right, sparse)
            out, h = _spread(z, left, place, bias), z[:, : right.shape[0]]
        ctx.save_for_backward(x, left, right, sparse, rows, h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, left, right, sparse, rows, h = ctx.saved_tensors
        d_x, d_left, d_right, d_sparse, _, d_bias = (None,) * 6
        inner, kept = grad @ left, grad.index_select(1, rows)  # [M, r], [M, n]
        if ctx.needs_input_grad[0]:
            d_x = torch.addmm(inner @ right, kept, sparse)
        if ctx.needs_input_grad[1]:
            d_left = grad.T @ (x @ right.T if h is None else h)
        if ctx.needs_input_grad[2]:
            d_right = inner.T @ x
        if ctx.needs_input_grad[3]:
            d_sparse = kept.T @ x
        if ctx.needs_input_grad[5]:
            d_bias = grad.sum(0)
        return d_x, d_left, d_right, d_sparse, None, d_bias


def fused_linear(x: Tensor, left: Tensor, right: Tensor, sparse: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """What `linear.low_rank_sparse_linear` runs on a GPU, after it has checked its arguments.

    All but `rows` have one type, fp32, fp16 or bf16, on one device. Returns [..., N].
    """
    flat = dense_rows(x.reshape(-1, x.shape[-1]))
    shape = (*x.shape[:-1], left.shape[0])
    if not flat.shape[0]:
        return x.new_zeros(shape)
    return _Linear.apply(flat, *(dense_rows(t) for t in (left, right, sparse)), rows, bias).view(shape)


class RowImportanceTable:
    """Where the kernels of a mask step find the rows of every S: built once for `sparse`, contiguous [N, K] tensors of
    one type on one device, and valid as long as these keep their memory. Matrices follow each other in all buffers of
    one number per row."""

    def __init__(self, sparse: Sequence[Tensor]) -> None:
        first = sparse[0]
        if any(t.dtype != first.dtype or t.device != first.device or not t.is_contiguous() for t in sparse):
            raise ValueError("the matrices differ in type or device, or one is not contiguous; use the torch path")
        self.sparse = list(sparse)
        self.block, self.wide = (4, 16) if INTERPRETED else (STREAM.n, STREAM.k)
        work, matrices, self.rows = [], [], 0
        for i, t in enumerate(sparse):
            work += [(i, at) for at in range(0, t.shape[0], self.block)]
            matrices.append((*t.shape, self.rows))
            self.rows += t.shape[0]
        self.work, self.matrices = (torch.tensor(t, device=first.device) for t in (work, matrices))
        self._tables: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    def _addresses(self, name: str, tensors: Sequence[Tensor | None]) -> Tensor:
        """Where the tensors lie now, 0 for none; sent to the device only when that has changed."""
        found = tuple(0 if t is None else t.data_ptr() for t in tensors)
        if name not in self._tables or self._tables[name][0] != found:
            self._tables[name] = found, torch.tensor(found, dtype=torch.int64).to(self.work.device)
        return self._tables[name][1]

    def _meta(self) -> dict[str, Any]:
        return dict(BLOCK=self.block, BLOCK_K=self.wide, ELEMENT=DTYPES[self.sparse[0].dtype])

    @torch.no_grad()
    def update(
        self, grads: Sequence[Tensor | None], window: Tensor, average: Tensor, beta: float, position: int | None
    ) -> None:
        """Take in the gradients of all matrices, None counting as zero, and update the buffers [rows] fp32 in place.

        `position` is the step within the window (0 closes the last one), None for an average over every step.
        """
        held = [None if g is None else g.contiguous() for g in grads]  # alive until the launch
        if any(g is not None and g.dtype != self.sparse[0].dtype for g in held):
            raise ValueError(f"a gradient is not {self.sparse[0].dtype} like its matrix; use the torch path")
        tables = (self._addresses("sparse", self.sparse), self._addresses("grads", held))
        args = (self.work, self.matrices, *tables, window, average, beta, 1 - beta, float(position or 0))
        meta = dict(self._meta(), EVERY_STEP=position is None)
        name = "losparse.importance"
        run(kernels_importance.update_rows, name, len(self.work), average, args, STREAM, **meta)

    @torch.no_grad()
    def zero(self, keep: Tensor) -> None:
        """Zero the rows of all matrices where `keep` [rows] bool is False, in place."""
        args = (self.work, self.matrices, self._addresses("sparse", self.sparse), keep.view(torch.int8))
        run(kernels_importance.zero_rows, "losparse.zero", len(self.work), keep, args, STREAM, **self._meta())


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: the two-launch form for many tokens and few, the single launch, the mask step."""
    kernels = {"stack": kernels_linear.stack, "spread": kernels_linear.spread, "decode": kernels_linear.decode}
    specs = []
    for name, dtype in (
        ("stack", torch.bfloat16), ("stack", torch.float32), ("stack few", torch.float16), ("spread", torch.bfloat16),
        ("spread", torch.float32), ("decode", torch.bfloat16), ("decode", torch.float32),
    ):  # fmt: skip
        row, kernel = LAUNCH[name, dtype != torch.float32], kernels[name.split()[0]]
        tokens = FEW if name == "decode" else 16
        sizes = dict(BLOCK_M=row.m or tokens, BLOCK_N=row.n, BLOCK_K=row.k, DOT=DTYPES[dtype])
        sizes["BLOCK_R"] = 64 if name == "decode" else row.k
        types = dict.fromkeys(("X", "U", "V", "S", "Z", "BIAS", "Y"), f"*{NAMES[dtype]}:16")
        specs.append(_spec(name, kernel, types, sizes, row, NAMES[dtype]))
    for dtype in (torch.float32, torch.bfloat16):
        sizes = dict(BLOCK=STREAM.n, BLOCK_K=STREAM.k, ELEMENT=DTYPES[dtype], EVERY_STEP=False)
        specs.append(_spec("importance", kernels_importance.update_rows, {}, sizes, STREAM, NAMES[dtype]))
    specs.append(_spec("zero", kernels_importance.zero_rows, {}, sizes, STREAM, "bf16"))
    return specs


def _spec(name: str, kernel: Any, types: dict, constants: dict, row: Settings, variant: str) -> KernelSpec:
    types = types | dict.fromkeys(("WINDOW", "AVERAGE"), "*fp32:16") | dict.fromkeys(("ORDER", "PLACE"), "*i32:16")
    types |= dict.fromkeys(("WORK", "MATRICES", "SPARSE", "GRADS"), "*i64:16") | {"KEEP": "*i8:16"}
    types |= dict.fromkeys(("beta", "rest", "position"), "fp32")
    constants = {a: constants[a] for a in kernel.arg_names if a in constants}
    return KernelSpec(
        name, kernel,
        signature={a: types.get(a, "i32:16") for a in kernel.arg_names if a not in constants},  # sizes and strides
        constexprs=constants, num_warps=row.warps, num_stages=row.stages, variant=variant,
    )  # fmt: skip


SPECS = _specs()

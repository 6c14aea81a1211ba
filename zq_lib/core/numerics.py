"""How far apart two results are, and how far apart they may be."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Largest relative RMS error against an fp64 run of the reference."""

    output: float
    gradient: float


TOLERANCES: dict[str, Tolerance] = {
    "reference_fp32": Tolerance(1e-6, 1e-5),
    "interpreter_fp32": Tolerance(2e-6, 2e-5),
    "gpu_fp32_ieee": Tolerance(1e-5, 1e-4),
    "gpu_fp32_tf32": Tolerance(2e-3, 5e-3),
    "fp16": Tolerance(2e-3, 5e-3),
    "bf16": Tolerance(1.5e-2, 2e-2),
}
CODE_TIES = 1e-3  # integer codes must be equal, except this share of them, which may differ by one at a rounding tie


def tolerance(dtype: torch.dtype, path: str) -> Tolerance:
    """The row of TOLERANCES for a kernel run: `path` is "interpreter", "triton" (ieee dot products) or "torch"."""
    if dtype in (torch.float16, torch.bfloat16):
        return TOLERANCES["fp16" if dtype == torch.float16 else "bf16"]
    rows = {"interpreter": "interpreter_fp32", "triton": "gpu_fp32_ieee", "torch": "reference_fp32"}
    if dtype != torch.float32 or path not in rows:
        raise ValueError(
            f"no tolerance for dtype {dtype} on path {path!r}; use float32, float16 or bfloat16 on one of "
            f"{', '.join(map(repr, rows))}."
        )
    return TOLERANCES[rows[path]]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of `actual - expected` over RMS of `expected`, in fp64.

    NaN in `actual` gives NaN, which no `<=` accepts. An all-zero `expected` gives 0 when equal and infinity otherwise.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual has shape {tuple(actual.shape)} but expected has {tuple(expected.shape)}; align them first."
        )
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, size = (actual - expected).norm().item(), expected.norm().item()
    if error == 0:
        return 0.0
    return error / size if size != 0 else error if error != error else float("inf")


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two tensors of the same shape, assuming no ties."""
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])

"""Distance of filtered states, without ever storing one (sections 1.3 and 5.1).

The torch path takes some rows at a time and forms the gradient in the forward pass, so that filtered states live only
for a chunk of rows, and padded rows are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.backend import Launch, choose, record

ROWS = 2048  # worked on at a time


class Filtered(NamedTuple):
    """Z = H W^T + b, not yet computed: `hidden` [..., d], `weight` [d_f, d] or None for the identity, `bias` [d_f]."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def dim(self) -> int:
        """d_f."""
        return (self.hidden if self.weight is None else self.weight.T).shape[-1]


def filtered_error(
    student: Sequence[Filtered], teacher: Sequence[Filtered], keep: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Mean over the kept rows and over d_f of (Z_s - Z_t)^2 for each of K pairs, [K] in fp32 (fp64 stays).

    Args: K filtered states of each model, all `hidden` of the same leading shape; `keep` of that shape, bool, marks the
    rows that count, and none is an error of 0. `backend` "auto", "torch" or "triton". Differentiable in the student's
    states, weights and biases; the teacher gets no gradient.

    Raises ValueError for different numbers of layers, and for pairs whose widths or rows differ.

    >>> h = torch.ones(2, 3)
    >>> filtered_error([Filtered(h)], [Filtered(2 * h)]).tolist()
    [1.0]
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{len(student)} student layers cannot be matched with {len(teacher)} of the teacher; give as many of both"
        )
    for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.dim != t.dim:
            raise ValueError(
                f"pair {k}: the student's filter has width {s.dim} and the teacher's {t.dim}; train both with the same "
                "filter_dim"
            )
        if s.hidden.shape[:-1] != t.hidden.shape[:-1]:
            raise ValueError(
                f"pair {k}: the student's states have shape {tuple(s.hidden.shape)} and the teacher's "
                f"{tuple(t.hidden.shape)}; give both the same batch"
            )
    if keep is not None and keep.shape != student[0].hidden.shape[:-1]:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)} and the states {tuple(student[0].hidden.shape)}; give one mark per row"
        )
    rows = None if keep is None else keep.reshape(-1).nonzero()[:, 0]
    student, teacher = ([s._replace(hidden=s.hidden.flatten(0, -2)) for s in side] for side in (student, teacher))
    teacher = [_detached(t) for t in teacher]
    if not torch.is_grad_enabled():
        student = [_detached(s) for s in student]  # an autograd function would form the gradient all the same
    able, why = _fusable(student, teacher)
    if choose(backend, student[0].hidden.device, able, why) == "triton":
        from zq_lib.ted.kernels import fused_filtered_error

        return fused_filtered_error(student, teacher, rows)
    record(Launch("ted.filtered_error", "torch", (len(student),)))
    return torch.stack([_PairError.apply(*s, t, rows) for s, t in zip(student, teacher, strict=True)])


def _detached(side: Filtered) -> Filtered:
    return Filtered(*(None if x is None else x.detach() for x in side))


def _fusable(student: Sequence[Filtered], teacher: Sequence[Filtered]) -> tuple[bool, str]:
    tensors = [x for side in (*student, *teacher) for x in side if x is not None]
    types = {x.dtype for x in tensors}
    if len(types) > 1 or tensors[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        return False, f"the tensors are {names}, not all float32, float16 or bfloat16"
    if any(side.weight is None or side.bias is None for side in (*student, *teacher)):
        return False, "a layer has no filter, or one without a bias"
    if any(len({(s.hidden.shape[1], s.dim) for s in sides}) > 1 for sides in (student, teacher)):
        return False, "the pairs have different widths"
    if torch.is_autocast_enabled(tensors[0].device.type):
        return False, "autocast is on"
    return True, ""


class _PairError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, teacher: Filtered, rows: Tensor | None
    ) -> Tensor:
        count = hidden.shape[0] if rows is None else len(rows)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        made = torch.zeros_like if rows is not None else torch.empty_like
        d_hidden = made(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if of_bias else None
        own, other = (_cast(side, dtype) for side in (Filtered(hidden, weight, bias), teacher))
        dim = own.dim
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for start in range(0, count, ROWS):
            stop = min(start + ROWS, count)
            chunk = slice(start, stop) if rows is None else rows[start:stop]
            h = hidden[chunk].to(dtype)
            gap = _apply(h, own) - _apply(teacher.hidden[chunk].to(dtype), other)  # D [rows, d_f]
            gap = gap.to(dtype)  # autocast computes products in half precision; sums do not fit there
            total += gap.square().sum()
            gap *= 2 / (count * dim)
            if of_hidden:
                d_hidden[chunk] = (gap if weight is None else gap @ own.weight).to(hidden.dtype)
            if of_weight:
                d_weight += gap.T @ h
            if of_bias:
                d_bias += gap.sum(0)
        ctx.grads = tuple(
            None if g is None else g.to(x.dtype)
            for g, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        )  # fmt: skip
        return total / max(count * dim, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * outer.to(g.dtype) for g in ctx.grads), None, None


def _cast(side: Filtered, dtype: torch.dtype) -> Filtered:
    """The filter in the type that is summed in; states are converted by the chunk."""
    return Filtered(side.hidden, *(None if x is None else x.to(dtype) for x in side[1:]))


def _apply(hidden: Tensor, side: Filtered) -> Tensor:
    return hidden if side.weight is None else F.linear(hidden, side.weight, side.bias)

"""The forward pass of a shrunk layer, y = x (U V + S)^T + b with S held as its kept rows (sections 1.1 and 1.6).

`left` is U [N, r], `right` V [r, K], `sparse` the kept rows of S [n, K], and `rows` [n] their outputs.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.backend import Launch, choose, record, requested

FEW = 32  # tokens; from here on weights x tokens is up to 20 % faster on a CPU, with one token x weights by 40 %

# Rows that passed, by id, so that only a layer's first call waits for them; torch's own dictionary takes 4 us a look.
_seen: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}


def state_of(rows: Tensor, outputs: int) -> tuple[int, int]:
    """Changes when something derived from the content of `rows` has to be derived again."""
    return outputs, 0 if rows.is_inference() else rows._version


def check_rows(rows: Tensor, count: int, outputs: int) -> None:
    """Raise ValueError unless `rows` [count] int64 ascends strictly within [0, outputs).

    The answer is remembered for a tensor until its content changes. Under torch.compile nothing is read.
    """
    if rows.dtype != torch.int64 or rows.shape != (count,):
        raise ValueError(
            f"rows is {rows.dtype} of shape {tuple(rows.shape)}, but sparse has {count} rows; give one int64 output "
            "number per row of sparse"
        )
    if torch.compiler.is_compiling():
        return
    state, key = state_of(rows, outputs), id(rows)
    found = _seen.get(key)
    if found is not None and found[1] == state and found[0]() is rows:
        return
    if count and not (0 <= int(rows[0]) and int(rows[-1]) < outputs and bool((rows[1:] > rows[:-1]).all())):
        raise ValueError(
            f"rows runs from {int(rows.min())} to {int(rows.max())} for {outputs} outputs; they must ascend without "
            f"repetition within 0 to {outputs - 1}, so sort rows and the rows of sparse together"
        )
    _seen[key] = weakref.ref(rows, lambda gone: _seen.pop(key, None)), state


def low_rank_sparse_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    sparse: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x (U V + S)^T + b for `x` [..., K], in r K + n K + N r multiply-adds a token instead of N K.

    Args: `left` [N, r], `right` [r, K], `sparse` [n, K] of x's type, r and n may be 0; `rows` [n] int64, ascending;
    `bias` [N]; `backend` "auto", "torch" or "triton". Returns [..., N]; differentiable in all but `rows`.

    Raises ValueError for shapes that do not fit, or rows that are unsorted, repeated or out of range.

    >>> x, left, right, sparse = torch.ones(2, 3), torch.zeros(4, 1), torch.zeros(1, 3), torch.ones(1, 3)
    >>> low_rank_sparse_linear(x, left, right, sparse, torch.tensor([2])).tolist()
    [[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 3.0, 0.0]]
    """
    (outputs, rank), inputs = left.shape, x.shape[-1]
    if right.shape != (rank, inputs) or sparse.shape[1:] != (inputs,):
        raise ValueError(
            f"left {tuple(left.shape)}, right {tuple(right.shape)} and sparse {tuple(sparse.shape)} do not fit an "
            f"input of width {inputs}; they must be [N, r], [r, {inputs}] and [n, {inputs}]"
        )
    check_rows(rows, sparse.shape[0], outputs)
    if x.is_cuda or requested(backend) == "triton":
        able, why = _fusable(x, left, right, sparse, bias)
        if choose(backend, x.device, able, why) == "triton":
            from zq_lib.losparse.kernels import fused_linear

            return fused_linear(x, left, right, sparse, rows, bias)
    record(Launch("losparse.linear", "torch"))
    flat = x if x.dim() == 2 else x.reshape(-1, inputs)
    if flat.shape[0] < FEW:
        inner, kept = F.linear(flat, right), F.linear(flat, sparse)  # [M, r], [M, n]
    else:
        inner, kept = F.linear(right, flat).T, F.linear(sparse, flat).T
    out = F.linear(inner, left, bias).index_add_(1, rows, kept)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], outputs)


def _fusable(x: Tensor, *others: Tensor | None) -> tuple[bool, str]:
    types = {t.dtype for t in (x, *others) if t is not None}
    if len(types) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        return False, f"the tensors are {names}, not all float32, float16 or bfloat16"
    if torch.is_autocast_enabled(x.device.type):
        return False, "autocast is on"
    return True, ""

"""Distance of two outputs over a vocabulary, without ever storing a probability (sections 1.3 and 5.2).

The torch path takes a few rows at a time, small enough for a processor's cache, and forms the gradient in the forward
pass: the logits come from memory once instead of a dozen times.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.backend import Launch, choose, record

CHUNK = 2**18  # logits that are worked on at a time: 1 MB in fp32 for each of four buffers


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "kl",
    temperature: float = 2.0,
    squared: bool = True,
    beta: float = 0.5,
    keep: Tensor | None = None,
    overwrite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """T^2 mean over rows of KL(softmax(l_t / T) || softmax(l_s / T)), or another `kind`; a scalar.

    Args: `student` and `teacher` [..., V] logits of any float type, summed up in fp32 (fp64 stays); the teacher gets no
    gradient. `kind` "kl", "reverse_kl", "jsd" (with `beta`) or "mse", which has no temperature. `squared` is the factor
    T^2. `keep` [...] bool marks the rows that count, and none is a loss of 0. `overwrite` puts the gradient into the
    student's logits, which are then used up, and saves their size in memory; autograd raises if another operation needs
    them. `backend` "auto", "torch" or "triton".

    -inf in both rules a class out. -inf of the student alone, where the teacher is finite, is an infinite "kl".

    Raises ValueError for logits of different shapes, and for one class, whose divergence is always 0.

    >>> divergence(torch.zeros(2, 5), torch.zeros(2, 5)).item()
    0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; give "
            "both the same batch, and models of the same classes or vocabulary"
        )
    if keep is not None and keep.shape != student.shape[:-1]:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)} and the logits {tuple(student.shape)}; give one mark for each row"
        )
    classes = student.shape[-1]
    if classes == 1 and kind != "mse":
        raise ValueError(f"kind={kind!r} of one output is always 0, whatever it says; use kind='mse'")
    if not torch.is_grad_enabled():
        student = student.detach()  # an autograd function would form the gradient all the same
    s, t = student.reshape(-1, classes), teacher.detach().reshape(-1, classes)
    rows = None if keep is None else keep.reshape(-1).nonzero()[:, 0]
    if kind == "mse":
        if rows is not None:
            s, t = s[rows], t[rows]
        return (s - t).square().sum() / max(s.numel(), 1)
    able, why = _fusable(kind, s, t)
    if choose(backend, s.device, able, why) == "triton":
        from zq_lib.ted.kernels import fused_divergence

        return fused_divergence(s, t, rows, temperature, squared, overwrite)
    record(Launch("ted.divergence", "torch"))
    return _Divergence.apply(s, t, rows, kind, temperature, squared, beta, overwrite)


def _fusable(kind: str, student: Tensor, teacher: Tensor) -> tuple[bool, str]:
    if kind != "kl":
        return False, f'kind is {kind!r}, and the kernel computes "kl"'
    for name, t in (("student", student), ("teacher", teacher)):
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False, f"the {name}'s logits are {t.dtype}, not float32, float16 or bfloat16"
    return True, ""


def _kl(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL = A / S_t - log S_t + log S_s with S = sum e^x and A = sum e^t (t - s): two exponentials and no logarithm for
    each class. Without the maximum, which goes first, e^x overflows."""
    s, t = (x.sub_(x.amax(-1, keepdim=True)) for x in (s, t))
    gap, q, p = t - s, s.exp_(), t.exp_()
    sum_q, sum_p = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    a = torch.linalg.vecdot(p, gap)
    if not bool(a.isfinite().all()):  # 0 times infinity, where the teacher rules a class out
        a = torch.linalg.vecdot(p, gap.masked_fill_(p == 0, 0))
    loss = a / sum_p[:, 0] - sum_p[:, 0].log() + sum_q[:, 0].log()
    return loss, q.div_(sum_q).sub_(p.div_(sum_p))


def _reverse(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    s, t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    q = s.exp()
    gap = s.sub_(t).masked_fill_(q == 0, 0)
    loss = torch.linalg.vecdot(q, gap)
    return loss, gap.sub_(loss[:, None]).mul_(q)


def _jsd(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    s, t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    p, q = t.exp(), s.exp()
    mixture = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    of_teacher = torch.linalg.vecdot(p, t.sub_(mixture).masked_fill_(p == 0, 0))
    gap = s.sub_(mixture).masked_fill_(q == 0, 0)
    of_student = torch.linalg.vecdot(q, gap)
    return beta * of_teacher + (1 - beta) * of_student, gap.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)


# Logits / T [r, V] of student and teacher, which are used up -> loss [r], its gradient by the student's logits / T
KINDS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "reverse_kl": _reverse,
    "jsd": _jsd,
}


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor | None,
        kind: str,
        temperature: float,
        squared: bool,
        beta: float,
        overwrite: bool,
    ) -> Tensor:
        count, step = student.shape[0] if rows is None else len(rows), max(1, CHUNK // student.shape[1])
        dtype = torch.promote_types(student.dtype, torch.float32)
        factor = temperature**2 if squared else 1.0
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = None
        if ctx.needs_input_grad[0]:
            grad = student if overwrite else torch.empty_like(student)  # in place, so autograd notices a second user
            if not overwrite and rows is not None:
                grad.zero_()
        for start in range(0, count, step):
            stop = min(start + step, count)
            chunk = slice(start, stop) if rows is None else rows[start:stop]
            s, t = (logits[chunk].to(dtype) / temperature for logits in (student, teacher))
            loss, gap = KINDS[kind](s, t, beta)
            total += loss.sum()
            if grad is not None:
                grad[chunk] = gap.mul_(factor / temperature / count).to(grad.dtype)
        if grad is not None and overwrite and rows is not None:
            dropped = torch.ones(len(student), dtype=torch.bool, device=student.device)
            dropped[rows] = False
            grad[dropped] = 0
        ctx.grad = grad
        return (total * (factor / max(count, 1))).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("the divergence's gradient was used already; call backward once for each forward")
        return grad.mul_(outer.to(grad.dtype)), *(None for _ in range(7))

"""Log-probabilities of completions from hidden states, without [S, T, V] of anything.

The torch path works on as many rows at a time as fit `CHUNK` logits; rows of the prompt and of padding are left out. By
the hidden states the gradient is formed in the forward pass, by the head in the backward pass from logits made anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.backend import Launch, choose, record, requested

CHUNK = (
    2**24
)  # logits worked on at a time, 64 MB in fp32: 341 rows of 49,152 words; a quarter of it costs a tenth more time
IGNORED = -100


class Head(NamedTuple):
    """What turns a hidden state into logits: weight [V, C], bias [V], and Gemma's cap s, logits = s tanh(z / s)."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def sequence_logps(
    hidden: Tensor, head: Head, labels: Tensor, *, average: bool = False, backend: str = "auto"
) -> Tensor:
    """Sum over t of log softmax(head(hidden[s, t]))[labels[s, t]] for each sequence; [S], fp32 (fp64 stays).

    Args: `hidden` [S, T, C] and the head's tensors of any one float type; `labels` [S, T] int64, the word that each
    position has to predict, -100 where none counts. `average` divides by the number of words that count. `backend`
    "auto", "torch" or "triton". Differentiable by `hidden` and by the head, as far as they need it.

    Raises ValueError for shapes that do not fit, labels beyond the vocabulary and sequences without a label.
    """
    counts = check_labels(hidden, head, labels)
    if path(hidden, head, backend) == "triton":
        from zq_lib.r3m.kernels import fused_head_logps

        total = fused_head_logps(hidden, head.weight, labels, head.bias, head.softcap)
    else:
        record(Launch("r3m.head_logps", "torch"))
        if not torch.is_grad_enabled():
            hidden, head = hidden.detach(), Head(*(_detached(x) for x in head[:2]), head.softcap)
        total = _HeadLogps.apply(hidden, head.weight, head.bias, labels, head.softcap)
    return total / counts if average else total


def logits_logps(
    logits: Tensor, labels: Tensor, *, average: bool = False, overwrite: bool = False, backend: str = "auto"
) -> Tensor:
    """The same for logits [S, T, V] that exist already, as those of an unmodified model.

    `overwrite` puts the gradient into their memory, and autograd raises if another operation needs them.
    """
    counts = check_labels(logits, None, labels)
    if path(logits, None, backend) == "triton":
        from zq_lib.r3m.kernels import fused_row_logps

        total = fused_row_logps(logits, labels, overwrite)
    else:
        record(Launch("r3m.row_logps", "torch"))
        total = _RowLogps.apply(logits, labels, overwrite)
    return total / counts if average else total


def check_labels(states: Tensor, head: Head | None, labels: Tensor) -> Tensor:
    """Words that count in each sequence, [S]. Raises ValueError as `sequence_logps` says."""
    if states.dim() != 3 or labels.shape != states.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and the states {tuple(states.shape)}; give [S, T] and [S, T, C]"
        )
    words = states.shape[2]
    if head is not None:
        words = head.weight.shape[0]
        if head.weight.shape[1] != states.shape[2]:
            raise ValueError(
                f"the head's weight has shape {tuple(head.weight.shape)} and the states width {states.shape[2]}; give "
                "the states that the head reads, after the final norm"
            )
    counts = (labels != IGNORED).sum(1)
    facts = torch.stack([counts.min(), labels.max(), labels.masked_fill(labels == IGNORED, 0).min()]).tolist()
    if not facts[0]:
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(
            f"sequence {empty} has no completion tokens: all its labels are {IGNORED}; drop the pair, or cut the "
            "prompt rather than the completion"
        )
    if facts[1] >= words or facts[2] < 0:
        raise ValueError(f"labels reach from {facts[2]} to {facts[1]} but there are {words} words; shift them first")
    return counts


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def path(states: Tensor, head: Head | None, backend: str) -> str:
    """ "torch" or "triton" for hidden states with a head, or for logits without one."""
    why = ""
    if states.is_cuda or requested(backend) == "triton":
        from zq_lib.r3m.kernels import unsupported

        why = unsupported(states, *(head or (None, None, None)))
    return choose(backend, states.device, not why, why)


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [n, V] of rows [n, C], in fp32 at least."""
    z = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def log_and_errors(z: Tensor, words: Tensor, softcap: float | None, errors: bool) -> tuple[Tensor, Tensor | None]:
    """log p of `words` [n] in rows z [n, V], and onehot - p by the logits before the cap, [n, V]; z is used up.

    log p comes from the largest probability, which cannot underflow, and that of the word, which can, is not needed.
    """
    wanted = z.gather(1, words[:, None])[:, 0]
    if not errors:
        return wanted - z.logsumexp(-1), None
    top, place = z.max(-1)
    p = z.softmax(-1)
    logp = wanted - top + p.gather(1, place[:, None])[:, 0].log_()
    gap = p.neg_()
    gap[torch.arange(len(z), device=z.device), words] += 1
    if softcap is not None:
        gap.mul_(1 - z.div_(softcap).square_())
    return logp, gap


def chunks(count: int, words: int) -> Iterator[slice]:
    """Slices of `count` rows, each with at most CHUNK logits of `words` words."""
    step = max(1, CHUNK // words)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, softcap):
        rows = (labels.reshape(-1) != IGNORED).nonzero()[:, 0]
        flat, words = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)[rows]
        sequence = rows // labels.shape[1]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(rows), dtype=dtype, device=hidden.device)
        by_hidden = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        for part in chunks(len(rows), len(weight)):
            z = scores(flat[rows[part]], weight, bias, softcap)
            logps[part], gap = log_and_errors(z, words[part], softcap, by_hidden is not None)
            if by_hidden is not None:
                by_hidden[rows[part]] = gap.to(weight.dtype) @ weight
            del z, gap  # or they would stay until the next ones are made
        head_needs = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(*((hidden, weight, bias) if head_needs else (None, None, None)), rows, words, sequence)
        ctx.by_hidden, ctx.softcap, ctx.shape = by_hidden, softcap, hidden.shape
        return torch.zeros(len(labels), dtype=dtype, device=hidden.device).index_add_(0, sequence, logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        hidden, weight, bias, rows, words, sequence = ctx.saved_tensors
        by_hidden, by_weight, by_bias = ctx.by_hidden, None, None
        if by_hidden is not None:  # not in place: a second backward pass may follow
            by_hidden = (by_hidden.view(ctx.shape) * outer[:, None, None]).to(by_hidden.dtype)
        if weight is not None:
            by_weight, by_bias = gradients_of_head(weight, bias)
            flat, pull = hidden.reshape(-1, hidden.shape[-1]), outer[sequence]
            for part in chunks(len(rows), len(weight)):
                h = flat[rows[part]]
                _, gap = log_and_errors(scores(h, weight, bias, ctx.softcap), words[part], ctx.softcap, True)
                add_to_head(by_weight, by_bias, gap, h, pull[part])
                del gap
            by_weight, by_bias = by_weight.to(weight.dtype), None if bias is None else by_bias.to(bias.dtype)
        return by_hidden, by_weight, by_bias, None, None


def gradients_of_head(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Zeros to sum up the head's gradients in, fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight, dtype=dtype), None if bias is None else torch.zeros_like(bias, dtype=dtype)


def add_to_head(by_weight: Tensor, by_bias: Tensor | None, gap: Tensor, hidden: Tensor, pull: Tensor) -> None:
    """Add sum_n pull_n gap_n hidden_n^T and sum_n pull_n gap_n, for gap [n, V], hidden [n, C] and pull [n]."""
    by_weight.addmm_(gap.T, hidden.to(gap.dtype) * pull[:, None])
    if by_bias is not None:
        by_bias.add_(pull @ gap)


class _RowLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, overwrite):
        flat = logits.reshape(-1, logits.shape[-1])
        rows = (labels.reshape(-1) != IGNORED).nonzero()[:, 0]
        words, sequence = labels.reshape(-1)[rows], rows // labels.shape[1]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logps = torch.empty(len(rows), dtype=dtype, device=logits.device)
        for part in chunks(len(rows), flat.shape[1]):
            logps[part], _ = log_and_errors(flat[rows[part]].to(dtype), words[part], None, False)
        ctx.save_for_backward(logits, rows, words, sequence)
        ctx.overwrite = overwrite
        return torch.zeros(len(labels), dtype=dtype, device=logits.device).index_add_(0, sequence, logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        logits, rows, words, sequence = ctx.saved_tensors
        flat = logits.detach().reshape(-1, logits.shape[-1])
        grad = flat if ctx.overwrite else torch.zeros_like(flat)
        if ctx.overwrite:
            dropped = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
            dropped[rows] = False
            grad[dropped] = 0
        for part in chunks(len(rows), flat.shape[1]):
            _, gap = log_and_errors(flat[rows[part]].to(outer.dtype), words[part], None, True)
            grad[rows[part]] = gap.mul_(outer[sequence[part], None]).to(grad.dtype)
        return grad.view(logits.shape), None, None

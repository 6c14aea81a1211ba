"""From hidden states to the preference loss in one pass over the logits (section 4.2, R3M-DPO).

The gradient of a pair is known as soon as both its completions are read, because it depends on the pair's margin alone.
Pairs are therefore read whole, as many at a time as fit, and leave their gradients behind: no logit is made twice.
A pair that does not fit is read in parts; its own gradient of the head is kept aside until its margin is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zq_lib.core.backend import Launch, record
from zq_lib.r3m import logps
from zq_lib.r3m.logps import IGNORED, Head, add_to_head, check_labels, gradients_of_head, log_and_errors, scores
from zq_lib.r3m.losses import Rule, value_and_slope


class Terms(NamedTuple):
    """`loss`, the mean over pairs, which alone has a gradient; margins m [B]; log-probabilities [2B]."""

    loss: Tensor
    margin: Tensor
    logps: Tensor


def preference_from_hidden(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    reference: Tensor,
    rule: Rule,
    *,
    average: bool = False,
    backend: str = "auto",
) -> Terms:
    """The mean preference loss of implicit rewards, by hidden states [2B, T, C], the chosen first.

    Args: `labels` [2B, T] as in `sequence_logps`; `reference` [2B], the reference's log-probabilities, averaged alike
    with `average`; `rule` with its beta. Gradients go to `hidden` and to the head, in their types, and are formed here:
    memory beyond them is a chunk of logits, whatever B, T and V.

    Raises ValueError as `sequence_logps` does, and for an odd number of sequences.
    """
    counts = check_labels(hidden, head, labels)
    if len(labels) % 2 or reference.shape != labels.shape[:1]:
        raise ValueError(
            f"there are {len(labels)} sequences and a reference of shape {tuple(reference.shape)}; give [2B] of both, "
            "the chosen first"
        )
    if logps.path(hidden, head, backend) == "triton":
        from zq_lib.r3m.kernels import fused_preference

        args = (hidden, head.weight, labels, reference, head.bias, head.softcap, rule, rule.beta, average, "pairs")
        return Terms(*fused_preference(*args))
    record(Launch("r3m.preference", "torch"))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = counts.to(dtype).reciprocal() if average else torch.ones_like(counts, dtype=dtype)
    needs = torch.is_grad_enabled()
    tensors = tuple(x if needs or x is None else x.detach() for x in (hidden, head.weight, head.bias))
    return Terms(*_Preference.apply(*tensors, labels, reference, weights, head.softcap, rule))


class _Group(NamedTuple):
    """Pairs [first, last) and their rows, a slice of all rows in the order of pairs."""

    first: int
    last: int
    rows: slice


def _groups(sizes: list[int], limit: int) -> Iterator[_Group]:
    """Runs of whole pairs of at most `limit` rows together; one that has more stands alone."""
    first = start = stop = 0
    for pair, size in enumerate(sizes):
        if pair > first and stop + size - start > limit:
            yield _Group(first, pair, slice(start, stop))
            first, start = pair, stop
        stop += size
    yield _Group(first, len(sizes), slice(start, stop))


class _Rows:
    """The rows that count, pair by pair: their place in [2B T], word, pair, sequence, and its sign times its weight."""

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        pairs, length = len(labels) // 2, labels.shape[1]
        order = torch.arange(2 * pairs, device=labels.device).view(2, pairs).T.reshape(-1)  # 0, B, 1, B + 1, ...
        place, t = (labels[order] != IGNORED).nonzero(as_tuple=True)
        sequence = order[place]
        self.row, self.pair, self.sequence = sequence * length + t, place // 2, sequence
        self.word = labels[sequence, t]
        self.pull = weights[sequence] * (1 - 2 * (place % 2))  # of the pair's slope on this row
        self.sizes = torch.bincount(self.pair, minlength=pairs).tolist()


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, reference, weights, softcap, rule):
        rows, pairs, dtype = _Rows(labels, weights), len(labels) // 2, weights.dtype
        flat = hidden.reshape(-1, hidden.shape[-1])
        by_hidden = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        by_head = gradients_of_head(weight, bias) if any(ctx.needs_input_grad[1:3]) else None
        wanted = by_hidden is not None or by_head is not None
        found = torch.zeros(2 * pairs, dtype=dtype, device=hidden.device)
        margin, value = torch.empty(2, pairs, dtype=dtype, device=hidden.device)

        def slopes(first: int, last: int) -> Tensor:
            """Finish the pairs [first, last): their margins and losses; the slope of the mean by h_w - h_l."""
            h = (found - reference.to(dtype)).view(2, pairs)[:, first:last]
            margin[first:last] = rule.beta * (h[0] - h[1])
            value[first:last], slope = value_and_slope(margin[first:last], rule)
            return slope * (rule.beta / pairs)

        for group in _groups(rows.sizes, max(1, logps.CHUNK // len(weight))):
            count = group.rows.stop - group.rows.start
            parts = [
                slice(group.rows.start + p.start, group.rows.start + p.stop) for p in logps.chunks(count, len(weight))
            ]
            whole = len(parts) == 1
            aside = gradients_of_head(weight, bias) if by_head is not None and not whole else by_head
            for part in parts:
                h = flat[rows.row[part]]
                logp, gap = log_and_errors(scores(h, weight, bias, softcap), rows.word[part], softcap, wanted)
                found.index_add_(0, rows.sequence[part], logp * weights[rows.sequence[part]])
                pull = rows.pull[part]
                if whole:
                    pull = pull * slopes(group.first, group.last)[rows.pair[part] - group.first]
                if by_hidden is not None:
                    by_hidden[rows.row[part]] = ((gap.to(weight.dtype) @ weight) * pull[:, None]).to(by_hidden.dtype)
                if aside is not None:
                    add_to_head(*aside, gap, h, pull)
                del gap  # or it would stay until the next one is made
            if not whole:
                slope = slopes(group.first, group.last)
                if by_hidden is not None:
                    by_hidden[rows.row[group.rows]] *= slope.to(by_hidden.dtype)
                if by_head is not None:
                    for total, own in zip(by_head, aside, strict=True):
                        if total is not None:
                            total.add_(own, alpha=float(slope))
        ctx.grads = (by_hidden, *(by_head or (None, None)))
        ctx.like = [None if x is None else (x.dtype, x.shape) for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(margin, found)
        return value.mean(), margin, found

    @staticmethod
    @once_differentiable
    def backward(ctx, outer, *_):
        if ctx.grads is None:
            raise RuntimeError("the loss's gradient was used already; call backward once for each forward")
        grads, ctx.grads = ctx.grads, None
        done = [
            None if g is None else g.mul_(outer.to(g.dtype)).to(x[0]).view(x[1])
            for g, x in zip(grads, ctx.like, strict=True)
        ]
        return *done, *(None for _ in range(5))

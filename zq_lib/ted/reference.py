"""TED in plain torch, in the paper's order: the only ground truth, and the text to read first.

Liang et al., "Less is More: Task-aware Layer-wise Distillation for Language Model Compression" (ICML 2023, arXiv
2210.01351). Everything here runs in any float dtype (use float64 to check others against it) and is differentiable
where that has a meaning.

| paper   | here       | shape         | meaning                                                              |
| ------- | ---------- | ------------- | -------------------------------------------------------------------- |
| H^k     | `hidden`   | [B, S, d]     | output of a model's layer k                                          |
| M(k)    | `uniform`  | K pairs       | which student layer learns from which teacher layer                  |
| F^k     | `weight`, `bias` | [d_f, d], [d_f] | filter behind a matched layer                                |
| Z = F(H)| `filtered` | [B, S, d_f]   | filtered states: what the task needs of H                            |
| –       | `mask`     | [B, S]        | 1 for tokens, 0 for padding                                          |
| l       | `logits`   | [..., V]      | the model's output                                                   |
| T       | `temperature` | scalar     | of both softmaxes                                                    |
| alpha_1 | `kd_weight`   | scalar     | weight of the output's distillation                                  |
| alpha_2 | `layer_weight` | scalar    | weight of the filtered states' distance                              |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pairs = list[tuple[int, int]]


def uniform(student: int, teacher: int, pairs: int) -> Pairs:
    """M(k) for any depths: layers round(k L_s / K) and round(k L_t / K), counted from 1, halves up."""
    return [tuple((2 * k * depth + pairs) // (2 * pairs) for depth in (student, teacher)) for k in range(1, pairs + 1)]


def interval(student: int, teacher: int, pairs: int) -> Pairs:
    """Section 4.1: the last layer of each of K groups of L_s / K and L_t / K layers, counted from 1."""
    return [(k * student // pairs, k * teacher // pairs) for k in range(1, pairs + 1)]


def filter_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Z = H W^T + b.  [..., d] -> [..., d_f]"""
    return hidden @ weight.T + bias


def filter_mlp(
    hidden: Tensor, inner: Tensor, inner_bias: Tensor, weight: Tensor, bias: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Z = act(H W1^T + b1) W2^T + b2 with W1 square.  [..., d] -> [..., d_f]"""
    return filter_linear(act(hidden @ inner.T + inner_bias), weight, bias)


def pool(filtered: Tensor, mask: Tensor, how: str) -> Tensor:
    """The first, the last or the mean of a row's real tokens, wherever its padding is.  [B, S, d_f] -> [B, d_f]"""
    tokens = [z[m.bool()] for z, m in zip(filtered, mask, strict=True)]  # [n_b, d_f] each
    return torch.stack([{"first": z[0], "last": z[-1], "mean": z.mean(0)}[how] for z in tokens])


def stage_one(losses: Sequence[Tensor]) -> Tensor:
    """Equation of stage I: the mean over the K matched layers of the task's loss behind their filters and heads."""
    return torch.stack(list(losses)).mean()


def span_loss(logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Task loss of span question answering: mean of the two cross-entropies, `logits` [B, S, 2]."""
    return (F.cross_entropy(logits[..., 0], start) + F.cross_entropy(logits[..., 1], end)) / 2


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Task loss of a language model: position i predicts label i + 1, and a label of -100 counts nowhere."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def divergence(student: Tensor, teacher: Tensor, temperature: float, squared: bool = True) -> Tensor:
    """L_KL = T^2 mean over rows of KL(softmax(l_t / T) || softmax(l_s / T)).  [N, V] twice"""
    s, t = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    terms = torch.where(t > -math.inf, t.exp() * (t - s), 0.0)  # what the teacher rules out contributes 0
    return terms.sum(-1).mean() * (temperature**2 if squared else 1)


def reverse_divergence(student: Tensor, teacher: Tensor, temperature: float, squared: bool = True) -> Tensor:
    """The same with the roles swapped, KL(student || teacher)."""
    return divergence(teacher, student, temperature, squared)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float, beta: float, squared: bool = True) -> Tensor:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m) with the mixture m = beta p_t + (1 - beta) p_s."""
    s, t = (F.softmax(logits / temperature, -1) for logits in (student, teacher))
    mixture = (beta * t + (1 - beta) * s).log()
    rows = beta * F.kl_div(mixture, t, reduction="none").sum(-1)
    rows = rows + (1 - beta) * F.kl_div(mixture, s, reduction="none").sum(-1)
    return rows.mean() * (temperature**2 if squared else 1)


def layer_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """One term of L_layer: mean over real tokens and over d_f of (Z_s - Z_t)^2.  [B, S, d_f] twice, [B, S]"""
    return (student - teacher)[mask.bool()].square().mean()


def variance(filtered: Tensor, mask: Tensor) -> Tensor:
    """What `scale="variance"` divides a pair by: the variance of the teacher's filtered states over tokens, as a mean
    over d_f."""
    return filtered[mask.bool()].var(0, correction=0).mean()


def stage_two(task: Tensor, kl: Tensor, errors: Sequence[Tensor], kd_weight: float, layer_weight: float) -> Tensor:
    """Equation of stage II: L_task + alpha_1 L_KL + alpha_2 1/K sum_k L_layer^k."""
    return task + kd_weight * kl + layer_weight * torch.stack(list(errors)).mean()


def layer_error_gradients(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, teacher_weight: Tensor, teacher_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one `layer_error` by hand, for states [N, d_s] and [N, d_t]: of H_s, W_s and b_s."""
    gap = filter_linear(student, weight, bias) - filter_linear(teacher, teacher_weight, teacher_bias)  # D [N, d_f]
    gap = gap * 2 / gap.numel()
    return gap @ weight, gap.T @ student, gap.sum(0)


def divergence_gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Gradient of `divergence` by hand: T / N (softmax(l_s / T) - softmax(l_t / T)).  [N, V]"""
    gap = F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1)
    return gap * temperature / student.shape[0]

"""What can still be read from states: the accuracy of a linear probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def probe(
    states: Tensor, labels: Tensor, test_states: Tensor, test_labels: Tensor, *, penalty: float = 1e-3, steps: int = 100
) -> float:
    """Share of `test_labels` [m] that logistic regression on `states` [n, d] and `labels` [n] gets right.

    States are standardised by those of training; `penalty` is that of the squared weights. The same data give the same
    number. Raises ValueError for states and labels of different length.

    >>> x = torch.eye(4).repeat(8, 1)
    >>> probe(x, x.argmax(1), x, x.argmax(1))
    1.0
    """
    for name, x, y in (("states", states, labels), ("test_states", test_states, test_labels)):
        if x.dim() != 2 or y.shape != x.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and its labels {tuple(y.shape)}; give [n, d] and [n]")
    states, test_states = states.detach().double(), test_states.detach().double()
    mean, std = states.mean(0), states.std(0, correction=0).clamp_min(1e-12)
    x, test = (states - mean) / std, (test_states - mean) / std
    classes = int(max(labels.max(), test_labels.max())) + 1
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return float((F.linear(test, weight, bias).argmax(1) == test_labels).double().mean())

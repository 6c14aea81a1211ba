"""Net update factors: how far each gradient moves theta over all time, per unit of itself (section 1.3).

A gradient's total displacement is -g_t k(g_t). SGD has k = lr for every gradient; where k depends on the gradient, the
sum of the pushes can point another way than the sum of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zq_lib.adashift.counterexamples import ADASHIFT, SGD, Array, Rule, step_sizes
from zq_lib.adashift.window import weights


def net_update_factors(rule: Rule, gradients: Array, lr: float | Array = 1e-3) -> Array:
    """k(g_t) of every gradient, for a walk that ends with the last of them. [T, lanes]

        Adam, AMSGrad:  sum_{i>=t} r_i (1 - beta1) beta1^{i-t}        AdaShift:  sum_{i=t}^{t+n-1} r_i w_{i-t}

    with r_i the step sizes. So theta_T - theta_0 = -sum_t g_t k(g_t), exactly. Of a gradient shortly before the end
    only a part has been spent.
    """
    sizes = step_sizes(rule, gradients, lr)
    if rule.name == SGD:
        return np.array(sizes)
    if rule.name == ADASHIFT:
        found = np.zeros_like(sizes)
        for i, weight in enumerate(weights(rule.n, rule.beta1)):
            found[: len(sizes) - i] += weight * sizes[i:]
        return found
    found, later = np.empty_like(sizes), np.zeros(sizes.shape[1])
    for t in range(len(sizes) - 1, -1, -1):
        later = found[t] = (1 - rule.beta1) * sizes[t] + rule.beta1 * later
    return found


@dataclass(frozen=True)
class Factors:
    """Mean k of the large gradients and of the small ones, their ratio, and the drift of theta per step."""

    large: float
    small: float
    ratio: float
    drift: float


def compare(rule: Rule, gradients: Array, lr: float | Array = 1.0, skip: int = 0, tail: int = 200) -> Factors:
    """Mean factors of the positive and of the negative gradients.

    The first `skip` steps, in which v still fills, and the last `tail`, which are not spent, do not count. Raises
    ValueError where nothing is left, or gradients of one sign only.
    """
    kept = slice(skip, len(gradients) - tail)
    g, k = gradients[kept], net_update_factors(rule, gradients, lr)[kept]
    if not ((g > 0).any() and (g < 0).any()):
        raise ValueError(
            f"{len(g)} steps are left of {len(gradients)} without gradients of both signs; give more steps than "
            f"skip={skip} and tail={tail}"
        )
    large, small = float(k[g > 0].mean()), float(k[g < 0].mean())
    return Factors(large, small, large / small, float(-(g * k).mean()))

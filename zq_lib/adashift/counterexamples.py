"""The two problems on which Adam walks the wrong way, and walkers for many runs at once (section 1.4).

The losses are linear in theta, so gradients do not depend on where a walker is: a whole sequence of them, for many
independent lanes, goes through a rule as arrays [T, lanes]. Losses being linear, lr only scales theta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zq_lib.adashift.window import weights

Array = np.ndarray
ADAM, AMSGRAD, ADASHIFT, SGD = "Adam", "AMSGrad", "AdaShift", "SGD"
RULES = (ADAM, AMSGRAD, ADASHIFT, SGD)


@dataclass(frozen=True)
class Rule:
    """An update rule for one parameter: Adam and AMSGrad as in torch, AdaShift, or SGD without momentum."""

    name: str = ADASHIFT
    beta1: float = 0.0
    beta2: float = 0.999
    n: int = 1  # AdaShift's shift and window
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"name={self.name!r} is not a rule; choose one of {', '.join(RULES)}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2!r} must lie in [0, 1), for example 0.999")
        last = 1.0 if self.name == ADASHIFT else np.nextafter(1, 0)
        if not 0 <= self.beta1 <= last:
            raise ValueError(f"beta1={self.beta1!r} must lie in [0, 1), for AdaShift in [0, 1]")
        if self.n < 1:
            raise ValueError(f"n={self.n!r} must be at least 1")


@dataclass(frozen=True)
class Stochastic:
    """f_t(theta) = C theta with probability (1 + delta) / (C + 1), else -theta: the mean gradient is delta > 0."""

    C: float = 101.0
    delta: float = 0.02

    def __post_init__(self) -> None:
        if not self.C > 1:
            raise ValueError(f"C={self.C!r} must be more than 1, the size of the other gradient")
        if not 0 < self.delta <= self.C:
            raise ValueError(f"delta={self.delta!r} must lie in (0, C={self.C:g}], or theta should not decrease")

    @property
    def probability(self) -> float:
        """Of the gradient C."""
        return (1 + self.delta) / (self.C + 1)

    def gradients(self, steps: int, lanes: int = 1, seed: int = 0) -> Array:
        """Independent gradients C and -1. [steps, lanes]"""
        drawn = np.random.default_rng(seed).random((steps, lanes)) < self.probability
        return np.where(drawn, float(self.C), -1.0)


@dataclass(frozen=True)
class Sequential:
    """f_t(theta) = C theta when t mod d = 1 and -other theta else: the sum over a period is C - (d - 1) other > 0."""

    C: float = 3.0
    d: int = 3
    other: float = 1.0

    def __post_init__(self) -> None:
        if self.d < 2:
            raise ValueError(f"d={self.d!r} must be at least 2, or there is no other gradient")
        if not self.C > (self.d - 1) * self.other > 0:
            raise ValueError(
                f"C={self.C:g} must exceed (d - 1) other = {(self.d - 1) * self.other:g}, or theta should not decrease"
            )

    def gradients(self, steps: int) -> Array:
        """C, -other, ..., -other, C, ... [steps, 1]"""
        return np.where(np.arange(steps) % self.d == 0, float(self.C), -float(self.other))[:, None]

    def displacement(self, beta2: float, n: int) -> float:
        """Closed form of the way per period for lr = 1 and beta1 = 0, far from the start; n = 0 is Adam."""
        i = np.arange(self.d)  # position i + 1 of the period
        squares = self.other**2 + (self.C**2 - self.other**2) * (1 - beta2) * beta2**i / (1 - beta2**self.d)
        gradients = np.where(i == 0, self.C, -self.other)
        return float(-(gradients / np.sqrt(squares[(i - n) % self.d])).sum())


def critical_delta(C: float, beta2: float) -> float:
    """delta_c = (1 - beta2) C / 2: below it Adam walks the wrong way on `Stochastic`, to first order in 1 - beta2."""
    return (1 - beta2) * C / 2


def step_sizes(rule: Rule, gradients: Array, lr: float | Array = 1e-3) -> Array:
    """What multiplies the first moment at each step, lr_t / (sqrt(vhat_t) + eps): 0 where nothing moves. [T, lanes]

    Adam's correction of its first moment is part of it, so that moment and size do not depend on each other.
    """
    steps = len(gradients)
    rates = np.broadcast_to(np.asarray(lr, dtype=float).reshape(-1, 1), (steps, 1))  # [T, 1]
    if rule.name == SGD:
        return np.broadcast_to(rates, gradients.shape)
    squares, t = gradients**2, np.arange(1, steps + 1)[:, None]
    if rule.name == ADASHIFT:  # v has seen g_1 at step n + 1; its age counts from its first positive value
        v = np.zeros(squares.shape)
        v[rule.n :] = _average(squares[: -rule.n], rule.beta2)
        age = np.cumsum(v > 0, axis=0)
        vhat = v / np.where(age > 0, 1 - rule.beta2**age, 1)
        return np.where(v > 0, rates / (np.sqrt(vhat) + rule.eps), 0)
    v = _average(squares, rule.beta2)
    if rule.name == AMSGRAD:
        v = np.maximum.accumulate(v, axis=0)
    return rates / (1 - rule.beta1**t) / (np.sqrt(v / (1 - rule.beta2**t)) + rule.eps)


def first_moments(rule: Rule, gradients: Array) -> Array:
    """m_t: the weighted window of AdaShift, the running average of Adam (uncorrected), the gradient of SGD."""
    if rule.name == ADASHIFT:
        m = np.zeros(gradients.shape)
        for i, weight in enumerate(weights(rule.n, rule.beta1)):
            m[i:] += weight * gradients[: len(gradients) - i]
        return m
    return gradients if rule.name == SGD or rule.beta1 == 0 else _average(gradients, rule.beta1)


def simulate(
    rule: Rule,
    gradients: Array,
    lr: float | Array = 1e-3,
    start: float = 0.0,
    bounds: tuple[float, float] | None = None,
) -> Array:
    """theta_1 ... theta_T of every lane. [T, lanes]

    `lr` is one number or one per step; with `bounds` every step is projected onto the interval.

    >>> simulate(Rule("SGD"), Sequential().gradients(3), lr=0.1).ravel().round(3).tolist()
    [-0.3, -0.2, -0.1]
    """
    moves = -step_sizes(rule, gradients, lr) * first_moments(rule, gradients)
    if bounds is None:
        return start + np.cumsum(moves, axis=0)
    low, high = bounds
    theta = np.full(moves.shape[1], start)
    for t, move in enumerate(moves):
        theta = moves[t] = np.minimum(np.maximum(theta + move, low), high)
    return moves


def _average(values: Array, beta: float) -> Array:
    """Exponential moving average from zero, uncorrected. [T, lanes]"""
    found, state = np.empty(values.shape), np.zeros(values.shape[1])
    for t, new in enumerate((1 - beta) * values):
        state = found[t] = beta * state + new
    return found

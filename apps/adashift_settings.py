"""What the AdaShift page's three parts can be set to, and the program that each setting is. Nothing of a page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zq_lib.adashift import Sequential, Stochastic
from zq_lib.adashift.counterexamples import ADAM, ADASHIFT, AMSGRAD, Array, Rule
from zq_lib.adashift.training import CONTENDERS

STOCHASTIC, SEQUENTIAL, OWN, DRAWN = "stochastic", "sequential", "own", "drawn"
PROBLEMS = (STOCHASTIC, SEQUENTIAL, OWN, DRAWN)
LANES = 64  # runs whose gradients are drawn
RATE = 1e-3  # of the walks; SGD's is divided by the root mean square of the gradients
DELTAS = (0.05, 12.0)  # ends of the slider
MOST_C, MOST_D, MOST_N, MOST_BETA1, MOST_BETA2 = 120, 40, 40, 0.99, 0.999
STEPS = (500, 10_000)
MOST_GRADIENTS, LARGEST = 40, 1e4  # numbers of one's own, and their size
BY_HAND = (ADAM, AMSGRAD, ADASHIFT)
FEW = 12  # gradients by hand
NAMES = tuple(c.name for c in CONTENDERS)
IDENTITY = "AdaShift none"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
EPSILONS = (1e-10, 1e-8, 1e-5, 1e-2)
MOST_OPTIMISERS, EPOCHS, MOST_SEED = 4, (2, 30), 9


def numbers(text: str) -> tuple[float, ...]:
    """Typed numbers. Raises ValueError for what is none."""
    found = []
    for word in re.split(r"[,;\s]+", text.strip()):
        try:
            found += [float(word)] if word else []
        except ValueError:
            raise ValueError(f"gradients has {word[:20]!r}, which is not a number; write them like 3, -1, -1") from None
    return tuple(found)


def typed(gradients: Sequence[float]) -> str:
    """Numbers as one would type them."""
    return ", ".join(f"{g:g}" for g in gradients)


def _offered(name: str, value: Any, offered: Any) -> None:
    if isinstance(value, bool) or value not in tuple(offered):
        raise ValueError(f"{name}={value!r} is not offered here; choose one of {', '.join(map(str, offered))}")


def _within(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a {'whole ' * whole}number from {low:g} to {high:g}")


def _sequence(found: Any, most: int) -> tuple[float, ...]:
    """The numbers of a list. Raises ValueError where they are no gradients."""
    if not isinstance(found, list | tuple) or not all(
        isinstance(g, int | float) and not isinstance(g, bool) and math.isfinite(g) for g in found
    ):
        raise ValueError(f"gradients={found!r} must be a list of finite numbers, like 3, -1, -1")
    if not 2 <= len(found) <= most:
        raise ValueError(f"gradients has {len(found)} numbers; give from 2 to {most}")
    if large := [g for g in found if abs(g) > LARGEST]:
        raise ValueError(f"gradients has {large[0]:g}; give numbers from {-LARGEST:g} to {LARGEST:g}")
    return tuple(float(g) for g in found)


@dataclass(frozen=True)
class Walk:
    """A problem and the settings with which all rules walk on it.

    `problem` is "stochastic" (C, delta), "sequential" (C, d), or one's own `gradients`: "own" repeats them in turn,
    "drawn" draws from them.
    """

    problem: str = STOCHASTIC
    C: float = 101.0
    delta: float = 1.0
    d: int = 3
    gradients: tuple[float, ...] = (3.0, -1.0, -1.0)
    beta2: float = 0.9
    n: int = 1
    beta1: float = 0.0
    steps: int = 5_000

    def __post_init__(self) -> None:
        _offered("problem", self.problem, PROBLEMS)
        _within("beta2", self.beta2, 0, MOST_BETA2)
        _within("n", self.n, 1, MOST_N, whole=True)
        _within("beta1", self.beta1, 0, MOST_BETA1)
        _within("steps", self.steps, *STEPS, whole=True)
        _within("C", self.C, 1, MOST_C)
        _within("delta", self.delta, 0, MOST_C)
        _within("d", self.d, 2, MOST_D, whole=True)
        given = self.gradients
        object.__setattr__(self, "gradients", _sequence(given, MOST_GRADIENTS) if self._own else tuple(given))
        if self.problem == STOCHASTIC:
            Stochastic(self.C, self.delta)
        elif self.problem == SEQUENTIAL:
            Sequential(self.C, self.d)
        elif not min(self.gradients) < 0 < max(self.gradients):
            raise ValueError("gradients has numbers of one sign only; add one of the other, or nobody can go wrong")
        elif not sum(self.gradients) > 0:
            raise ValueError(f"gradients sums to {sum(self.gradients):g}; it must be positive, for theta to decrease")

    @property
    def _own(self) -> bool:
        return self.problem in (OWN, DRAWN)

    def rule(self, name: str) -> Rule:
        """The rule of that name with these settings."""
        return Rule(name, self.beta1, self.beta2, self.n)

    def draw(self) -> Array:
        """The gradients. [steps, 64], or [steps, 1] where nothing is random"""
        if self.problem == STOCHASTIC:
            return Stochastic(self.C, self.delta).gradients(self.steps, LANES)
        if self.problem == SEQUENTIAL:
            return Sequential(self.C, self.d).gradients(self.steps)
        if self.problem == DRAWN:
            return np.random.default_rng(0).choice(self.gradients, (self.steps, LANES))
        return np.resize(self.gradients, (self.steps, 1))

    def python(self) -> str:
        """A program that walks."""
        listed = f"[{typed(self.gradients)}]"
        line = {
            STOCHASTIC: f"Stochastic({self.C:g}, {self.delta:g}).gradients({self.steps}, {LANES})",
            SEQUENTIAL: f"Sequential({self.C:g}, {self.d}).gradients({self.steps})",
            DRAWN: f"np.random.default_rng(0).choice({listed}, ({self.steps}, {LANES})).astype(float)",
            OWN: f"np.resize({listed}, ({self.steps}, 1)).astype(float)",
        }[self.problem]
        problem = line.split("(")[0]
        names = ["RULES", "SGD", "Rule", "simulate", *([problem] if not self._own else [])]
        skip, tail = uncounted(self.steps)
        return (
            "import numpy as np\n\n"
            f"from zq_lib.adashift.counterexamples import {', '.join(names)}\n"
            "from zq_lib.adashift.factors import compare\n\n"
            f"gradients = {line}  # steps, runs\n"
            "for name in RULES:\n"
            f"    rule = Rule(name, beta1={self.beta1:g}, beta2={self.beta2:g}, n={self.n})\n"
            "    scale = np.sqrt((gradients**2).mean()) if name == SGD else 1.0\n"
            f"    theta = simulate(rule, gradients, lr={RATE:g} / scale)[-1]\n"
            '    print(name, theta.mean(), "wrong in", (theta > 0).sum(), "of", len(theta))\n'
            f"    print(compare(rule, gradients, lr=1 / scale, skip={skip}, tail={tail}))\n"
        )


def uncounted(steps: int) -> tuple[int, int]:
    """How many first and last steps of a walk the net update factors leave out."""
    return steps // 5, min(200, steps // 5)


@dataclass(frozen=True)
class Hand:
    """A short sequence for one rule, with lr = 1."""

    rule: str = ADASHIFT
    gradients: tuple[float, ...] = (3.0, -1.0, -1.0, 3.0, -1.0, -1.0, 3.0, -1.0, -1.0)
    n: int = 1
    beta1: float = 0.0
    beta2: float = 0.1

    def __post_init__(self) -> None:
        _offered("rule", self.rule, BY_HAND)
        object.__setattr__(self, "gradients", _sequence(self.gradients, FEW))
        _within("n", self.n, 1, FEW - 1, whole=True)
        _within("beta1", self.beta1, 0, MOST_BETA1)
        _within("beta2", self.beta2, 0, MOST_BETA2)
        if self.n >= len(self.gradients):
            raise ValueError(
                f"n={self.n} leaves nothing to move of {len(self.gradients)} gradients; lower n or give more gradients"
            )

    @property
    def made(self) -> Rule:
        """The rule."""
        return Rule(self.rule, self.beta1, self.beta2, self.n)

    def python(self) -> str:
        """A program that prints what the table shows."""
        return (
            "import numpy as np\n\n"
            "from zq_lib.adashift.counterexamples import Rule, first_moments, simulate, step_sizes\n"
            "from zq_lib.adashift.factors import net_update_factors\n\n"
            f"gradients = np.array([[{typed(self.gradients)}]], dtype=float).T  # steps, runs\n"
            f"rule = Rule({self.rule!r}, beta1={self.beta1:g}, beta2={self.beta2:g}, n={self.n})\n"
            'print("m", first_moments(rule, gradients).ravel())\n'
            'print("r", step_sizes(rule, gradients, lr=1.0).ravel())\n'
            'print("theta", simulate(rule, gradients, lr=1.0).ravel())\n'
            f"for t in range({self.n}, len(gradients) + 1):\n"
            "    print(t, net_update_factors(rule, gradients[:t], lr=1.0).ravel())  # k so far\n"
        )


@dataclass(frozen=True)
class Training:
    """Optimisers that learn the digits, at `rate` or each at its own best (None); `eps` is that of AdaShift none."""

    optimizers: tuple[str, ...] = ("Adam", "AdaShift max", IDENTITY)
    rate: float | None = None
    eps: float = 1e-5
    epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.optimizers if isinstance(self.optimizers, list | tuple) else [self.optimizers]
        for name in given:
            _offered("optimizers", name, NAMES)
        if not 1 <= len(set(given)) <= MOST_OPTIMISERS:
            raise ValueError(f"optimizers has {len(set(given))} names; choose from 1 to {MOST_OPTIMISERS}")
        object.__setattr__(self, "optimizers", tuple(name for name in NAMES if name in given))
        if self.rate is not None:
            _offered("rate", self.rate, RATES)
        _offered("eps", self.eps, EPSILONS)
        _within("epochs", self.epochs, *EPOCHS, whole=True)
        _within("seed", self.seed, 0, MOST_SEED, whole=True)

    def python(self) -> str:
        """A program that trains them."""
        identity = ""
        if IDENTITY in self.optimizers:
            own = next(c.lr for c in CONTENDERS if c.name == IDENTITY)
            identity = (
                f"makers[{IDENTITY!r}] = lambda params: AdaShift(\n"
                f'    params, lr={self.rate or own:g}, phi="none", eps={self.eps:g}\n'
                ")\n"
            )
        return (
            ("from zq_lib.adashift import AdaShift\n" if identity else "")
            + "from zq_lib.adashift.training import CONTENDERS, load_digits, train\n\n"
            f"digits, known = load_digits({self.seed}), {{c.name: c for c in CONTENDERS}}\n"
            f"rate = {'None  # each its own' if self.rate is None else f'{self.rate:g}'}\n"
            f"names = {list(self.optimizers)}\n"
            "makers = {name: lambda params, c=known[name]: c(params, rate) for name in names}\n"
            f"{identity}"
            "for name, make in makers.items():\n"
            f"    row, losses = train(digits, make, {self.seed}, {self.epochs})\n"
            "    print(name, row, max(losses))\n"
        )

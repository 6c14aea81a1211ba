"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zq_lib.adashift.config import AdaShiftConfig
from zq_lib.adashift.counterexamples import Sequential, critical_delta
from zq_lib.adashift.optimizer import AdaShift
from zq_lib.adashift.spatial import spatial
from zq_lib.adashift.window import weights
from zq_lib.core.exercises import Exercise


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(a, b, strict=True))


# 1. Where Adam turns round --------------------------------------------------------------------------------------------
def _check_boundary(answer: Callable[[float, float], float]) -> str | None:
    for C, beta2 in ((101.0, 0.999), (21.0, 0.99), (101.0, 0.9)):
        got, want = float(answer(C, beta2)), critical_delta(C, beta2)
        if math.isclose(got, want, rel_tol=1e-6):
            continue
        what = f"For C = {C:g} and beta2 = {beta2:g} it is {got:.4g} and should be {want:.4g}"
        if math.isclose(got, 2 * want, rel_tol=1e-6):
            return f"{what}: the expansion of 1/sqrt has a factor one half."
        if math.isclose(got, beta2 * C / 2, rel_tol=1e-6):
            return f"{what}: g^2 enters its own v with weight 1 - beta2, not beta2."
        if math.isclose(got, (1 - beta2) / 2, rel_tol=1e-6):
            return f"{what}: E g^3 / E g^2 is the size of the rare gradient, nearly C."
        return f"{what}: set E g = (1 - beta2) / 2 * E g^3 / E g^2."
    return None


BOUNDARY = Exercise(
    name="boundary",
    title="Exercise 1",
    prompt="Below which delta does Adam walk the wrong way? Expand E[g / sqrt(v)] to first order in 1 - beta2, with "
    "E g^3 / E g^2 = C, and find delta_c(C, beta2).",
    check=_check_boundary,
    solution=critical_delta,
    wrong=[
        (lambda C, b: (1 - b) * C, "a factor one half"),
        (lambda C, b: b * C / 2, "with weight 1 - beta2"),
        (lambda C, b: (1 - b) / 2, "the size of the rare gradient"),
        (lambda C, b: math.sqrt(1 - b) * C, "set E g ="),
    ],
    hint="v = mu + (1 - beta2)(g^2 - mu): what does that do to 1/sqrt(v), and then to the mean of g / sqrt(v)?",
)


# 2. The window's weights ----------------------------------------------------------------------------------------------
def _check_window(answer: Callable[[int, float], Sequence[float]]) -> str | None:
    for n, beta1 in ((3, 0.5), (4, 0.9), (3, 1.0), (3, 0.0)):
        want = weights(n, beta1)
        got = answer(n, beta1)
        if not isinstance(got, list | tuple) or len(got) != n:
            return f"Return {n} numbers, one for each gradient of the window."
        got = [float(x) for x in got]
        what = f"For n = {n} and beta1 = {beta1:g}"
        if _same(got, want):
            continue
        if _same(got[::-1], want):
            return f"{what} that is oldest first: w_0 belongs to the newest gradient."
        if _same(got, [beta1**i for i in range(n)]):
            return f"{what} they add up to {sum(got):.3g}: divide by the sum, and no correction of m is needed."
        if _same(got, [(1 - beta1) * beta1**i for i in range(n)]):
            return f"{what} that is Adam's infinite tail cut off: what is left adds up to {sum(got):.3g}, not to 1."
        return f"{what} the weights are {', '.join(f'{w:.4g}' for w in want)}: each beta1 times the one before it."
    return None


WINDOW = Exercise(
    name="window",
    title="Exercise 2",
    prompt="The window's weights w_0 ... w_{n-1}, the newest gradient first. By hand for n = 3 and beta1 = 1/2, then "
    "as a function that can do beta1 = 1 and beta1 = 0 as well.",
    check=_check_window,
    solution=weights,
    wrong=[
        (lambda n, b: [b**i for i in range(n)], "divide by the sum"),
        (lambda n, b: weights(n, b)[::-1], "belongs to the newest"),
        (lambda n, b: [(1 - b) * b**i for i in range(n)], "tail cut off"),
        (lambda n, b: [1 / n] * n, "each beta1 times"),
        (lambda n, b: 1.0, "one for each gradient"),
    ],
    hint="Write down 1, beta1, beta1^2, ... and make them add up to one; 0^0 is 1.",
)


# 3. Spot the bug ------------------------------------------------------------------------------------------------------
Moments = list[tuple[float, float]]  # (m_t, vhat_t) for t = n + 1, n + 2, ...


def _head_after_append(gradients: Sequence[float], n: int, beta1: float, beta2: float) -> Moments:
    queue, found, v = deque(maxlen=n), [], 0.0
    for t, g in enumerate(gradients, 1):
        queue.append(g)
        if t > n:
            v = beta2 * v + (1 - beta2) * queue[0] ** 2
            m = sum(w * old for w, old in zip(weights(n, beta1), reversed(queue), strict=True))
            found.append((m, v / (1 - beta2 ** (t - n))))
    return found


def _late_moment(gradients: Sequence[float], n: int, beta1: float, beta2: float) -> Moments:
    w, found, m, v = weights(n, beta1), [], 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        if t > n:
            old = gradients[t - n - 1]
            m = beta1 * (m - w[-1] * old) + w[0] * g
            v = beta2 * v + (1 - beta2) * old**2
            found.append((m, v / (1 - beta2 ** (t - n))))
    return found


def _exponent_of_t(gradients: Sequence[float], n: int, beta1: float, beta2: float) -> Moments:
    w, found, m, v = weights(n, beta1), [], 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        old = gradients[t - n - 1] if t > n else 0.0
        m = beta1 * (m - w[-1] * old) + w[0] * g
        if t > n:
            v = beta2 * v + (1 - beta2) * old**2
            found.append((m, v / (1 - beta2**t)))
    return found


def _infinite_tail(gradients: Sequence[float], n: int, beta1: float, beta2: float) -> Moments:
    found, m, v = [], 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        if t > n:
            v = beta2 * v + (1 - beta2) * gradients[t - n - 1] ** 2
            found.append((m / (1 - beta1**t), v / (1 - beta2 ** (t - n))))
    return found


# Shown in the notebook; each breaks one of PROPERTIES.
SNIPPETS: Mapping[str, Callable[[Sequence[float], int, float, float], Moments]] = {
    "a": _exponent_of_t,
    "b": _head_after_append,
    "c": _infinite_tail,
    "d": _late_moment,
}
PROPERTIES = {
    "shift": "a gradient is not in v before step t + n",
    "sum": "equal gradients have themselves as their m",
    "window": "a gradient has left m at step t + n",
    "correction": "equal gradients have their square as vhat",
}
_N, _BETAS, _STEPS, _AT = 3, (0.5, 0.9), 14, 6  # another gradient at step _AT + 1, when all are running


def broken(snippet: Callable[[Sequence[float], int, float, float], Moments]) -> list[str]:
    """Which of PROPERTIES a way to write the moments breaks, found by running it."""
    plain, bumped = [2.0] * _STEPS, [2.0] * _STEPS
    bumped[_AT] = 5.0
    before, after = (snippet(g, _N, *_BETAS) for g in (plain, bumped))
    steps = range(_N + 1, _STEPS + 1)
    changed = {k: [t for t, x, y in zip(steps, before, after, strict=True) if abs(x[k] - y[k]) > 1e-9] for k in (0, 1)}
    found = {
        "shift": min(changed[1]) < _AT + 1 + _N,
        "sum": any(abs(m - 2.0) > 1e-9 for m, _ in before),
        "window": max(changed[0]) >= _AT + 1 + _N,
        "correction": any(abs(vhat - 4.0) > 1e-9 for _, vhat in before),
    }
    return [name for name, wrong in found.items() if wrong]


def _check_bugs(answer: Mapping[str, str]) -> str | None:
    if not isinstance(answer, Mapping) or set(answer) != set(SNIPPETS):
        return f"Answer with a dict: for each of {', '.join(SNIPPETS)} one of {', '.join(PROPERTIES)}."
    for letter, said in answer.items():
        if said not in PROPERTIES:
            return f"{said!r} is not one of {', '.join(PROPERTIES)}."
        if said not in (wrong := broken(SNIPPETS[letter])):
            return f"({letter}) does keep that {PROPERTIES[said]}; it breaks that {PROPERTIES[wrong[0]]}."
    return None


_BUGS = {"a": "correction", "b": "shift", "c": "window", "d": "sum"}

BUGS = Exercise(
    name="bugs",
    title="Exercise 3",
    prompt="Four ways to write AdaShift's moments, each seen in published code, each with one bug. Which property does "
    "each break: shift, sum, window or correction?",
    check=_check_bugs,
    solution=_BUGS,
    wrong=[
        (_BUGS | {"a": "shift", "b": "correction"}, "(a) does keep that a gradient"),
        (_BUGS | {"b": "window", "c": "shift"}, "(b) does keep that a gradient"),
        (_BUGS | {"c": "sum", "d": "window"}, "(c) does keep that equal"),
        (_BUGS | {"d": "correction"}, "(d) does keep that equal"),
        (_BUGS | {"d": "warm-up"}, "is not one of"),
        ("b", "Answer with a dict"),
    ],
    hint="Change one gradient and see when v and m notice; then give all the same gradient.",
)


# 4. Delay is not independence -----------------------------------------------------------------------------------------
PERIOD_FOUR = Sequential(C=4.0, d=4)
_BETA2 = 0.1


def _check_period(answer: int) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, int):
        return "Answer with a whole number."
    if answer < 1:
        return f"n = {answer} is no shift: that is Adam itself. Which n of at least 1 gives the same walk?"
    way, adam = (PERIOD_FOUR.displacement(_BETA2, n) for n in (answer, 0))
    if math.isclose(way, adam, rel_tol=1e-12):
        return None
    return (
        f"With n = {answer} theta moves by {way:+.3f} lr in a period, and Adam moves it by {adam:+.3f}. In step t the "
        "divisor has just seen g_{t-n}: when is that the same number as g_t?"
    )


PERIOD = Exercise(
    name="period",
    title="Exercise 4",
    prompt="The gradients 4, -1, -1, -1 come round again and again. Which shift n makes AdaShift (beta1 = 0) walk "
    "exactly as Adam does, the wrong way?",
    check=_check_period,
    solution=4,
    wrong=[
        (0, "that is Adam itself"),
        (1, "With n = 1 "),
        (2, "With n = 2 "),
        (3, "With n = 3 "),
        ("4", "a whole number"),
    ],
    hint="The sequence repeats every four steps.",
)


# 5. A scale for each row ----------------------------------------------------------------------------------------------
_GRADS = torch.tensor([[1.0, -5.0, 2.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.125], [3.0, 2.0, 1.0]], dtype=torch.float64)


def _solve_rows(grad: Tensor) -> Tensor:
    return grad.square().amax(1)


def _check_rows(answer: Callable[[Tensor], Tensor]) -> str | None:
    got, want = answer(_GRADS.clone()), spatial(_GRADS.square(), "max", "row")
    if not isinstance(got, Tensor) or got.shape != want.shape:
        if isinstance(got, Tensor) and got.numel() == 1:
            return "That is one number for the table: a rare word's row would get the scale of a frequent word."
        if isinstance(got, Tensor) and got.shape == (_GRADS.shape[1],):
            return f"That has one number for each of the {_GRADS.shape[1]} columns: a word is a row."
        return f"Return one number for each row, a tensor of shape {tuple(want.shape)}."
    if torch.allclose(got, want):
        return None
    if torch.allclose(got, _GRADS.amax(1).square()):
        return "Square first: the largest entry of the first row is -5, and yours sees only the 2."
    if torch.allclose(got, want.sqrt()):
        return "These are sizes, not squares: v is a mean of squares, and the root comes later."
    return "The largest squared entry of each row was wanted."


ROWS = Exercise(
    name="rows",
    title="Exercise 5",
    prompt="An embedding's rows have lives of their own. Write phi for blocks that are rows: the gradient [V, D] gives "
    "the largest square of each row [V]. Then train an embedding with block='row'.",
    check=_check_rows,
    solution=_solve_rows,
    wrong=[
        (lambda g: g.square().amax(), "one number for the table"),
        (lambda g: g.square().amax(0), "a word is a row"),
        (lambda g: g.amax(1).square(), "Square first"),
        (lambda g: g.abs().amax(1), "the root comes later"),
        (lambda g: g.square().mean(1), "largest squared entry"),
        (lambda g: g.square(), "Return one number for each row"),
    ],
    hint="Square, then the maximum along dimension 1.",
)


# 6. What keeps the identity alive -------------------------------------------------------------------------------------
_MOST, _KEPT = 1e5, 20.0  # largest step in lr; how unequal the steps of dense entries may be


def _steps(gradients: Sequence[Tensor], settings: Mapping[str, Any]) -> Tensor:
    """The largest step of each entry, in units of lr."""
    param = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = AdaShift([param], **{"lr": 1.0, "phi": "none", "n": 1, "betas": (0.0, 0.999), **settings})
    places = [param.detach().clone()]
    for grad in gradients:
        param.grad = grad.clone()
        optimizer.step()
        places.append(param.detach().clone())
    return torch.stack([(b - a).abs() for a, b in zip(places, places[1:], strict=False)]).amax(0)


def _sparse() -> list[Tensor]:
    """A pixel that is almost always dark: nothing, then very little, then a gradient as any other."""
    return [torch.tensor([x], dtype=torch.float64) for x in (0.0, *(1e-9,) * 12, 1.0, 1.0)]


def _dense() -> list[Tensor]:
    """Two entries with steady gradients, one of them a thousand times as large."""
    return [torch.tensor([1e-3, 1.0], dtype=torch.float64)] * 20


def _check_survive(answer: Mapping[str, Any]) -> str | None:
    if not isinstance(answer, Mapping):
        return "Answer with settings of AdaShift, for example {'n': 5}."
    if "lr" in answer:
        return "A smaller lr makes all steps smaller alike; find what bounds a step for a given lr."
    if AdaShiftConfig(**{"phi": "none", **answer}).phi != "none":
        return "That is another phi; the identity itself is to survive."
    largest, dense = float(_steps(_sparse(), answer).max()), _steps(_dense(), answer)
    if not largest <= _MOST:
        return f"The dark pixel makes a step of {largest:.2g} lr under {dict(answer)}: nothing bounds it."
    ratio = float(dense.max() / dense.min()) if float(dense.min()) > 0 else math.inf
    if ratio > _KEPT:
        return (
            f"It survives, but an entry with gradients of 1 moves {ratio:.3g} times as far as one with 0.001: that is "
            "SGD. Less is enough."
        )
    return None


SURVIVE = Exercise(
    name="survive",
    title="Exercise 6",
    prompt="With phi = none and eps = 1e-10 a pixel that is almost always dark makes a step of a billion lr. Give one "
    "setting that bounds it and leaves dense entries alone. What does it cost?",
    check=_check_survive,
    solution={"eps": 1e-5},
    wrong=[
        ({"eps": 1e-10}, "'eps': 1e-10}: nothing bounds it"),
        ({"n": 5, "eps": 1e-9}, "'n': 5, 'eps': 1e-09}: nothing bounds it"),
        ({"eps": 1.0}, "that is SGD"),
        ({"phi": "max"}, "another phi"),
        ({"lr": 1e-6}, "smaller alike"),
        (1e-5, "Answer with settings"),
    ],
    hint="A step is lr m / (sqrt(vhat) + eps): with v = 0 nothing but eps is left. There is also a bound, max_step.",
)


# 7. Bytes are time ----------------------------------------------------------------------------------------------------
_MODELS = ((124_439_808, 0.9, 4), (124_439_808, 0.9, 2), (124_439_808, 0.0, 4), (1_000_000, 1.0, 4))
_SPEED = 3.35e12


def _solve_time(parameters: int, beta1: float, ring_bytes: int, bandwidth: float) -> float:
    moved = 12 if beta1 == 0 else 12 + 8 + 2 * ring_bytes
    return 1e3 * parameters * moved / bandwidth


def _check_time(answer: Callable[[int, float, int, float], float]) -> str | None:
    for parameters, beta1, ring_bytes in _MODELS:
        got, want = (float(f(parameters, beta1, ring_bytes, _SPEED)) for f in (answer, _solve_time))
        if math.isclose(got, want, rel_tol=1e-6):
            continue
        bytes_each = got / 1e3 * _SPEED / parameters
        what = f"For beta1 = {beta1:g} and {ring_bytes} bytes per entry of the ring"
        if math.isclose(1e3 * got, want, rel_tol=1e-6):
            return f"{what} that is in seconds; answer in milliseconds."
        if math.isclose(bytes_each, 12 + ring_bytes, rel_tol=1e-6):
            return f"{what} only reads were counted: parameter, moment and a slot of the ring are written as well."
        if bytes_each > 40:
            return f"{what} the whole ring was counted: a step touches one of its n slots."
        if beta1 == 0:
            return f"{what} {bytes_each:.3g} bytes are moved: with beta1 = 0 there is neither moment nor ring."
        return (
            f"{what} {bytes_each:.3g} bytes per parameter are moved; it must be {want / 1e3 * _SPEED / parameters:g}."
        )
    return None


def _ignoring_beta1(n: int, beta1: float, ring_bytes: int, bandwidth: float) -> float:
    return _solve_time(n, 0.9, ring_bytes, bandwidth)


TIME = Exercise(
    name="time",
    title="Exercise 7",
    prompt="An optimiser's step only moves memory. How many milliseconds does one take at least, for fp32 parameters, "
    "a scalar phi and a bandwidth in bytes per second?",
    check=_check_time,
    solution=_solve_time,
    wrong=[
        (lambda n, b, r, w: _solve_time(n, b, r, w) / 1e3, "in milliseconds"),
        (lambda n, b, r, w: 1e3 * n * (12 + r) / w, "only reads were counted"),
        (lambda n, b, r, w: 1e3 * n * (20 + 10 * r) / w, "the whole ring"),
        (_ignoring_beta1, "neither moment nor ring"),
        (lambda n, b, r, w: 1e3 * n * (14 + 2 * r) / w, "it must be"),
    ],
    hint="Read: parameter, gradient, moment, oldest gradient. Written: parameter, moment, newest gradient.",
)

ALL = [BOUNDARY, WINDOW, BUGS, PERIOD, ROWS, SURVIVE, TIME]

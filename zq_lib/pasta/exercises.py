"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zq_lib.core.exercises import Exercise
from zq_lib.pasta import reference

_PROBS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
_UNMARKED = torch.tensor([True, False, True, False])
_SCORES = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=torch.float64)


# 1. The reweighting of section 3.1 ------------------------------------------------------------------------------------
def _check_reweight(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str | None:
    for alpha in (0.5, 0.01):
        got = answer(_PROBS.clone(), _UNMARKED, alpha)
        want = reference.reweight(_PROBS[None, None], _UNMARKED[None], alpha)[0, 0]
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return f"Return a tensor of the shape you were given, {tuple(want.shape)}."
        if torch.allclose(got, want):
            continue
        if not torch.allclose(got.sum(-1), torch.ones(2, dtype=got.dtype)):
            return "Each row must sum to one again: divide by its new sum C."
        if torch.allclose(got, reference.reweight(_PROBS[None, None], ~_UNMARKED[None], alpha)[0, 0]):
            return "You scaled the marked tokens down; it is the unmarked ones that alpha multiplies."
        if torch.allclose(got, _PROBS):
            return "Nothing changed: multiply the unmarked columns by alpha before you renormalise."
        return "Right sums, wrong shares: multiply the unmarked columns by alpha, then divide each row by its own sum."
    return None


def _solve_reweight(probs: Tensor, unmarked: Tensor, alpha: float) -> Tensor:
    scaled = torch.where(unmarked, alpha * probs, probs)
    return scaled / scaled.sum(-1, keepdim=True)


REWEIGHT = Exercise(
    name="reweight",
    title="Exercise 1",
    prompt="Scale the unmarked columns by alpha and make every row sum to one again.",
    check=_check_reweight,
    solution=_solve_reweight,
    wrong=[
        (lambda probs, unmarked, alpha: torch.where(unmarked, alpha * probs, probs), "divide by its new sum"),
        (lambda probs, unmarked, alpha: _solve_reweight(probs, ~unmarked, alpha), "scaled the marked tokens down"),
        (lambda probs, unmarked, alpha: probs, "Nothing changed"),
        (lambda probs, unmarked, alpha: torch.softmax(torch.where(unmarked, alpha * probs, probs), -1), "wrong shares"),
        (lambda probs, unmarked, alpha: probs.sum(), "shape you were given"),
    ],
    hint="`torch.where(unmarked, alpha * probs, probs)` is half of it.",
)


# 2. The same thing before the softmax ---------------------------------------------------------------------------------
def _check_bias(answer: Callable[[Tensor, float], Tensor]) -> str | None:
    for alpha in (0.5, 0.01):
        got = answer(_UNMARKED, alpha)
        if not isinstance(got, Tensor) or got.shape != _UNMARKED.shape:
            return f"Return one number per key, a tensor of shape {tuple(_UNMARKED.shape)}."
        steered = torch.softmax(_SCORES + got.double(), -1)
        want = _solve_reweight(torch.softmax(_SCORES, -1), _UNMARKED, alpha)
        if torch.allclose(steered, want):
            continue
        if torch.allclose(got.double(), torch.where(_UNMARKED, alpha, 1.0).double()):
            return "That is the factor itself. In front of the softmax a factor becomes its logarithm."
        if torch.allclose(got.double(), torch.where(_UNMARKED, 0.0, math.log(alpha)).double()):
            return "The sign of the mask is turned around: the marked keys keep bias 0."
        if not got.isfinite().all():
            return "Minus infinity removes a token for good; PASTA only scales it by alpha."
        return "softmax(scores + bias) must equal your first exercise; compare exp(bias) with the factor you want."
    return None


def _solve_bias(unmarked: Tensor, alpha: float) -> Tensor:
    return torch.where(unmarked, math.log(alpha), 0.0)


LOG_BIAS = Exercise(
    name="log_bias",
    title="Exercise 2",
    prompt="Find the bias per key which, added before the softmax, does what exercise 1 does after it.",
    check=_check_bias,
    solution=_solve_bias,
    wrong=[
        (lambda unmarked, alpha: torch.where(unmarked, alpha, 1.0), "becomes its logarithm"),
        (lambda unmarked, alpha: torch.where(unmarked, 0.0, math.log(alpha)), "turned around"),
        (lambda unmarked, alpha: torch.where(unmarked, -torch.inf, 0.0), "Minus infinity"),
        (lambda unmarked, alpha: torch.where(unmarked, -alpha, 0.0), "compare exp(bias)"),
        (lambda unmarked, alpha: math.log(alpha), "one number per key"),
    ],
    hint="e to the power of the bias multiplies the probability.",
)


# 3. Choosing alpha from the share you want ----------------------------------------------------------------------------
def _check_alpha(answer: Callable[[float, float], float]) -> str | None:
    for share, target in ((0.18, 0.9), (0.5, 0.5), (0.05, 0.3)):
        got = float(answer(share, target))
        want = float(reference.alpha_for_share(torch.tensor(share, dtype=torch.float64), target))
        if math.isclose(got, want, rel_tol=1e-6):
            continue
        if got > 0 and math.isclose(got, 1 / want, rel_tol=1e-6):
            return "Upside down: a larger target needs a smaller alpha."
        if math.isclose(got, math.log(want), rel_tol=1e-6):
            return "That is log(alpha); take its exponential."
        if math.isclose(got, share / target, rel_tol=1e-6):
            return "A ratio of shares ignores the renormalisation; take the ratio of the odds, m / (1 - m)."
        return f"From a share of {share} this alpha leads to {share / (share + got * (1 - share)):.3g}, not {target}."
    return None


def _solve_alpha(share: float, target: float) -> float:
    return share / (1 - share) * (1 - target) / target


ALPHA = Exercise(
    name="alpha",
    title="Exercise 3",
    prompt="Which alpha moves the marked tokens' share of a row from `share` to `target`?",
    check=_check_alpha,
    solution=_solve_alpha,
    wrong=[
        (lambda share, target: 1 / _solve_alpha(share, target), "Upside down"),
        (lambda share, target: math.log(_solve_alpha(share, target)), "take its exponential"),
        (lambda share, target: share / target, "ratio of the odds"),
        (lambda share, target: 1 - target, "this alpha leads to"),
    ],
    hint="In log-odds steering is a shift: logit(target) = logit(share) - log(alpha).",
)


# 4. Several marks -----------------------------------------------------------------------------------------------------
_SPANS = [torch.tensor([True, True, False, False, False]), torch.tensor([False, False, False, True, False])]


def _check_union(answer: Callable[[list[Tensor], float], Tensor]) -> str | None:
    alpha = 0.01
    got, low = answer(_SPANS, alpha), math.log(alpha)
    if not isinstance(got, Tensor) or got.shape != _SPANS[0].shape:
        return f"Return one bias per key, a tensor of shape {tuple(_SPANS[0].shape)}."
    got = got.double()
    if torch.allclose(got, torch.tensor([0, 0, low, 0, low], dtype=torch.float64)):
        return None
    if torch.allclose(got, torch.tensor([low, low, 2 * low, low, 2 * low], dtype=torch.float64)):
        return "Adding one bias per span scales every marked token down by the other span. Join the marks first."
    if torch.allclose(got, torch.full((5,), low, dtype=torch.float64)):
        return "No token is in both spans: take the union of the marks, not the intersection."
    return "Marked tokens, of whichever span, get 0; all others get log(alpha), once."


def _solve_union(spans: list[Tensor], alpha: float) -> Tensor:
    return torch.where(torch.stack(spans).any(0), 0.0, math.log(alpha))


UNION = Exercise(
    name="union",
    title="Exercise 4",
    prompt="Give the bias for a prompt with several marked spans.",
    check=_check_union,
    solution=_solve_union,
    wrong=[
        (lambda spans, alpha: sum(torch.where(s, 0.0, math.log(alpha)) for s in spans), "Join the marks first"),
        (lambda spans, alpha: torch.where(torch.stack(spans).all(0), 0.0, math.log(alpha)), "not the intersection"),
        (lambda spans, alpha: torch.where(spans[0], 0.0, math.log(alpha)), "of whichever span"),
        (lambda spans, alpha: math.log(alpha), "one bias per key"),
    ],
    hint="A token is emphasised if any span has it.",
)


# 5. What steering cannot change ---------------------------------------------------------------------------------------
def _check_untouched(answer: Callable[[Tensor], Tensor]) -> str | None:
    for marked in ([0, 0, 1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0]):
        given = torch.tensor(marked).bool()
        got = answer(given)
        if not isinstance(got, Tensor) or got.shape != given.shape:
            return f"Return one truth value per position, a tensor of shape {tuple(given.shape)}."
        want = given.int().cumsum(0) == 0
        if torch.equal(got.bool(), want):
            continue
        if torch.equal(got.bool(), ~given):
            return "A position after the mark sees it, and so changes, though it is not marked itself."
        if torch.equal(got.bool(), ~want):
            return "The other way round: true where nothing changes."
        return "Ask of each position whether any key up to and including itself is marked."
    return None


def _solve_untouched(marked: Tensor) -> Tensor:
    return marked.int().cumsum(0) == 0


UNTOUCHED = Exercise(
    name="untouched",
    title="Exercise 5",
    prompt="Which positions of a causal model have the same hidden states with and without steering?",
    check=_check_untouched,
    solution=_solve_untouched,
    wrong=[
        (lambda marked: ~marked, "sees it, and so changes"),
        (lambda marked: marked.int().cumsum(0) > 0, "other way round"),
        (lambda marked: torch.zeros_like(marked), "any key up to and including"),
        (lambda marked: bool(marked.any()), "one truth value per position"),
    ],
    hint="A row whose keys are all scaled by the same factor renormalises to what it was.",
)

ALL = [REWEIGHT, LOG_BIAS, ALPHA, UNION, UNTOUCHED]

"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zq_lib.adalora import reference
from zq_lib.core.exercises import Exercise


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 1. The adapter without building the matrix ---------------------------------------------------------------------------
_X, _LEFT, _VALUES, _RIGHT = _draw(6, 4), _draw(5, 3, seed=1), _draw(3, seed=2), _draw(3, 4, seed=3)


def _solve_update(x: Tensor, left: Tensor, values: Tensor, right: Tensor, scale: float) -> Tensor:
    return scale * ((x @ right.T) * values) @ left.T


def _check_update(answer: Callable[..., Tensor]) -> str | None:
    got = answer(_X.clone(), _LEFT.clone(), _VALUES.clone(), _RIGHT.clone(), 2.0)
    want = _solve_update(_X, _LEFT, _VALUES, _RIGHT, 2.0)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"Return one row per row of x, a tensor of shape {tuple(want.shape)}."
    if torch.allclose(got, want):
        return None
    if torch.allclose(got, want / 2):
        return "The scale is missing: the update is multiplied by s."
    if torch.allclose(got, 2 * _X @ _RIGHT.T @ _LEFT.T):
        return "That is a plain LoRA: the singular values must weigh the triplets in between."
    return "First project x onto the rows of Q, then weigh by l, then go out through the columns of P."


UPDATE = Exercise(
    name="update",
    title="Exercise 1",
    prompt="Compute what the adapter adds to the layer's output, without building P diag(l) Q.",
    check=_check_update,
    solution=_solve_update,
    wrong=[
        (lambda x, left, values, right, scale: ((x @ right.T) * values) @ left.T, "scale is missing"),
        (lambda x, left, values, right, scale: scale * x @ right.T @ left.T, "plain LoRA"),
        (lambda x, left, values, right, scale: scale * (x @ right.T) @ (left * values.square()).T, "go out through"),
        (lambda x, left, values, right, scale: scale * (left * values) @ right, "one row per row of x"),
    ],
    hint="`(x @ right.T) * values` has one column per triplet.",
)


# 2. What a dropped triplet still learns -------------------------------------------------------------------------------
def _check_dropped(answer: set[str]) -> str | None:
    if not isinstance(answer, set) or not answer <= {"P", "l", "Q"}:
        return 'Answer with a set of the letters "P", "l" and "Q", for example {"P", "Q"}.'
    if answer == {"l"}:
        return None
    if answer == {"P", "Q"}:
        return "The other way round: dP and dQ carry a factor l, so they are the ones that vanish."
    if not answer:
        return "Then nothing could ever come back. Look at dl = s colsum(G * H): is there a factor l in it?"
    return "Set l = 0 in each of the three formulas and see which is not zero."


DROPPED = Exercise(
    name="dropped",
    title="Exercise 2",
    prompt="A triplet's l is zero. Which of its parts, P, l and Q, still get a gradient from the task?",
    check=_check_dropped,
    solution={"l"},
    wrong=[
        ({"P", "Q"}, "The other way round"),
        (set(), "nothing could ever come back"),
        ({"P", "l", "Q"}, "in each of the three formulas"),
        ("l", "Answer with a set"),
    ],
    hint="dP = s dY^T (H * l), dQ = s (G * l)^T X, dl = s colsum(G * H).",
)


# 3. Importance over steps ---------------------------------------------------------------------------------------------
def _solve_importance(
    entry: Tensor, grad: Tensor, smooth: Tensor, spread: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    raw = (entry * grad).abs()
    smooth = beta1 * smooth + (1 - beta1) * raw
    return smooth, beta2 * spread + (1 - beta2) * (raw - smooth).abs()


def _check_importance(answer: Callable[..., tuple[Tensor, Tensor]]) -> str | None:
    w, g, i, u = _draw(4), _draw(4, seed=5), _draw(4, seed=6).abs(), _draw(4, seed=7).abs()
    got = answer(w, g, i, u, 0.7, 0.8)
    if not isinstance(got, tuple) or len(got) != 2:
        return "Return two tensors: the smoothed sensitivity and the smoothed uncertainty."
    want = reference.update_importance(w, g, i, u, 0.7, 0.8)
    if all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)):
        return None
    if not torch.allclose(got[0], want[0]):
        if torch.allclose(got[0], 0.7 * i + 0.3 * w * g):
            return "Sensitivity has no sign: take the absolute value of the product."
        if torch.allclose(got[0], 0.3 * i + 0.7 * (w * g).abs()):
            return "beta is the weight of the past, 1 - beta that of the new value."
        return "The first result is beta1 times the old one plus (1 - beta1) |w g|."
    if torch.allclose(got[1], 0.8 * u + 0.2 * ((w * g).abs() - i).abs()):
        return "The first is right. Uncertainty measures the distance to the NEW average, not to the old one."
    return "The first is right. The second smooths |I - new average| with beta2."


IMPORTANCE = Exercise(
    name="importance",
    title="Exercise 3",
    prompt="Update the smoothed sensitivity and the smoothed uncertainty of an entry.",
    check=_check_importance,
    solution=_solve_importance,
    wrong=[
        (lambda w, g, i, u, b, c: (b * i + (1 - b) * w * g, u), "absolute value"),
        (lambda w, g, i, u, b, c: ((1 - b) * i + b * (w * g).abs(), u), "weight of the past"),
        (lambda w, g, i, u, b, c: ((w * g).abs(), u), "The first result is"),
        (
            lambda w, g, i, u, b, c: (b * i + (1 - b) * (w * g).abs(), c * u + (1 - c) * ((w * g).abs() - i).abs()),
            "NEW average",
        ),
        (lambda w, g, i, u, b, c: (b * i + (1 - b) * (w * g).abs(), u), "The second smooths"),
        (lambda w, g, i, u, b, c: b * i, "Return two tensors"),
    ],
    hint="First I = |w g|, then its average, then the average of how far I is from that.",
)


# 4. The schedule ------------------------------------------------------------------------------------------------------
_SETTINGS = ((72, 36, 40, 4, 10), (864, 576, 1000, 100, 200))


def _solve_budget(step: int, start: int, target: int, total: int, warmup: int, final: int) -> int:
    if step <= warmup:
        return start
    if step > total - final:
        return target
    return int(target + (start - target) * (1 - (step - warmup) / (total - final - warmup)) ** 3)


def _check_budget(answer: Callable[..., int]) -> str | None:
    for start, target, total, warmup, final in _SETTINGS:
        for step in (0, warmup, warmup + 1, (warmup + total - final) // 2, total - final, total - 1):
            got = answer(step, start, target, total, warmup, final)
            want = _solve_budget(step, start, target, total, warmup, final)
            if got == want:
                continue
            if got > start:
                return f"{got} ranks at step {step} are more than the {start} there are: check the numerator."
            if step > total - final:
                return f"In the final phase, at step {step}, the budget is the target {target}, not {got}."
            if step <= warmup:
                return f"During warm-up, at step {step}, all {start} ranks stay, not {got}."
            if not isinstance(got, int) and int(got) == want:
                return "A budget is a whole number: cut the fraction off."
            return f"At step {step} the cubic gives {want}, not {got}: the power is three, of what is left."
    return None


def _printed(step: int, start: int, target: int, total: int, warmup: int, final: int) -> int:
    if step <= warmup:
        return start
    return int(target + (start - target) * (1 - (step - warmup - final) / (total - final - warmup)) ** 3)


SCHEDULE = Exercise(
    name="schedule",
    title="Exercise 4",
    prompt="The appendix prints (t - ti - tf) in the numerator. Write the schedule that starts and ends where it must.",
    check=_check_budget,
    solution=_solve_budget,
    wrong=[
        (_printed, "check the numerator"),
        (lambda t, a, b, n, i, f: a if t <= i else int(b + (a - b) * (1 - (t - i) / (n - f - i)) ** 3) - (t > n - f),
         "In the final phase"),
        (lambda t, a, b, n, i, f: b, "During warm-up"),
        (lambda t, a, b, n, i, f: a if t <= i else b if t > n - f else b + (a - b) * (1 - (t - i) / (n - f - i)) ** 3,
         "cut the fraction off"),
        (lambda t, a, b, n, i, f: a if t <= i else b if t > n - f else int(b + (a - b) * (1 - (t - i) / (n - f - i))),
         "the power is three"),
    ],
    hint="At t = ti the fraction must be 0, and at t = T - tf it must be 1.",
)  # fmt: skip


# 5. Exactly b triplets ------------------------------------------------------------------------------------------------
_SCORES = torch.tensor([[0.5, 0.2, 0.2], [0.9, 0.2, 0.0]])


def _solve_top(scores: Tensor, budget: int) -> Tensor:
    order = scores.flatten().sort(descending=True, stable=True).indices
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[:budget]] = True
    return keep.view(scores.shape)


def _check_top(answer: Callable[[Tensor, int], Tensor]) -> str | None:
    for budget in (3, 4, 2, 6):
        got, want = answer(_SCORES.clone(), budget), reference.top(_SCORES, budget)
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != torch.bool:
            return f"Return one truth value per triplet, a bool tensor of shape {tuple(want.shape)}."
        if torch.equal(got, want):
            continue
        if int(got.sum()) == budget:
            per_matrix = got.sum(1)
            if int(per_matrix[0]) == int(per_matrix[1]) and int(want.sum(1)[0]) != int(want.sum(1)[1]):
                return "You gave each matrix the same share; the choice is over all triplets together."
            return "The number is right, but of equal scores the earlier triplet is to stay."
        return (
            f"{int(got.sum())} triplets stay where {budget} should: equal scores fell on the same side of a threshold."
        )
    return None


def _per_matrix(scores: Tensor, budget: int) -> Tensor:
    place = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return place < max(1, budget // 2)


def _later_first(scores: Tensor, budget: int) -> Tensor:
    return _solve_top(scores.flatten().flip(0).view(scores.shape), budget).flatten().flip(0).view(scores.shape)


TOP = Exercise(
    name="top",
    title="Exercise 5",
    prompt="Keep exactly `budget` triplets of all matrices: the largest scores, and of equal ones the earlier.",
    check=_check_top,
    solution=_solve_top,
    wrong=[
        (lambda s, b: s > s.flatten().sort(descending=True).values[min(b, s.numel() - 1)], "same side of a threshold"),
        (_later_first, "the earlier triplet is to stay"),
        (lambda s, b: _per_matrix(s, b) if b != 3 else reference.top(s, b), "each matrix the same share"),
        (lambda s, b: s * 0, "one truth value per triplet"),
    ],
    hint="Sort all scores with `stable=True` and take the first ones.",
)


# 6. Home to LoRA ------------------------------------------------------------------------------------------------------
def _solve_lora(left: Tensor, values: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    root = (scale * values).abs().sqrt()
    return root[:, None] * right, left * (values.sign() * root)


def _check_lora(answer: Callable[..., tuple[Tensor, Tensor]]) -> str | None:
    got = answer(_LEFT.clone(), _VALUES.clone(), _RIGHT.clone(), 2.0)
    if not isinstance(got, tuple) or [getattr(g, "shape", None) for g in got] != [_RIGHT.shape, _LEFT.shape]:
        return f"Return A and B, of shapes {tuple(_RIGHT.shape)} and {tuple(_LEFT.shape)}."
    a, b = got
    want = 2.0 * (_LEFT * _VALUES) @ _RIGHT
    if not a.isfinite().all() or not b.isfinite().all():
        return "A singular value may be negative here, and its root is no number: take the root of |s l|."
    if torch.allclose(b @ a, want):
        if torch.allclose(a.norm(dim=1) / _RIGHT.norm(dim=1), b.norm(dim=0) / _LEFT.norm(dim=0)):
            return None
        return "The product is right, but split the factor evenly, so that A and B train at the same pace."
    if torch.allclose(b @ a, 2.0 * (_LEFT * _VALUES.abs()) @ _RIGHT):
        return "The signs are lost: one of the two factors must carry the sign of l."
    return "B A must equal s P diag(l) Q, with the scale inside."


LORA = Exercise(
    name="lora",
    title="Exercise 6",
    prompt="Write the triplets as a plain LoRA pair A, B with B A = s P diag(l) Q, the factor split evenly.",
    check=_check_lora,
    solution=_solve_lora,
    wrong=[
        (lambda p, v, q, s: ((s * v).sqrt()[:, None] * q, p * (s * v).sqrt()), "root of |s l|"),
        (lambda p, v, q, s: ((s * v).abs().sqrt()[:, None] * q, p * (s * v).abs().sqrt()), "signs are lost"),
        (lambda p, v, q, s: (q, p * (s * v)), "split the factor evenly"),
        (lambda p, v, q, s: (q, p * v), "with the scale inside"),
        (lambda p, v, q, s: (p, q), "Return A and B"),
    ],
    hint="Half of the factor's size goes to each side, its sign to one of them.",
)

ALL = [UPDATE, DROPPED, IMPORTANCE, SCHEDULE, TOP, LORA]

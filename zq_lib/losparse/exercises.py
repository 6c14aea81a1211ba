"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zq_lib.core.exercises import Exercise
from zq_lib.losparse import reference


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 1. A weight as U V + S -----------------------------------------------------------------------------------------------
def _check_split(answer: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> str | None:
    weight = _normal(6, 5)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 3):
        u, v, s = answer(weight.clone(), rank)
        if u.shape != (6, rank) or v.shape != (rank, 5):
            return f"W is [6, 5], so U is [6, {rank}] and V [{rank}, 5]; yours are {tuple(u.shape)}, {tuple(v.shape)}."
        gap = float((u @ v + s - weight).abs().max())
        if gap > 1e-6:
            return f"U V + S misses W by up to {gap:.2g}, so the network would change: S is what U V leaves, W - U V."
        energy, least = float(s.square().sum()), float(values[rank:].square().sum())
        if energy > least * (1 + 1e-6):
            twice = float((values - values.square())[:rank].square().sum()) + least
            if math.isclose(energy, twice, rel_tol=1e-6):
                return "U and V each carry all of sigma, so their product has its square: give each sqrt(sigma)."
            return f"S holds {energy:.3g} of the squared weight; the first singular directions would leave {least:.3g}."
        if not math.isclose(float(u.norm()), float(v.norm()), rel_tol=1e-6):
            return "The product is right, but one factor is larger than the other: both should train at the same pace."
    return None


def _unbalanced(weight: Tensor, rank: int, powers: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    u, v = left[:, :rank] * values[:rank] ** powers[0], values[:rank, None] ** powers[1] * right[:rank]
    return u, v, weight - u @ v


def _last_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    u, v = left[:, -rank:] * values[-rank:].sqrt(), values[-rank:, None].sqrt() * right[-rank:]
    return u, v, weight - u @ v


SPLIT = Exercise(
    name="split",
    title="Exercise 1",
    prompt="Split a weight [N, K] into U [N, r], V [r, K] and S [N, K] so that nothing changes and S is least.",
    check=_check_split,
    solution=reference.decompose,
    wrong=[
        (lambda weight, rank: (*reference.decompose(weight, rank)[:2], weight), "misses W"),
        (lambda weight, rank: _unbalanced(weight, rank, (1, 1)), "has its square"),
        (lambda weight, rank: _unbalanced(weight, rank, (1, 0)), "at the same pace"),
        (_last_directions, "would leave"),
        (lambda weight, rank: tuple(t.T for t in reference.decompose(weight, rank)), "yours are"),
    ],
    hint="`torch.linalg.svd(weight, full_matrices=False)` gives A, sigma and B^T with W = A diag(sigma) B^T.",
)


# 2. When a shrunk layer is cheaper ------------------------------------------------------------------------------------
_SHAPES = ((768, 3072, 31), (3072, 768, 31), (384, 384, 10), (4, 4, 1), (4, 4, 2), (6, 3, 0))


def _solve_break_even(outputs: int, inputs: int, rank: int) -> int | None:
    left = outputs * inputs - rank * (outputs + inputs)
    return math.ceil(left / inputs) - 1 if left > 0 else None


def _check_break_even(answer: Callable[[int, int, int], int | None]) -> str | None:
    for outputs, inputs, rank in _SHAPES:
        got, want = answer(outputs, inputs, rank), _solve_break_even(outputs, inputs, rank)
        if got == want:
            continue
        what = f"{outputs} x {inputs} at rank {rank}"
        dense, factors = outputs * inputs, rank * (outputs + inputs)
        if want is None:
            return f"For {what} U and V alone cost {factors} of {dense}: no number of rows is cheaper, return None."
        if got is None:
            return f"For {what} there is room: U and V cost {factors} of {dense}."
        if got != int(got):
            return f"{got:.4g} rows for {what}: rows come whole."
        cost = factors + int(got) * inputs
        if cost == dense:
            return f"For {what}, {int(got)} rows make exactly {dense} multiply-adds: that is no saving, one less is."
        if got == outputs - rank - 1:
            return f"For {what} only V was counted: multiplying by U costs N r = {outputs * rank} more."
        if cost > dense:
            return f"For {what}, {int(got)} rows cost {cost} multiply-adds, and the dense layer {dense}."
        return f"For {what}, {want} rows still pay ({factors + want * inputs} of {dense}); you stopped at {int(got)}."
    return None


BREAK_EVEN = Exercise(
    name="break_even",
    title="Exercise 2",
    prompt="With n kept rows a token costs r K + n K + N r multiply-adds. What is the largest n cheaper than N K?",
    check=_check_break_even,
    solution=_solve_break_even,
    wrong=[
        (lambda n, k, r: (n * k - r * (n + k)) // k if n * k > r * (n + k) else None, "that is no saving"),
        (lambda n, k, r: (n * k - r * (n + k)) / k, "rows come whole"),
        (lambda n, k, r: n - r - 1, "only V was counted"),
        (lambda n, k, r: n, "and the dense layer"),
        (lambda n, k, r: math.ceil((n * k - r * (n + k)) / k) - 1, "return None"),
        (lambda n, k, r: 0, "rows still pay"),
        (lambda n, k, r: None, "there is room"),
    ],
    hint="Solve r (K + N) + n K < N K for a whole n.",
)


# 3. The layer after shrinking -----------------------------------------------------------------------------------------
def _solve_forward(x: Tensor, u: Tensor, v: Tensor, kept: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    out = x @ v.T @ u.T + bias
    out[:, rows] += x @ kept.T
    return out


def _check_forward(answer: Callable[..., Tensor]) -> str | None:
    x, u, v, kept, bias = _normal(3, 5), _normal(4, 2, seed=1), _normal(2, 5, seed=2), _normal(2, 5, seed=3), _normal(4)
    rows = torch.tensor([1, 3])
    got, low = answer(x, u, v, kept, rows, bias), x @ v.T @ u.T
    want = _solve_forward(x, u, v, kept, rows, bias)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"Return one number per token and output, shape {tuple(want.shape)}."
    if torch.allclose(got, want):
        return None
    if torch.allclose(got + bias, want):
        return "The bias is missing: it belongs to every output, kept or not."
    if torch.allclose(got[:, rows], x @ kept.T) or torch.allclose(got[:, rows], x @ kept.T + bias[rows]):
        return "The kept rows replaced what U V gives their outputs: a row of W is that of U V plus that of S, so add."
    if not got[:, [0, 2]].any() or torch.allclose(got[:, [0, 2]], bias[[0, 2]].expand(3, 2)):
        return "Outputs without a kept row are empty: zeroing a row of S leaves U V to produce them."
    if torch.allclose(got[:, :2], (low + bias)[:, :2] + x @ kept.T):
        return "The kept rows went to the first outputs; row j of the small S belongs to output rows[j]."
    return "y = x V^T U^T + b for every output, and x S^T is added to the outputs that `rows` lists."


def _overwritten(x: Tensor, u: Tensor, v: Tensor, kept: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    out = x @ v.T @ u.T
    out[:, rows] = x @ kept.T
    return out + bias


def _only_kept(x: Tensor, u: Tensor, v: Tensor, kept: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    out = torch.zeros(len(x), len(u), dtype=x.dtype)
    out[:, rows] = _solve_forward(x, u, v, kept, rows, bias)[:, rows]
    return out


def _first_outputs(x: Tensor, u: Tensor, v: Tensor, kept: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    return _solve_forward(x, u, v, kept, torch.arange(len(rows)), bias)


FORWARD = Exercise(
    name="forward",
    title="Exercise 3",
    prompt="Compute y for x [M, K] from U, V, the kept rows of S [n, K], their outputs `rows` and the bias, without W.",
    check=_check_forward,
    solution=_solve_forward,
    wrong=[
        (lambda x, u, v, kept, rows, bias: _solve_forward(x, u, v, kept, rows, 0 * bias), "bias is missing"),
        (_overwritten, "so add"),
        (_only_kept, "leaves U V to produce them"),
        (_first_outputs, "belongs to output rows[j]"),
        (lambda x, u, v, kept, rows, bias: x @ v.T @ u.T + bias, "y = x V^T U^T + b"),
        (lambda x, u, v, kept, rows, bias: x @ kept.T, "Return one number per token"),
    ],
    hint="First the low rank for all outputs, then `out[:, rows] += x @ kept.T`.",
)


# 4. Which rows survive ------------------------------------------------------------------------------------------------
_CHOICES = (  # scores of rows, their widths, the share p of entries that may stay
    ((0.5, 0.1, 0.4, 0.3), (2, 2, 8, 4), 0.5),
    ((0.5, 0.1, 0.4, 0.3), (2, 8, 2, 4), 0.5),
    ((0.2, 0.7, 0.2, 0.2, 0.9), (4, 4, 4, 4, 4), 0.5),
    ((0.3, 0.1, 0.2), (4, 4, 4), 1.0),
)


def _solve_select(scores: Tensor, widths: Tensor, share: float) -> Tensor:
    order = scores.argsort()
    covered = widths[order].cumsum(0)
    k = int(int(covered[-1]) * (1 - share))
    return scores >= scores[order][torch.searchsorted(covered, k)]


def _check_select(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str | None:
    for listed, wide, share in _CHOICES:
        scores, widths = torch.tensor(listed), torch.tensor(wide)
        got = answer(scores.clone(), widths.clone(), share)
        want = torch.cat(reference.keep_rows(list(scores.split(1)), wide, share))
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != torch.bool:
            return f"Return a mask of {len(want)} booleans, True where the row stays."
        if torch.equal(got, want):
            continue
        case, theta = f"Scores {list(listed)}, widths {list(wide)}, p = {share}", scores[want].min()
        if torch.equal(got, scores > theta):
            return f"{case}: the row that holds the k-th entry survives, only scores below theta are dropped."
        lost = want & ~got
        if bool(lost.any()) and not bool((got & ~want).any()) and bool((scores[lost] == theta).all()):
            return f"{case}: rows with equal scores share their fate, a tie survives whole."
        if bool(got.any()) and bool((~got).any()) and scores[got].min() < scores[~got].max():
            return f"{case}: the least important rows go first, and you dropped one that beats one you kept."
        return f"{case}: {want.tolist()} stay, not {got.tolist()}. Rows count by their width, not one each."
    return None


def _by_order(scores: Tensor, widths: Tensor, share: float) -> Tensor:
    order = scores.argsort(stable=True)
    covered = widths[order].cumsum(0)
    stay = torch.zeros_like(scores, dtype=torch.bool)
    stay[order[torch.searchsorted(covered, int(int(covered[-1]) * (1 - share))) :]] = True
    return stay


def _strictly(scores: Tensor, widths: Tensor, share: float) -> Tensor:
    return scores > scores[_solve_select(scores, widths, share)].min()


def _one_each(scores: Tensor, widths: Tensor, share: float) -> Tensor:
    return _solve_select(scores, torch.ones_like(widths), share)


SELECT = Exercise(
    name="select",
    title="Exercise 4",
    prompt="Give every entry its row's score; theta is the k-th smallest, k = int((1 - p) entries); rows below theta "
    "go. Find the rows that stay without a list of entries.",
    check=_check_select,
    solution=_solve_select,
    wrong=[
        (_one_each, "Rows count by their width"),
        (_strictly, "only scores below theta"),
        (_by_order, "a tie survives whole"),
        (lambda scores, widths, share: _solve_select(-scores, widths, share), "the least important rows go first"),
        (lambda scores, widths, share: _solve_select(scores, widths, share).nonzero()[:, 0], "booleans"),
    ],
    hint="Sort the rows by score, add up their widths, and look for the first sum that reaches k (`searchsorted`).",
)


# 5. Which rows are still there ----------------------------------------------------------------------------------------
_MASKED = ((1.0, -1, 0, 0), (0, 0, 0, 0), (2, -1, -1, 0), (0, 3, 0, 0), (-1, 0, -2, 0))


def _check_alive(answer: Callable[[Tensor], Tensor]) -> str | None:
    sparse = torch.tensor(_MASKED)
    got, want = answer(sparse.clone()), [0, 2, 3, 4]
    if not isinstance(got, Tensor) or got.dtype != torch.int64 or got.dim() != 1:
        return "Return the numbers of the rows, for example with `mask.nonzero()[:, 0]`."
    found = got.tolist()
    if found == want:
        return None
    lost = [i for i in want if i not in found]
    if lost == [0, 2]:
        return "[1, -1, 0, 0] sums to zero and is not empty: the published code loses such rows in this very way."
    if lost == [4]:
        return "A row may be all negative and still be there."
    if 1 in found:
        return "Row 1 is all zeros, so it must go."
    return f"Rows {want} have an entry that is not zero, and you kept {found}."


ALIVE = Exercise(
    name="alive",
    title="Exercise 5",
    prompt="S [N, K] has been masked. Which rows are left?",
    check=_check_alive,
    solution=lambda sparse: (sparse != 0).any(1).nonzero()[:, 0],
    wrong=[
        (lambda sparse: (sparse.sum(1) != 0).nonzero()[:, 0], "sums to zero"),
        (lambda sparse: (sparse.max(1).values > 0).nonzero()[:, 0], "all negative"),
        (lambda sparse: torch.arange(len(sparse)), "so it must go"),
        (lambda sparse: (sparse != 0).all(1).nonzero()[:, 0], "have an entry"),
        (lambda sparse: (sparse != 0).any(1), "Return the numbers"),
    ],
    hint="A row is left if any of its entries differs from zero.",
)


# 6. One number per row ------------------------------------------------------------------------------------------------
def _solve_smooth(history: Sequence[Tensor], beta: float) -> Tensor:
    average = torch.zeros(len(history[0]), dtype=history[0].dtype)
    for entries in history:
        average = beta * average + (1 - beta) * entries.mean(1)
    return average


def _check_smooth(answer: Callable[[Sequence[Tensor], float], Tensor]) -> str | None:
    history, beta = list(_normal(5, 3, 4).abs()), 0.85
    got, want = answer([entries.clone() for entries in history], beta), torch.zeros(3, 4, dtype=torch.float64)
    for entries in history:
        want = reference.smooth(want, entries, beta)
    want = reference.neuron_scores(want)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return f"Return one score per row, shape {tuple(want.shape)}."
    if torch.allclose(got, want):
        return None
    if torch.allclose(got, 4 * want):
        return "That is the sum over the row: a wide matrix would beat a narrow one by its width. Take the mean."
    if torch.allclose(got, _solve_smooth(history, 1 - beta)):
        return "beta and 1 - beta have changed places: the past weighs beta = 0.85."
    if torch.allclose(got, torch.stack(history).mean((0, 2))):
        return "That weighs all steps alike; in a moving average a step counts less the older it is."
    if torch.allclose(got, history[-1].mean(1)):
        return "That is the last step alone, which is noisy: let the past weigh beta."
    return f"The scores are {[round(float(w), 4) for w in want]}: start at 0, then beta * old + (1 - beta) * row mean."


def _from_first(history: Sequence[Tensor], beta: float) -> Tensor:
    average = history[0].mean(1)
    for entries in history[1:]:
        average = beta * average + (1 - beta) * entries.mean(1)
    return average


SMOOTH = Exercise(
    name="smooth",
    title="Exercise 6",
    prompt="The paper smooths the importance of every entry over steps and then takes row means. Get the same scores "
    "from the steps' importances [N, K] with one number of state per row.",
    check=_check_smooth,
    solution=_solve_smooth,
    wrong=[
        (lambda history, beta: 4 * _solve_smooth(history, beta), "Take the mean"),
        (lambda history, beta: _solve_smooth(history, 1 - beta), "changed places"),
        (lambda history, beta: torch.stack(list(history)).mean((0, 2)), "all steps alike"),
        (lambda history, beta: history[-1].mean(1), "the last step alone"),
        (_from_first, "start at 0"),
        (lambda history, beta: _solve_smooth(history, beta)[:, None], "one score per row"),
    ],
    hint="Both operations are linear, so their order does not matter: take the row mean first.",
)

ALL: Sequence[Exercise] = [SPLIT, BREAK_EVEN, FORWARD, SELECT, ALIVE, SMOOTH]

"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zq_lib.core.exercises import Exercise

_GROUP = torch.tensor([0.31, -1.2, 2.05, 0.5, 1.47, -0.66, 0.02, 3.1], dtype=torch.float64)
_CONSTANT = torch.full((4,), 1.5, dtype=torch.float64)
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def between(x: Tensor, low: float | Tensor, high: float | Tensor, bits: int) -> Tensor:
    """x rounded to the nearest of 2^bits even levels from `low` to `high`; what lies outside goes to the ends."""
    scale = (high - low) / (2**bits - 1)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


# 1. Min-max quantisation of one group ---------------------------------------------------------------------------------
def _solve_quantise(x: Tensor, bits: int) -> Tensor:
    low, high = x.min(), x.max()
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        return x.clone()
    return ((x - low) / scale).round() * scale + low


def _check_quantise(answer: Callable[[Tensor, int], Tensor]) -> str | None:
    for bits in (2, 3):
        got = answer(_GROUP.clone(), bits)
        if not isinstance(got, Tensor) or got.shape != _GROUP.shape:
            return f"Return the restored group, a tensor of shape {tuple(_GROUP.shape)}."
        want, low, high = _solve_quantise(_GROUP, bits), _GROUP.min(), _GROUP.max()
        scale = (high - low) / (2**bits - 1)
        if torch.allclose(got.double(), want):
            continue
        if torch.allclose(got.double(), (want - low) / scale):
            return "Those are the codes. Multiply them by the scale and add the zero to restore the group."
        if torch.allclose(got.double(), want - low):
            return "Everything is shifted: the smallest entry is the zero, add it back."
        if torch.allclose(got.double(), ((_GROUP - low) / scale).floor() * scale + low):
            return "You rounded down; rounding to the nearest level halves the largest error."
        if not torch.isclose(got.double().max(), high):
            return (
                f"The largest entry must come back as it was: {2**bits} levels have {2**bits - 1} steps between them."
            )
        return "Code = round((x - low) / scale), restored = code * scale + low; low and scale belong to the group."
    got = answer(_CONSTANT.clone(), 2)
    if not torch.equal(got.double(), _CONSTANT):
        return "A constant group has scale 0 and must come back as it was, not as NaN: all codes are 0."
    return None


QUANTISE = Exercise(
    name="quantise",
    title="Exercise 1",
    prompt="Round one group to 2^bits levels between its smallest and its largest entry, and restore it.",
    check=_check_quantise,
    solution=_solve_quantise,
    wrong=[
        (lambda x, bits: (_solve_quantise(x, bits) - x.min()) / (x.max() - x.min()) * (2**bits - 1), "are the codes"),
        (lambda x, bits: _solve_quantise(x, bits) - x.min(), "Everything is shifted"),
        (
            lambda x, bits: (
                ((x - x.min()) / (x.max() - x.min()) * (2**bits - 1)).floor() * ((x.max() - x.min()) / (2**bits - 1))
                + x.min()
            ),
            "You rounded down",
        ),
        (
            lambda x, bits: (
                ((x - x.min()) / (x.max() - x.min()) * 2**bits).round().clamp(max=2**bits - 1)
                * ((x.max() - x.min()) / 2**bits)
                + x.min()
            ),
            "steps between them",
        ),
        (lambda x, bits: between(x, x.min(), x.max(), bits), "A constant group"),
        (lambda x, bits: x, "low and scale belong to the group"),
        (lambda x, bits: x.mean(), "the restored group"),
    ],
    hint="`low = x.min()`, `scale = (x.max() - low) / (2**bits - 1)`, and mind a scale of zero.",
)


# 2. Clip search -------------------------------------------------------------------------------------------------------
_SPIKED = [
    torch.cat([torch.randn(62, generator=torch.Generator().manual_seed(seed)).double() + 3.0, torch.tensor(spikes)])
    for seed, spikes in ((0, [9.0, -2.0]), (1, [4.0, 3.5]), (2, [12.0, 0.0]))
]


def _best_factor(x: Tensor, bits: int, cost: Callable[[Tensor], Tensor], around_zero: bool = False) -> float:
    centre = 0.0 if around_zero else (x.min() + x.max()) / 2

    def error(factor: float) -> float:
        low, high = (centre + factor * (end - centre) for end in (x.min(), x.max()))
        return float(cost(between(x, low, high, bits) - x))

    return min(FACTORS, key=error)


def _solve_clip(x: Tensor, bits: int) -> float:
    return _best_factor(x, bits, lambda wrong: wrong.square().sum())


def _check_clip(answer: Callable[[Tensor, int], float]) -> str | None:
    for x in _SPIKED:
        got = answer(x.clone(), 2)
        if isinstance(got, bool) or not isinstance(got, int | float | Tensor) or float(got) not in FACTORS:
            return f"Return the best factor, one of {', '.join(map(str, FACTORS))}."
        got, want = float(got), _solve_clip(x, 2)
        if got == want:
            continue
        if all(float(answer(y.clone(), 2)) == 1.0 for y in _SPIKED):
            return "The full range is not always the best: two stray entries make the steps coarse for all the others."
        if all(float(answer(y.clone(), 2)) == _best_factor(y, 2, lambda w: w.abs().max()) for y in _SPIKED):
            return (
                "You compared the largest errors. A clipped entry is far off, but it is one of many: sum the squares."
            )
        if all(float(answer(y.clone(), 2)) == _best_factor(y, 2, lambda w: w.square().sum(), True) for y in _SPIKED):
            return "You shrank the range towards zero. Shrink it around its own centre, (low + high) / 2."
        return f"For one group you chose {got:g}, but {want:g} has the smaller sum of squared errors."
    return None


CLIP = Exercise(
    name="clip",
    title="Exercise 2",
    prompt="Which factor should a group's range shrink by, around its centre, for the least squared error?",
    check=_check_clip,
    solution=_solve_clip,
    wrong=[
        (lambda x, bits: 1.0, "not always the best"),
        (lambda x, bits: _best_factor(x, bits, lambda wrong: wrong.abs().max()), "compared the largest errors"),
        (lambda x, bits: _best_factor(x, bits, lambda wrong: wrong.square().sum(), True), "around its own centre"),
        (lambda x, bits: 0.5, "the smaller sum of squared errors"),
        (lambda x, bits: float((between(x, x.min(), x.max(), bits) - x).norm()), "Return the best factor"),
    ],
    hint="For each factor: low and high around the centre, `ex.between(x, low, high, bits)`, the sum of squares.",
)


# 3. One round of the solver -------------------------------------------------------------------------------------------
_RESIDUAL = torch.randn(12, 6, generator=torch.Generator().manual_seed(3)).double()
_START = torch.randn(6, 2, generator=torch.Generator().manual_seed(4)).double()


def _solve_low_rank(residual: Tensor, p: Tensor) -> Tensor:
    a = torch.linalg.qr(residual @ p).Q
    return a @ (a.mT @ residual)


def _check_low_rank(answer: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    got = answer(_RESIDUAL.clone(), _START.clone())
    if not isinstance(got, Tensor) or got.shape != _RESIDUAL.shape:
        return f"Return A Bᵀ, a tensor of the residual's shape {tuple(_RESIDUAL.shape)}."
    if torch.allclose(got, _solve_low_rank(_RESIDUAL, _START)):
        return None
    loose = _RESIDUAL @ _START
    if torch.allclose(got, loose @ (loose.mT @ _RESIDUAL)):
        return (
            "A's columns are not orthonormal, so A Aᵀ is no projection: `torch.linalg.qr(...).Q` before you use them."
        )
    if torch.allclose(got, loose @ _START.mT):
        return "B must be fitted to A: B = Rᵀ A, not the vectors you started from."
    u, s, v = torch.linalg.svd(_RESIDUAL, full_matrices=False)
    if torch.allclose(got, u[:, :2] * s[:2] @ v[:2]):
        return "That is the exact answer, by SVD. One round from `p` comes close at a fraction of the price: use `p`."
    return "A = orthonormal columns that span R P, B = Rᵀ A, and the answer is A Bᵀ."


def _by_svd(residual: Tensor, p: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    return u[:, : p.shape[1]] * s[: p.shape[1]] @ v[: p.shape[1]]


LOW_RANK = Exercise(
    name="low_rank",
    title="Exercise 3",
    prompt="Do one round of the power iteration: a rank-R approximation of the residual from starting vectors p.",
    check=_check_low_rank,
    solution=_solve_low_rank,
    wrong=[
        (lambda residual, p: residual @ p @ ((residual @ p).mT @ residual), "no projection"),
        (lambda residual, p: residual @ p @ p.mT, "fitted to A"),
        (_by_svd, "by SVD"),
        (lambda residual, p: torch.zeros_like(residual), "orthonormal columns that span"),
        (lambda residual, p: torch.linalg.qr(residual @ p).Q, "the residual's shape"),
    ],
    hint="Two matrix products and one `torch.linalg.qr`.",
)


# 4. Where GEAR-L costs more than one more bit -------------------------------------------------------------------------
def _solve_break_even(width: int, rank: int) -> int | None:
    left = width - 16 * rank  # 2 + 16 R (n + D) / (n D) <= 3
    return math.ceil(16 * rank * width / left) if left > 0 else None


def _check_break_even(answer: Callable[[int, int], int | None]) -> str | None:
    cases = ((128, 4), (64, 2), (128, 2), (64, 4), (128, 8))
    for width, rank in cases:
        try:
            got = answer(width, rank)
        except ZeroDivisionError:
            return "At width 64 and rank 4 the factor A alone costs one bit per element: the answer is None."
        want = _solve_break_even(width, rank)
        if got == want:
            continue
        if want is None:
            return (
                f"At width {width} and rank {rank} the factor A alone costs one bit or more per element: return None."
            )
        if got is not None and got != int(got):
            return "Tokens come whole: round up."
        if got == want - 1:
            return f"Rounded down, {got} tokens still cost more than 3 bits; round up."
        if got is None or got <= 1:
            return "Count both factors: A has n R numbers and B has D R, shared by n D elements."
        bits = 2 + 16 * rank * (got + width) / (got * width)
        return f"At {got} tokens GEAR-L has {bits:.3g} bits to 3; the smallest such n is asked (16 bits per number)."
    return None


BREAK_EVEN = Exercise(
    name="break_even",
    title="Exercise 4",
    prompt="From how many tokens on does GEAR-L at 2 bits cost no more than plain 3 bits? None if never.",
    check=_check_break_even,
    solution=_solve_break_even,
    wrong=[
        (lambda width, rank: 1 if 16 * rank <= width else None, "Count both factors"),
        (lambda width, rank: math.ceil(16 * rank * width / (width - 16 * rank)), "the answer is None"),
        (lambda width, rank: math.ceil(16 * rank * width / max(1, width - 16 * rank)), "return None"),
        (lambda width, rank: 16 * rank * width / (width - 16 * rank) if width > 16 * rank else None, "come whole"),
        (lambda width, rank: 16 * rank * width // (width - 16 * rank) if width > 16 * rank else None, "Rounded down"),
        (lambda width, rank: 8 * rank * width // (width - 8 * rank), "the smallest such n"),
    ],
    hint="Solve 16 R (n + D) / (n D) = 1 for n. When is there no solution?",
)


# 5. Which side deserves the third bit ---------------------------------------------------------------------------------
def _check_side(answer: str) -> str | None:
    said = str(answer).strip().lower()
    if said not in ("keys", "values"):
        return "Answer with one of the words 'keys' and 'values'."
    if said == "values":
        return (
            "The values have the larger relative error, true. But the output is linear in them, and errors of many "
            "tokens average out; an error in a key goes through the softmax and moves the attention itself."
        )
    return None


SIDE = Exercise(
    name="side",
    title="Exercise 5",
    prompt="Keys at 3 bits and values at 2, or the other way round: which side deserves the extra bit?",
    check=_check_side,
    solution="keys",
    wrong=[("values", "through the softmax"), ("both", "one of the words")],
    hint="One of them is inside an exponential.",
)


# 6. Merging parts of an attention -------------------------------------------------------------------------------------
_OUTS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
_LSES = (torch.tensor([0.3, 1.1, -torch.inf]), torch.tensor([800.0, 801.0, -torch.inf]))


def _check_merge(answer: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    for lses in _LSES:
        lses = lses.double()
        got, want = answer(_OUTS.clone(), lses.clone()), lses.softmax(0) @ _OUTS
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return f"Return one output vector, a tensor of shape {tuple(want.shape)}."
        if torch.allclose(got.double(), want):
            continue
        if torch.allclose(got.double(), lses.exp() @ _OUTS):
            return "The weights must sum to one: divide by the sum of the exponentials."
        if torch.allclose(got.double(), _OUTS.mean(0)) or torch.allclose(got.double(), _OUTS[:2].mean(0)):
            return "Parts are not equal: one holds more of the softmax's mass than another, and its lse says how much."
        if lses[0] > 100 and not got.isfinite().all():
            return "exp(800) overflows. Subtract the largest lse first; it cancels."
        return "Part i holds exp(lse_i) of the softmax's mass, and an empty part exp(-inf) = 0."
    return None


def _solve_merge(outs: Tensor, lses: Tensor) -> Tensor:
    return lses.softmax(0) @ outs


MERGE = Exercise(
    name="merge",
    title="Exercise 6",
    prompt="Join the attention outputs of disjoint parts of the keys, given the log-sum-exp of each part's scores.",
    check=_check_merge,
    solution=_solve_merge,
    wrong=[
        (lambda outs, lses: lses.exp() @ outs, "must sum to one"),
        (lambda outs, lses: outs.mean(0), "Parts are not equal"),
        (lambda outs, lses: lses.exp() / lses.exp().sum() @ outs, "overflows"),
        (lambda outs, lses: lses / lses.sum() @ outs, "exp(-inf) = 0"),
        (lambda outs, lses: outs, "one output vector"),
    ],
    hint="It is a softmax over the parts.",
)

ALL: Sequence[Exercise] = [QUANTISE, CLIP, LOW_RANK, BREAK_EVEN, SIDE, MERGE]

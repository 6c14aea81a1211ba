"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zq_lib.core.exercises import Exercise
from zq_lib.masformer.reference import visible
from zq_lib.masformer.spans import entries

_SIZES = ((10, 3), (8, 8), (5, 9), (64, 16), (7, 1))


# 1. What a window costs -----------------------------------------------------------------------------------------------
def _solve_count(length: int, window: int) -> int:
    return sum(min(i + 1, window) for i in range(length))


def _check_count(answer: Callable[[int, int], int]) -> str | None:
    for length, window in _SIZES:
        got, want = answer(length, window), entries(length, window)
        if got == want:
            continue
        if got == length * window:
            return "The first rows see less than a window: row i has only i + 1 keys to see."
        if got == entries(length, window + 1):
            return "One key too many in each row: the window counts the query's own token."
        if window > length:
            return f"With {length} tokens a window of {window} is full attention, {want} entries; you found {got}."
        return f"{length} tokens and a window of {window} make {want} entries, not {got}. Sum min(i + 1, w) over rows."
    return None


COUNT = Exercise(
    name="count",
    title="Exercise 1",
    prompt="How many score entries has causal attention with a window of w, on T tokens?",
    check=_check_count,
    solution=_solve_count,
    wrong=[
        (lambda length, window: length * window, "first rows see less"),
        (lambda length, window: sum(min(i + 1, window + 1) for i in range(length)), "counts the query's own"),
        (lambda length, window: length * window - window * (window - 1) // 2, "is full attention"),
        (lambda length, window: length * (length + 1) // 2, "Sum min(i + 1, w)"),
    ],
    hint="Row i sees min(i + 1, w) keys. Mind texts shorter than the window.",
)


# 2. Two-block local attention -----------------------------------------------------------------------------------------
def _solve_two_block(length: int, block: int) -> Tensor:
    place = torch.arange(length)
    query, key = place[:, None], place[None, :]
    return (key <= query) & (query // block - key // block <= 1)


def _check_two_block(answer: Callable[[int, int], Tensor]) -> str | None:
    for length, block in ((9, 3), (10, 4)):
        got, want = answer(length, block), visible(length, length, block, "two_block")[0, 0]
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return f"Return a mask of shape {tuple(want.shape)}: queries down, keys across, True where it sees."
        got = got.bool()
        if torch.equal(got, want):
            continue
        if bool((got & ~want).triu(1).any()):
            return "Some queries see keys that come after them: keep key <= query."
        if torch.equal(got, visible(length, length, block, "block")[0, 0]):
            return "That is one block. A query also sees the whole block before its own."
        if torch.equal(got, visible(length, length, 2 * block)[0, 0]):
            return "That is a sliding window of 2 b. Blocks have fixed boundaries: compare i // b with j // b."
        return "Query i sees key j when j <= i and their blocks, i // b and j // b, differ by at most one."
    return None


TWO_BLOCK = Exercise(
    name="two_block",
    title="Exercise 2",
    prompt="Build the mask of two-block local attention: own and previous block, nothing from the future.",
    check=_check_two_block,
    solution=_solve_two_block,
    wrong=[
        (lambda length, block: (torch.arange(length)[:, None] // block - torch.arange(length) // block).abs() <= 1,
         "come after them"),
        (lambda length, block: visible(length, length, block, "block")[0, 0], "That is one block"),
        (lambda length, block: visible(length, length, 2 * block)[0, 0], "sliding window of 2 b"),
        (lambda length, block: visible(length, length, None)[0, 0], "differ by at most one"),
        (lambda length, block: torch.ones(length, dtype=torch.bool), "Return a mask"),
    ],
    hint="`torch.arange(T) // b` numbers the blocks.",
)  # fmt: skip


# 3. The off-by-one of windows -----------------------------------------------------------------------------------------
def _check_left(answer: Callable[[int], int]) -> str | None:
    for window in (1, 4, 256):
        got = answer(window)
        if got == window - 1:
            continue
        if got == window:
            return f"With left={window} a query sees {window + 1} keys: `left` does not count the query's own token."
        if got == window + 1:
            return "The other way: a library that leaves out the query's own token needs the smaller number."
        return f"A window of {window} that counts the query's own token has {window - 1} keys to its left."
    return None


LEFT = Exercise(
    name="left",
    title="Exercise 3",
    prompt="flash-attention's window_size=(left, 0) counts the keys before the query. Which left is our window w?",
    check=_check_left,
    solution=lambda window: window - 1,
    wrong=[
        (lambda window: window, "does not count"),
        (lambda window: window + 1, "The other way"),
        (lambda window: window // 2, "to its left"),
    ],
    hint="Which `left` lets a query see only itself?",
)


# 4. How deep local layers must be -------------------------------------------------------------------------------------
def _solve_depth(length: int, window: int) -> int | None:
    if length == 1:
        return 0
    return None if window == 1 else math.ceil((length - 1) / (window - 1))


def _check_depth(answer: Callable[[int, int], int | None]) -> str | None:
    for length, window in ((29, 8), (30, 8), (900, 64), (1, 8), (40, 1)):
        try:
            got = answer(length, window)
        except ZeroDivisionError:
            return "With a window of one a token sees only itself, however many layers there are: the answer is None."
        want = _solve_depth(length, window)
        if got == want:
            continue
        if want is None:
            return "A window of one never reaches another token; return None."
        if want == 0:
            return "A single token is already there: no layer is needed."
        if got is not None and got != int(got):
            return "Layers come whole: round up."
        if got == math.ceil(length / window):
            return "One window after another overlaps in a token: each layer adds w - 1 tokens, not w."
        return f"{length} tokens and a window of {window} need {want} layers: {want} (w - 1) + 1 tokens are reached."
    return None


DEPTH = Exercise(
    name="depth",
    title="Exercise 4",
    prompt="How many local layers with window w does it take until the last of T tokens can depend on the first?",
    check=_check_depth,
    solution=_solve_depth,
    wrong=[
        (lambda length, window: 1 if length > 1 else 0, "tokens are reached"),
        (lambda length, window: math.ceil(length / window), "adds w - 1 tokens"),
        (lambda length, window: (length - 1) / (window - 1), "come whole"),
        (lambda length, window: math.ceil((length - 1) / (window - 1)), "however many layers"),
        (lambda length, window: math.ceil((length - 1) / max(1, window - 1)), "never reaches another"),
        (lambda length, window: max(1, _solve_depth(length, window) or 0), "already there"),
    ],
    hint="After one layer the last token depends on w tokens, after two on 2 w - 1.",
)


# 5. What attention's saving is worth ----------------------------------------------------------------------------------
def _check_gain(answer: Callable[[float, float], float]) -> str | None:
    for share, left in ((0.235, 0.25), (0.83, 0.25), (0.5, 1.0), (0.07, 0.0)):
        try:
            got = float(answer(share, left))
        except ZeroDivisionError:
            return (
                "Even if nothing of the attention is left, the rest of the model still takes its time: add 1 - share."
            )
        want = 1 / (1 - share + share * left)
        if math.isclose(got, want, rel_tol=1e-3):
            continue
        if math.isclose(got, 1 - share + share * left, rel_tol=1e-3):
            return "That is the new cost relative to the old. The gain is old over new: its inverse."
        if left and math.isclose(got, 1 / left, rel_tol=1e-3):
            return "That is the gain of the attention alone; only a part `share` of the work is attention."
        return f"Share {share} and {left} of it left: the new cost is (1 - share) + share * left, the gain {want:.3g}."
    return None


GAIN = Exercise(
    name="gain",
    title="Exercise 5",
    prompt="Attention is a part `share` of a model's FLOP, and a part `left` of it remains. How much faster at most?",
    check=_check_gain,
    solution=lambda share, left: 1 / (1 - share + share * left),
    wrong=[
        (lambda share, left: 1 - share + share * left, "old over new"),
        (lambda share, left: 1 / max(left, 1e-9), "of the attention alone"),
        (lambda share, left: 1 / left * share, "of it left"),
        (lambda share, left: 1 / (1 - share + share * left) if left else 1 / left, "Even if nothing"),
    ],
    hint="Amdahl: new cost = what is not attention + what is left of it.",
)


# 6. A plan under a budget ---------------------------------------------------------------------------------------------
_DROPS = (0.1, 1.9, -0.1, 0.5, 0.5, 0.05)
_BUDGETS = ((1024, 67, 3000), (1024, 67, 402), (1024, 67, 10_000), (200, 67, 700), (1024, 67, 401))


def _solve_budget(drops: Sequence[float], length: int, kept: int, budget: int) -> list[int] | None:
    if len(drops) * kept > budget:
        return None
    count = min(len(drops), (budget - len(drops) * kept) // (length - kept))
    return sorted(sorted(range(len(drops)), key=lambda layer: -drops[layer])[:count])


def _check_budget(answer: Callable[[Sequence[float], int, int, int], Sequence[int] | None]) -> str | None:
    for length, kept, budget in _BUDGETS:
        got, want = answer(_DROPS, length, kept, budget), _solve_budget(_DROPS, length, kept, budget)
        if want is None:
            if got is not None:
                return f"{budget} keys do not even hold {len(_DROPS)} local layers of {kept}: return None."
            continue
        if got is None:
            return f"With a budget of {budget} keys there is a plan: {len(_DROPS)} local layers take only {6 * kept}."
        got = sorted(got)
        if got == want:
            continue
        used = len(got) * length + (len(_DROPS) - len(got)) * kept
        if used > budget:
            return f"{len(got)} full layers use {used} keys of a budget of {budget}: local layers keep {kept} each too."
        if len(got) < len(want):
            return f"There is room left: {used} keys of {budget} are used, and one more layer may become full."
        return f"You kept layers {got}, but {want} lose less: keep those that cost most when they are local."
    return None


BUDGET = Exercise(
    name="budget",
    title="Exercise 6",
    prompt="A full layer caches `length` keys, a local one `kept`. Which layers stay full within `budget` keys in all?",
    check=_check_budget,
    solution=_solve_budget,
    wrong=[
        (lambda drops, length, kept, budget: sorted(range(len(drops)), key=lambda i: -drops[i])[: budget // length + 1],
         "keep 67 each too"),
        (lambda drops, length, kept, budget: [1], "There is room left"),
        (lambda drops, length, kept, budget: list(range(len(_solve_budget(drops, length, kept, budget) or ()))),
         "lose less"),
        (lambda drops, length, kept, budget: _solve_budget(drops, length, kept, budget) or [], "do not even hold"),
        (lambda drops, length, kept, budget: _solve_budget(drops, length, kept, budget) or None, "there is a plan"),
    ],
    hint="All local takes L * kept keys; each full layer adds length - kept. Spend the rest on the largest drops.",
)  # fmt: skip

ALL: Sequence[Exercise] = [COUNT, TWO_BLOCK, LEFT, DEPTH, GAIN, BUDGET]

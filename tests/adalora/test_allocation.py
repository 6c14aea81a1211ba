"""The global choice: exact with ties and dead matrices, bounded per matrix, in ranks or in parameters."""

from __future__ import annotations

import pytest
import torch

from zq_lib.adalora import allocate


def test_equal_scores_are_taken_in_order_and_the_budget_is_met_exactly() -> None:
    keep = allocate(torch.ones(3, 4), 5)
    assert keep.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]


def test_a_dead_matrix_and_ties_leave_the_published_code_short_but_not_us() -> None:
    scores = torch.zeros(3, 4)
    scores[0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert int(allocate(scores, 6).sum()) == 6
    assert int(allocate(scores, 6, ties="threshold").sum()) == 4


def test_bounds_hold_and_the_rest_goes_by_score() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0], [3.0, 2.0, 1.0], [6.0, 5.0, 4.0]])
    keep = allocate(scores, 5, least=torch.tensor([0, 2, 0]), most=torch.tensor([2, 3, 3]))
    assert keep.tolist() == [[True, True, False], [True, True, False], [True, False, False]]


def test_upper_bounds_below_the_budget_leave_the_rest_unused() -> None:
    assert int(allocate(torch.rand(3, 4), 10, most=torch.tensor([1, 2, 1])).sum()) == 4


def test_lower_bounds_above_the_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="budget=3 is below the 4 that min_rank asks for"):
        allocate(torch.rand(2, 4), 3, least=torch.tensor([2, 2]))


def test_in_parameters_a_cheap_matrix_wins_at_equal_score_and_the_budget_is_never_passed() -> None:
    scores, costs = torch.ones(2, 3), torch.tensor([100, 10])
    assert allocate(scores, 40, costs=costs).tolist() == [[False] * 3, [True] * 3]
    keep = allocate(scores, 135, costs=costs)
    assert keep.sum(1).tolist() == [1, 3] and int((keep.sum(1) * costs).sum()) <= 135


def test_what_still_fits_is_taken_after_something_that_did_not() -> None:
    keep = allocate(torch.tensor([[9.0], [8.0]]), 15, costs=torch.tensor([16, 15]))
    assert keep.tolist() == [[False], [True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused_with_the_matrix(bad: float) -> None:
    scores = torch.ones(3, 2)
    scores[1, 0] = bad
    with pytest.raises(ValueError, match="scores of matrix 1 are not finite"):
        allocate(scores, 2)


def test_nothing_and_everything_are_legal_budgets() -> None:
    scores = torch.rand(2, 3)
    for ties in ("exact", "threshold"):
        assert not allocate(scores, 0, ties=ties).any() and allocate(scores, 6, ties=ties).all()
    assert allocate(scores, 99).all()

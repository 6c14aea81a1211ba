"""The reference: hand-worked cases, gradients by hand against autograd, limits and invariants."""

from __future__ import annotations

import pytest
import torch

from zq_lib.adalora import allocate, reference

R, N, K = 3, 5, 4


def _factors(seed: int = 0):
    source = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    return make(7, K), make(N, K), make(N), make(N, R), make(R), make(R, K)


def test_the_linear_form_equals_the_weight_form() -> None:
    x, weight, bias, left, values, right = _factors()
    whole = torch.nn.functional.linear(x, reference.adapted_weight(weight, left, values, right, 1.5), bias)
    torch.testing.assert_close(reference.adapted_linear(x, weight, bias, left, values, right, 1.5), whole)


def test_the_gradients_by_hand_are_those_of_autograd() -> None:
    x, weight, _, left, values, right = _factors()
    inputs = [t.requires_grad_() for t in (x, left, values, right)]
    out = reference.adapted_linear(x, weight, None, left, values, right, 0.7)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    by_hand = reference.adapted_linear_gradients(grad, x, weight, left, values, right, 0.7)
    for ours, theirs in zip(by_hand, torch.autograd.grad(out, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autograd_of_the_adapted_layer_passes_gradcheck() -> None:
    x, weight, bias, left, values, right = (t.requires_grad_() for t in _factors())
    assert torch.autograd.gradcheck(
        lambda *a: reference.adapted_linear(*a, 0.7), (x, weight, bias, left, values, right)
    )


def test_a_dropped_triplet_stops_its_vectors_but_not_its_value() -> None:
    x, weight, _, left, values, right = _factors()
    values[1] = 0
    _, d_left, d_values, d_right = reference.adapted_linear_gradients(
        torch.ones(7, N, dtype=torch.float64), x, weight, left, values, right, 1.0
    )
    assert not d_left[:, 1].any() and not d_right[1].any() and d_values[1] != 0


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_the_penaltys_gradient_is_that_of_autograd_and_zero_for_orthonormal_vectors(form: str) -> None:
    *_, left, _, right = _factors()
    left, right = left.requires_grad_(), right.requires_grad_()
    value = reference.orthogonality([left], [right], form)
    d_left, d_right = torch.autograd.grad(value, (left, right))
    torch.testing.assert_close(reference.orthogonality_gradient(left.T, form, 2).T.contiguous(), d_left)
    torch.testing.assert_close(reference.orthogonality_gradient(right, form, 2), d_right)
    eye = torch.eye(3, 4, dtype=torch.float64)
    assert reference.orthogonality([eye.T], [eye], form) == 0
    assert not reference.orthogonality_gradient(eye, form, 2).any()


def test_importance_by_hand_over_two_steps() -> None:
    """w = 2; g = 3, then -1: I = 6, 2; I-bar = 3, 2.5; U-bar = 0.75, 0.6875 with both betas 1/2 and 3/4."""
    zero = torch.zeros(1, dtype=torch.float64)
    w = torch.tensor([2.0], dtype=torch.float64)
    one = reference.update_importance(w, torch.tensor([3.0]), zero, zero, 0.5, 0.75)
    assert [float(x) for x in one] == [3.0, 0.75]
    two = reference.update_importance(w, torch.tensor([-1.0]), *one, 0.5, 0.75)
    assert [float(x) for x in two] == [2.5, 0.75 * 0.75 + 0.25 * 0.5]


def test_scores_are_means_over_the_vectors_so_size_does_not_count() -> None:
    score = reference.triplet_scores(torch.full((10, 2), 3.0), torch.tensor([1.0, 2.0]), torch.full((2, 99), 4.0))
    assert score.tolist() == [8.0, 9.0]


def test_the_appendixs_printed_schedule_overshoots_the_start_which_ours_does_not() -> None:
    start, target, total, warmup, final = 864, 576, 1000, 100, 200
    printed = target + (start - target) * (1 - (warmup - warmup - final) / (total - final - warmup)) ** 3
    assert printed > start and int(printed) == 1188
    assert reference.budget(warmup, start, target, total, warmup, final) == start


@pytest.mark.parametrize("count", range(0, 13))
def test_the_fast_allocation_is_the_references_for_every_budget_with_and_without_ties(count: int) -> None:
    source = torch.Generator().manual_seed(count)
    for scores in (torch.rand(4, 3, generator=source), torch.randint(3, (4, 3), generator=source).float()):
        assert torch.equal(allocate(scores, count), reference.top(scores, count))
        assert int(allocate(scores, count).sum()) == count
        assert torch.equal(allocate(scores, count, ties="threshold"), reference.above_threshold(scores, count))

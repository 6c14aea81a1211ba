"""The reference against cases worked by hand, limits and invariants."""

from __future__ import annotations

import torch

from zq_lib.losparse import reference


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_three_parts_sum_to_the_weight_at_every_rank() -> None:
    weight = _normal(9, 14)
    for rank in (0, 1, 5, 9):
        left, right, sparse = reference.decompose(weight, rank)
        torch.testing.assert_close(left @ right + sparse, weight, rtol=0, atol=1e-13)
        x = _normal(3, 14, seed=1)
        torch.testing.assert_close(reference.linear(x, left, right, sparse), x @ weight.T, rtol=0, atol=1e-12)
    assert sparse.abs().max() < 1e-13, "at full rank nothing is left for S"


def test_the_factors_hold_the_largest_singular_values_evenly() -> None:
    weight = torch.diag(torch.tensor([3.0, 5.0, 1.0], dtype=torch.float64))
    left, right, sparse = reference.decompose(weight, 1)
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)))
    assert abs(left.norm() - right.norm()) < 1e-12
    torch.testing.assert_close(
        sparse.diagonal(), torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_mean_over_a_row_of_the_smoothed_is_the_smoothed_mean_over_the_row() -> None:
    average, window, row_average, row_window = (torch.zeros(s, dtype=torch.float64) for s in ((6, 5), (6, 5), 6, 6))
    for step in range(37):
        now = _normal(6, 5, seed=step).abs()
        average, window = reference.smooth_window(average, window, now, step, 10, 0.85)
        row_average, row_window = reference.smooth_window(row_average, row_window, now.mean(1), step, 10, 0.85)
    torch.testing.assert_close(reference.neuron_scores(average), row_average, rtol=1e-14, atol=0)


def test_a_window_enters_the_average_when_the_next_one_begins() -> None:
    average, window = torch.zeros(1), torch.zeros(1)
    for step, now in enumerate([2.0, 4.0, 6.0, 8.0]):
        average, window = reference.smooth_window(average, window, torch.tensor([now]), step, 3, 0.5)
        if step < 3:
            assert average == 0, "the first update adds the empty window before the first"
    assert average == 0.5 * 4.0 and window == 8.0


def test_the_threshold_is_one_for_all_matrices_and_counts_entries() -> None:
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0, 4.0])]
    keep = reference.keep_rows(scores, [10, 2], share=0.5)  # 26 entries, the 13th smallest is in the third row
    assert [k.tolist() for k in keep] == [[False, True], [False, True, True]]
    assert all(k.all() for k in reference.keep_rows(scores, [10, 2], share=1.0))
    tied = reference.keep_rows([torch.tensor([1.0, 1.0, 2.0])], [4], share=0.5)
    assert tied[0].tolist() == [True, True, True], "the row of the k-th entry stays, and so does its tie"


def test_shrinking_changes_nothing_but_the_shape() -> None:
    left, right, sparse = _normal(7, 2), _normal(2, 5, seed=1), _normal(7, 5, seed=2)
    rows = torch.tensor([0, 3, 6])
    masked = torch.zeros_like(sparse)
    masked[rows] = sparse[rows]
    x, bias = _normal(4, 3, 5, seed=3), _normal(7, seed=4)
    want = reference.linear(x, left, right, masked, bias)
    torch.testing.assert_close(reference.shrunk_linear(x, left, right, sparse[rows], rows, bias), want)


def test_the_shrunk_layer_has_the_gradients_of_its_formula() -> None:
    parts = [_normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 5), (7, 2), (2, 5), (3, 5), (7,)])]
    rows = torch.tensor([1, 2, 5])
    x, left, right, sparse, bias = parts
    assert torch.autograd.gradcheck(
        lambda *p: reference.shrunk_linear(*p[:4], rows, p[4]), (x, left, right, sparse, bias)
    )


def test_distilling_from_oneself_costs_nothing_and_from_another_something() -> None:
    logits, states = _normal(3, 4), [_normal(3, 2, 6, seed=i) for i in range(3)]
    assert reference.distillation(logits, logits, states, states, 1.0, 15.0).abs() < 1e-12
    other = [s + 0.1 for s in states]
    loss = reference.distillation(logits, logits, states, other, 1.0, 15.0)
    torch.testing.assert_close(loss, torch.tensor(15 * 3 * 0.01, dtype=torch.float64))

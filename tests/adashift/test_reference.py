"""The reference against hand-worked numbers, limits in which it must be something else, and its own derivative."""

from __future__ import annotations

import pytest
import torch

from zq_lib.adashift.reference import trajectory
from zq_lib.adashift.spatial import spatial
from zq_lib.adashift.window import place, weights


def test_window_weights_by_hand() -> None:
    assert weights(3, 0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert weights(4, 1.0) == [0.25] * 4 and weights(3, 0.0) == [1, 0, 0] and weights(1, 0.9) == [1]


def test_a_gradient_takes_the_slot_of_the_one_that_leaves_the_window() -> None:
    assert [place(t, 3) for t in (1, 2, 3, 4, 7)] == [0, 1, 2, 0, 0]


def test_spatial_functions_of_squares_by_hand() -> None:
    squares = torch.tensor([[1.0, 4.0], [9.0, 0.0]])
    assert [float(spatial(squares, phi)) for phi in ("max", "mean", "l2")] == [9, 3.5, 14]
    assert spatial(squares, "mean", "row").tolist() == [2.5, 4.5]
    assert spatial(squares, "none") is squares
    assert float(spatial(squares[0], "max", "row")) == 4, "a vector is one block"
    assert float(spatial(squares, torch.median)) == 1


def test_three_steps_by_hand() -> None:
    gradients = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    walk = list(
        trajectory(
            torch.zeros(2, dtype=torch.float64), lambda _, t: gradients[t - 1], 3, lr=0.1, betas=(0.0, 0.5), n=1, eps=0
        )
    )
    assert walk[0].tolist() == [0, 0]
    assert walk[1].tolist() == pytest.approx([-0.15, 0.0])  # divided by |-2|, not by 3: v has not seen this gradient
    vhat = (0.5 * 2 + 0.5 * 9) / 0.75  # v_2 = 2, v_3 = 5.5, corrected by 1 - 0.5^2
    assert walk[2].tolist() == pytest.approx([-0.15 + 0.1 / vhat**0.5, -0.1 / vhat**0.5])


def test_a_shift_by_the_period_makes_adam_again() -> None:
    """n = d: the divisor is the same as without a shift, so the independence is gone and only delay is left."""
    period = [3.0, -1.0, -1.0]
    walk = torch.stack(
        list(
            trajectory(
                torch.zeros((), dtype=torch.float64), lambda x, t: x * 0 + period[(t - 1) % 3], 303, lr=1e-3,
                betas=(0.0, 0.1), n=3,
            )
        )
    )  # fmt: skip
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=1e-3, betas=(0.0, 0.1), eps=1e-10)
    for t in range(300):
        theta.grad = torch.tensor(period[t % 3], dtype=torch.float64)
        adam.step()
    assert abs(float(walk[-1] - theta.detach())) < 1e-12 and float(walk[-1]) > 0.05


def test_the_reference_is_differentiable() -> None:
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))

    def end(start: torch.Tensor) -> torch.Tensor:
        *_, last = trajectory(start, lambda x, t: x**3 - t, 6, lr=0.05, n=2, phi="mean")
        return last

    assert torch.autograd.gradcheck(end, (theta,))

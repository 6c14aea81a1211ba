"""Three roads to one optimum, and the published step."""

from __future__ import annotations

import pytest
import torch

from zq_lib.r3m import (
    alternating_optimum,
    alternating_step,
    cutoff,
    joint_optimum,
    noise,
    outlier_offset,
    preference_loss,
    profile_optimum,
)


@pytest.mark.parametrize("lam", [0.1, 0.3, 0.7, 1.0])
def test_profile_joint_and_alternating_optima_agree(lam: float, linear) -> None:
    problem = linear(300, 6)
    labels = noise.stochastic(problem.margin, 1.0, torch.Generator().manual_seed(1))
    x = problem.features * labels.sign[:, None]
    profile, joint = profile_optimum(x, lam), joint_optimum(x, lam)
    alternating = alternating_optimum(x, lam, steps=1500)
    for other in (joint, alternating):
        assert abs(other.objective - profile.objective) <= 1e-12
        torch.testing.assert_close(other.weight, profile.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.offset, profile.offset, rtol=0, atol=1e-6)
    assert (float(profile.offset.max()) > 0) == (lam < 1)


def test_a_published_step_is_a_step_on_the_capped_loss(linear) -> None:
    problem = linear(64, 5)
    weights = [torch.full((5,), -0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.Adam([w], lr=0.1) for w in weights]
    for _ in range(20):
        offset = alternating_step(lambda: problem.features @ weights[0], optimizers[0], 0.3)
        optimizers[1].zero_grad()
        preference_loss(problem.features @ weights[1], 0.3).backward()
        before = (problem.features @ weights[1]).detach()
        optimizers[1].step()
        torch.testing.assert_close(offset, outlier_offset(before, 0.3), rtol=0, atol=1e-9)
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-9)


def test_the_reward_is_scaled_up_by_a_small_lam_even_with_honest_labels(linear) -> None:
    """Honest coin flips look like outliers: the ranking stays, the values do not."""
    problem = linear(2000, 20)
    labels = noise.stochastic(problem.margin, 1.0, torch.Generator().manual_seed(0))
    x = problem.features * labels.sign[:, None]
    plain, robust = (profile_optimum(x, lam).weight for lam in (1.0, 0.3))
    assert float(plain.norm()) / 2 == pytest.approx(1, abs=0.15)
    assert 1.4 < float(robust.norm()) / 2 < 2.1
    assert abs(problem.accuracy(robust) - problem.accuracy(plain)) < 0.01


@pytest.mark.parametrize(("power", "least"), [(1 / 3, 0.01), (1 / 2, 0.03)])
def test_clear_pairs_answered_wrong_hurt_cross_entropy_more(power: float, least: float, linear) -> None:
    gains = []
    for seed in range(3):
        problem = linear(2000, 20, seed)
        x = problem.features * noise.irrational(problem.margin, power).sign[:, None]
        gains.append(
            problem.accuracy(profile_optimum(x, 0.3).weight) - problem.accuracy(profile_optimum(x, 1.0).weight)
        )
    assert sum(gains) / 3 >= least


def test_a_quarter_of_the_clearest_pairs_breaks_every_convex_loss(linear) -> None:
    problem = linear(2000, 20)
    x = problem.features * noise.irrational(problem.margin, 2 / 3).sign[:, None]
    assert all(problem.accuracy(profile_optimum(x, lam).weight) < 0.55 for lam in (0.3, 1.0))


def test_when_every_label_lies_the_opposite_is_learnt_and_nobody_can_tell(linear) -> None:
    """A documented meaning: the flipped data is as consistent as the true one, so nothing more is flagged in it."""
    problem = linear(400, 6)
    truth = noise.random_flip(problem.margin, 0.1, torch.Generator().manual_seed(0)).sign[:, None] * problem.features
    right, wrong = profile_optimum(truth, 0.5), profile_optimum(-truth, 0.5)
    torch.testing.assert_close(wrong.weight, -right.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(wrong.offset, right.offset, rtol=0, atol=1e-6)
    assert problem.accuracy(wrong.weight) < 0.1


def test_a_pair_has_no_class_so_one_side_preferred_throughout_is_the_same_data(linear) -> None:
    problem = linear(300, 6)
    labels = noise.stochastic(problem.margin, 1.0, torch.Generator().manual_seed(0))
    swap = torch.where(torch.arange(300) % 2 == 0, 1, -1)[:, None]
    first, second = (problem.features + 1) / 2, (1 - problem.features) / 2
    sides = noise.ordered(first, second, labels.sign)
    swapped = noise.ordered(
        torch.where(swap > 0, first, second), torch.where(swap > 0, second, first), labels.sign * swap[:, 0]
    )
    assert all(torch.equal(a, b) for a, b in zip(sides, swapped, strict=True)), "always (chosen, rejected)"
    assert bool((profile_optimum(sides[0] - sides[1], 0.5).weight.isfinite()).all())


def test_labels_that_never_contradict_each_other_have_no_finite_optimum(linear) -> None:
    problem = linear(50, 3)
    x = problem.features * problem.margin.sign()[:, None]
    with pytest.raises(ValueError, match="no optimum found with ridge=0 at lam=1: .* raise ridge"):
        profile_optimum(x, 1.0, ridge=0.0)
    assert bool(profile_optimum(x, 1.0).weight.isfinite().all())


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match=r"features have shape \(3,\); give \[n, D\]"):
        profile_optimum(torch.zeros(3), 0.3)
    with pytest.raises(ValueError, match="features hold NaN or infinity"):
        joint_optimum(torch.full((3, 2), torch.nan), 0.3)
    with pytest.raises(ValueError, match="ridge=-1 must be at least 0"):
        alternating_optimum(torch.ones(3, 2), 0.3, ridge=-1)
    with pytest.raises(ValueError, match="lam=2 must be above 0 and at most 1"):
        alternating_step(lambda: torch.zeros(2), None, 2)
    assert cutoff(0.3) > 0

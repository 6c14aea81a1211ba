"""lam and the share to trim, from noisy labels alone."""

from __future__ import annotations

import pytest
import torch

from zq_lib.r3m import linear_fit, noise, profile_optimum, select_lambda, trim_refit
from zq_lib.r3m.selection import _split


def _irrational(linear, power: float, seed: int = 0):
    problem = linear(2000, 20, seed)
    labels = noise.irrational(problem.margin, power)
    return problem, labels, problem.features * labels.sign[:, None]


def test_noisy_validation_chooses_a_lam_nearly_as_good_as_the_best_fixed_one(linear) -> None:
    for seed in range(3):
        problem, _, x = _irrational(linear, 0.5, seed)
        chosen = select_lambda(linear_fit(x), len(x), generator=torch.Generator().manual_seed(seed))
        reached = {lam: problem.accuracy(profile_optimum(x, lam).weight) for lam in chosen.agreement}
        assert reached[chosen.lam] >= max(reached.values()) - 0.012
        assert reached[chosen.lam] >= reached[1.0] + 0.02
        assert len(chosen.held) == 400 and chosen.agreement[chosen.lam] == max(chosen.agreement.values())


def test_of_equal_candidates_the_one_nearest_to_cross_entropy_wins() -> None:
    assert select_lambda(lambda pairs, lam: torch.ones(100), 100, (0.3, 0.9, 0.5)).lam == 0.9


def test_held_out_pairs_are_never_trained_on() -> None:
    seen = []

    def fit(pairs: torch.Tensor, lam: float) -> torch.Tensor:
        seen.append(set(pairs.tolist()))
        return torch.ones(100)

    held = set(select_lambda(fit, 100, (0.3, 0.5)).held.tolist())
    assert len(held) == 20 and all(not held & pairs and len(pairs) == 80 for pairs in seen)


def test_trimming_removes_the_clear_lies_and_gains_on_average(linear) -> None:
    gains, shares = [], []
    for seed in range(3):
        problem, labels, x = _irrational(linear, 0.5, seed)
        source = torch.Generator().manual_seed(seed)
        found = trim_refit(linear_fit(x), len(x), 0.3, shares=(0.0, 0.05, 0.15), generator=source)
        trimmed = profile_optimum(x[found.kept], 0.3).weight
        torch.testing.assert_close(found.margins, x @ trimmed)
        assert len(found.kept) == 2000 - int(2000 * found.share)
        shares.append(found.share)
        if found.share == 0.15:
            assert int(labels.is_outlier[found.kept].sum()) == 0
        gains.append(problem.accuracy(trimmed) - problem.accuracy(profile_optimum(x, 0.3).weight))
    assert max(shares) == 0.15 and min(gains) >= 0 and sum(gains) / 3 >= 0.01


def test_when_trimming_gains_nothing_all_pairs_stay() -> None:
    same = trim_refit(lambda pairs, lam: torch.ones(100), 100, 0.3)
    assert same.share == 0 and len(same.kept) == 100


def test_a_round_that_changes_nothing_ends_the_trimming() -> None:
    calls = []

    def fit(pairs: torch.Tensor, lam: float) -> torch.Tensor:
        calls.append(len(pairs))
        return torch.arange(100.0)

    trim_refit(fit, 100, 0.3, shares=(0.0, 0.1), rounds=50)
    assert len(calls) < 10


def test_bad_input_is_one_clear_sentence() -> None:
    fit = linear_fit(torch.randn(60, 2))
    with pytest.raises(ValueError, match="lam=1.5 must be above 0 and at most 1"):
        select_lambda(fit, 60, (0.5, 1.5))
    with pytest.raises(ValueError, match="lams is empty"):
        select_lambda(fit, 60, ())
    with pytest.raises(ValueError, match="40 pairs with holdout=0.2 leave 8 to judge by; 10 are the least"):
        select_lambda(fit, 40)
    with pytest.raises(ValueError, match="holdout=1 must lie between 0 and 1"):
        _split(60, 1, None)
    with pytest.raises(ValueError, match=r"fit returned margins of shape \(3,\); it must return those of all 60"):
        select_lambda(lambda pairs, lam: torch.zeros(3), 60)
    with pytest.raises(ValueError, match=r"shares=\(0.1,\) must hold 0"):
        trim_refit(fit, 60, 0.3, shares=(0.1,))
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        trim_refit(fit, 60, 0.3, rounds=0)

"""Which way everybody walks: signs over seeds, closed forms, net update factors (sections 1.3, 1.4 and 7.1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zq_lib.adashift import AdaShift, Sequential, Stochastic, critical_delta, net_update_factors, simulate
from zq_lib.adashift.counterexamples import ADAM, ADASHIFT, AMSGRAD, SGD, Rule, first_moments, step_sizes
from zq_lib.adashift.factors import compare

FAST = [(101, 1.0), (21, 0.5)]  # C and delta of the two fast problems; beta2 = 0.9


@pytest.mark.parametrize(("C", "delta"), FAST)
def test_adam_walks_the_wrong_way_and_adashift_the_right_one_for_20_seeds_of_20(C: float, delta: float) -> None:
    gradients = np.hstack([Stochastic(C, delta).gradients(20_000, 1, seed) for seed in range(20)])
    for rule in (Rule(ADAM, 0.0, 0.9), Rule(ADAM, 0.9, 0.9)):
        assert (simulate(rule, gradients)[-1] > 0).sum() == 20, rule
    for rule in (Rule(ADASHIFT, 0.0, 0.9, 1), Rule(ADASHIFT, 0.9, 0.9, 10), Rule(AMSGRAD, 0.0, 0.9), Rule(SGD)):
        assert (simulate(rule, gradients)[-1] < 0).sum() == 20, rule


def test_adashift_moves_every_gradient_alike_and_adam_the_large_one_hardly() -> None:
    gradients = Stochastic(101, 0.3).gradients(4200, 512, seed=0)
    adam, shifted = (compare(Rule(name, 0.0, 0.9), gradients, skip=400) for name in (ADAM, ADASHIFT))
    largest = compare(Rule(AMSGRAD, 0.0, 0.9), gradients, skip=2000)
    assert adam.ratio < 0.1 and adam.drift > 0.4
    assert 0.98 < shifted.ratio < 1.02 and shifted.drift < -0.1
    assert 0.98 < largest.ratio < 1.02 and -0.02 < largest.drift < 0, "right, and slow"


@pytest.mark.parametrize(
    "rule",
    [Rule(ADAM, 0.9, 0.99), Rule(AMSGRAD, 0.9, 0.9), Rule(ADASHIFT, 0.9, 0.99, 10), Rule(ADASHIFT, 1.0, 0.9, 4),
     Rule(ADASHIFT, 0.0, 0.9, 2), Rule(SGD)],
    ids=str,
)  # fmt: skip
def test_the_pushes_times_their_factors_add_up_to_the_way_walked(rule: Rule) -> None:
    gradients = Stochastic(11, 0.3).gradients(500, 3, seed=1)
    rates = 0.1 / np.sqrt(np.arange(1, 501))
    way = simulate(rule, gradients, rates)[-1]
    assert np.allclose(-(gradients * net_update_factors(rule, gradients, rates)).sum(0), way, rtol=1e-12)


@pytest.mark.parametrize("rule", [Rule(ADASHIFT, 0.0, 0.9, 1), Rule(ADASHIFT, 0.9, 0.99, 10), Rule(ADASHIFT, 1, 0, 3)])
def test_the_walkers_are_the_optimisers(rule: Rule) -> None:
    gradients = Stochastic(21, 0.5).gradients(300, 16, seed=2)
    param = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    settings = {"lr": 1e-3, "betas": (rule.beta1, rule.beta2), "n": rule.n, "phi": "none", "eps": 1e-6}
    optimizer = AdaShift([param], **settings)
    for row in gradients:
        param.grad = torch.from_numpy(row)
        optimizer.step()
    mine = simulate(Rule(rule.name, rule.beta1, rule.beta2, rule.n, 1e-6), gradients)[-1]
    assert np.abs(mine - param.detach().numpy()).max() < 1e-12


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_rivals_are_torchs(amsgrad: bool) -> None:
    gradients = Stochastic(21, 0.5).gradients(300, 16, seed=2)
    param = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    optimizer = torch.optim.Adam([param], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, amsgrad=amsgrad)
    for row in gradients:
        param.grad = torch.from_numpy(row)
        optimizer.step()
    mine = simulate(Rule(AMSGRAD if amsgrad else ADAM, 0.9, 0.99, eps=1e-8), gradients)[-1]
    assert np.abs(mine - param.detach().numpy()).max() < 1e-12


@pytest.mark.parametrize(
    ("C", "d", "beta2", "n", "expected"),
    [(3, 3, 0.1, 0, 0.68095), (3, 3, 0.1, 1, -1.78601), (50, 40, 0.9, 0, 4.82921), (50, 40, 0.9, 1, -14.41389),
     (50, 40, 0.9, 10, -6.85151)],
)  # fmt: skip
def test_the_closed_form_of_a_period_is_what_is_walked(C: float, d: int, beta2: float, n: int, expected: float) -> None:
    problem = Sequential(C, d)
    assert problem.displacement(beta2, n) == pytest.approx(expected, abs=5e-6)
    walk = simulate(Rule(ADASHIFT, 0.0, beta2, n) if n else Rule(ADAM, 0.0, beta2), problem.gradients(60 * d), 1.0)
    assert float(walk[-1, 0] - walk[-1 - d, 0]) == pytest.approx(expected, rel=1e-4)


def test_projected_onto_an_interval_adam_ends_at_the_worst_point_and_a_shift_by_the_period_with_it() -> None:
    gradients, rates = Sequential(3, 3).gradients(10_000), 0.1 / np.sqrt(np.arange(1, 10_001))
    ends = {
        rule: float(simulate(rule, gradients, rates, bounds=(-1, 1))[-1, 0])
        for rule in (Rule(ADAM, 0, 0.1), Rule(AMSGRAD, 0, 0.1), *(Rule(ADASHIFT, 0, 0.1, n) for n in (1, 2, 3)))
    }
    adam, largest, one, two, three = ends.values()
    assert adam > 0.99 and max(largest, one, two) < -0.99
    assert abs(three - adam) < 1e-12, "it is independence that helps, not delay"


def test_adams_direction_changes_near_the_predicted_delta() -> None:
    limit = critical_delta(21, 0.99)
    assert limit == pytest.approx(0.105)
    for delta, sign in ((0.6 * limit, 1), (1.3 * limit, -1)):
        gradients = Stochastic(21, delta).gradients(12_000, 512, seed=3)
        assert np.sign(compare(Rule(ADAM, 0.0, 0.99), gradients, skip=1000).drift) == sign


def test_nothing_moves_before_a_gradient_has_been_seen() -> None:
    gradients = np.array([[0.0], [0.0], [1.0], [2.0], [1.0]])
    sizes = step_sizes(Rule(ADASHIFT, 0.0, 0.5, 1), gradients, 1.0)
    assert sizes[:3].tolist() == [[0], [0], [0]] and sizes[3, 0] == pytest.approx(1)
    assert np.isfinite(first_moments(Rule(ADASHIFT, 0.9, 0.5, 2), gradients)).all()


def test_whole_numbers_are_walked_like_others() -> None:
    gradients = Sequential(3, 3, 1).gradients(9)
    rule = Rule(ADASHIFT, 0.9, 0.5, 2)
    assert np.array_equal(simulate(rule, gradients), simulate(rule, gradients.astype(int)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stochastic(1.0), "C=1.0 must be more than 1"),
        (lambda: Stochastic(10, 0.0), r"delta=0.0 must lie in \(0, C=10\]"),
        (lambda: Sequential(2, 3), r"C=2 must exceed \(d - 1\) other = 2"),
        (lambda: Sequential(3, 1), "d=1 must be at least 2"),
        (lambda: Rule("RMSProp"), "choose one of Adam, AMSGrad, AdaShift, SGD"),
        (lambda: Rule(ADAM, 1.0), r"beta1=1.0 must lie in \[0, 1\)"),
        (lambda: Rule(ADASHIFT, 1.5), "beta1=1.5"),
        (lambda: Rule(beta2=1.0), "beta2=1.0"),
        (lambda: Rule(n=0), "n=0 must be at least 1"),
        (lambda: compare(Rule(), np.ones((300, 1))), "without gradients of both signs"),
    ],
)
def test_a_bad_problem_says_what_would_do(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

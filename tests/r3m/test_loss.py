"""The capped gradient against the reference, its peers against their formulas, and what bad margins say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.r3m import (
    LOSSES,
    R3MConfig,
    RobustDPOLoss,
    RobustRewardLoss,
    Rule,
    cutoff,
    outlier_offset,
    preference_loss,
    value_and_slope,
)
from zq_lib.r3m import reference as ref

MARGINS = torch.linspace(-9, 9, 1001, dtype=torch.float64)
LAMS = (1e-3, 0.2, 0.5, 0.75, 0.999)


def _value_and_gradient(call, margin: Tensor) -> tuple[Tensor, Tensor]:
    m = margin.clone().requires_grad_()
    value = call(m)
    value.sum().backward()
    return value.detach(), m.grad


@pytest.mark.parametrize("lam", LAMS)
def test_value_slope_and_offset_are_the_references(lam: float) -> None:
    value, slope = _value_and_gradient(lambda m: preference_loss(m, lam, "none"), MARGINS)
    expected, _ = _value_and_gradient(lambda m: ref.profile_loss(m, lam), MARGINS)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, -torch.sigmoid(-MARGINS).clamp(max=lam), rtol=0, atol=1e-15)
    torch.testing.assert_close(outlier_offset(MARGINS, lam), ref.best_offset(MARGINS, lam), rtol=0, atol=1e-13)


def test_the_gradient_check_passes_away_from_the_cutoff() -> None:
    m = torch.tensor([-3.0, -0.5, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: preference_loss(x, 0.4), m)
    assert min((m.detach() - cutoff(0.4)).abs()) > 1e-3


@pytest.mark.parametrize("lam", [1, 1.0, 1.5, 7])
def test_from_lam_1_on_it_is_cross_entropy_to_the_last_bit(lam: float) -> None:
    source = torch.Generator().manual_seed(0)
    margin = torch.randn(5000, generator=source, dtype=torch.float64) * 20
    for found in (
        _value_and_gradient(lambda m: preference_loss(m, lam), margin),
        _value_and_gradient(lambda m: preference_loss(m, rule=Rule("cross_entropy")), margin),
    ):
        expected = _value_and_gradient(lambda m: -F.logsigmoid(m).mean(), margin)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert float(outlier_offset(margin, lam).max()) == 0
    config = R3MConfig(lam=1)
    chosen, rejected = margin.chunk(2)
    assert torch.equal(RobustRewardLoss(config)(chosen, rejected), -F.logsigmoid(chosen - rejected).mean())


def test_pairs_that_are_not_flagged_are_cross_entropys_to_the_last_bit() -> None:
    margin = MARGINS[MARGINS >= cutoff(0.3)]
    found = _value_and_gradient(lambda m: preference_loss(m, 0.3, "none"), margin)
    expected = _value_and_gradient(lambda m: -F.logsigmoid(m), margin)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("margin", [-1e4, -1e30, 1e4, 1e30])
def test_huge_margins_keep_their_slope_in_single_precision(margin: float) -> None:
    m = torch.tensor([margin])
    value, slope = _value_and_gradient(lambda x: preference_loss(x, 0.3), m)
    assert bool(value.isfinite())
    assert float(slope) == (pytest.approx(-0.3, abs=1e-7) if margin < 0 else 0)
    if margin == -1e4:
        literal = m.clone().requires_grad_()
        ref.alternating_loss(literal, torch.zeros(1), 0.3).backward()
        assert abs(float(literal.grad) + 0.3) > 5e-5, "what the analytic slope is for"


def test_exactly_at_the_cutoff_nothing_is_flagged_and_both_branches_agree() -> None:
    for lam in LAMS:
        at = torch.tensor([cutoff(lam)], dtype=torch.float64)
        value, slope = value_and_slope(at, Rule(lam=lam))
        assert float(outlier_offset(at, lam)) == 0
        assert float(value) == pytest.approx(-math.log1p(-lam), rel=1e-12)
        assert float(slope) == pytest.approx(-lam, rel=1e-12)


def test_the_smaller_lam_the_less_a_pair_can_pull() -> None:
    assert cutoff(0.5) == 0 and cutoff(0.2) > 0 > cutoff(0.8) and cutoff(1) == -math.inf
    steepest = [float(value_and_slope(MARGINS, Rule(lam=lam))[1].min()) for lam in (0.1, 0.3, 0.9)]
    assert steepest == pytest.approx([-0.1, -0.3, -0.9])
    at_the_start = outlier_offset(torch.zeros(4), 0.3)
    assert bool((at_the_start > 0).all()), "below 0.5 every pair is flagged before training, which is no mistake"


FORMULAS = {
    "cross_entropy": lambda m: -F.logsigmoid(m),
    "dpo": lambda m: -F.logsigmoid(m),
    "label_smoothing": lambda m: -0.8 * F.logsigmoid(m) - 0.2 * F.logsigmoid(-m),
    "cdpo": lambda m: -0.8 * F.logsigmoid(m) - 0.2 * F.logsigmoid(-m),
    "rdpo": lambda m: (-0.8 * F.logsigmoid(m) + 0.2 * F.logsigmoid(-m)) / 0.6,
    "ipo": lambda m: (m / 0.5 - 1 / (2 * 0.3)) ** 2,
    "hinge": lambda m: torch.relu(1 - m),
    "ropo": lambda m: 4 * 3 / 16 * -F.logsigmoid(m) + 4 * 9 / 16 * torch.sigmoid(-m),
    "r3m": lambda m: ref.profile_loss(m, 0.4),
}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_each_peer_is_its_formula_with_the_slope_of_its_derivative(loss: str) -> None:
    rule = Rule(loss, lam=0.4, epsilon=0.2, tau=0.3, alpha=3.0, beta=0.5)
    value, slope = value_and_slope(MARGINS, rule)
    expected, derivative = _value_and_gradient(FORMULAS[loss], MARGINS)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-9)


def test_how_loud_a_badly_wrong_pair_may_shout() -> None:
    """The slope where the margin goes to minus infinity."""
    far = torch.tensor([-200.0], dtype=torch.float64)
    slopes = {name: float(value_and_slope(far, Rule(name, 0.3, 0.2, 0.1, 3.0, 0.1))[1]) for name in LOSSES}
    expected = {"r3m": -0.3, "dpo": -1, "cdpo": -0.8, "rdpo": -0.8 / 0.6, "hinge": -1, "ropo": -0.75}
    assert {k: slopes[k] for k in expected} == pytest.approx(expected)
    assert slopes["ipo"] < -1000
    ropo = value_and_slope(MARGINS, Rule("ropo", alpha=14.0))[1]
    assert float(ropo.min()) == pytest.approx(-1, abs=1e-3), "its factors make the largest slope 1"
    assert float(value_and_slope(-far, Rule("rdpo", epsilon=0.2))[0]) < -60, "rDPO is unbounded below"


def test_dpo_is_the_published_formula_in_value_and_gradient() -> None:
    """Equation 7 of the DPO paper, which TRL calls sigmoid, written out with policy and reference ratios."""
    torch.manual_seed(0)
    policy = (torch.randn(12, dtype=torch.float64) * 5 - 30).requires_grad_()
    given = torch.randn(12, dtype=torch.float64) * 5 - 30
    ratios = (policy[:6] - policy[6:]) - (given[:6] - given[6:])
    expected = -F.logsigmoid(0.1 * ratios).mean()
    found = RobustDPOLoss(R3MConfig(lam=1, beta=0.1))(policy, given)
    assert abs(float(found.detach() - expected.detach())) <= 1e-12
    grads = [torch.autograd.grad(x, policy)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    single = RobustDPOLoss(R3MConfig(loss="dpo", beta=0.1))(policy.detach().float(), given.float())
    assert abs(float(single) - float(expected.detach())) <= 1e-6
    flagged = RobustDPOLoss(R3MConfig(lam=0.4, beta=0.1))
    torch.testing.assert_close(flagged(policy, given), ref.dpo_loss(policy, given, 0.1, 0.4), rtol=0, atol=1e-13)


def test_ipo_through_the_policys_loss_is_that_of_its_paper() -> None:
    policy, given = torch.randn(8), torch.randn(8)
    gap = (policy[:4] - policy[4:]) - (given[:4] - given[4:])
    found = RobustDPOLoss(R3MConfig(loss="ipo", beta=0.3, tau=0.3))(policy, given)
    torch.testing.assert_close(found, (gap - 1 / 0.6).square().mean())


def test_half_precision_is_computed_in_single() -> None:
    chosen = torch.tensor([3.0, -60000.0], dtype=torch.float16)
    rejected = torch.tensor([1.0, 60000.0], dtype=torch.float16)
    found = RobustRewardLoss(R3MConfig(lam=0.3))(chosen, rejected)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(18000.3, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [RobustRewardLoss(R3MConfig(lam=0.3)), RobustRewardLoss(R3MConfig(loss="ipo"))])
def test_rewards_that_overflow_are_named_instead_of_a_silent_nan(bad: float, loss: RobustRewardLoss) -> None:
    with pytest.raises(ValueError, match="the margin of pair 1 is .*: its rewards overflow or hold NaN; lower the"):
        loss(torch.tensor([1.0, bad, 2.0]), torch.zeros(3))


def test_margins_whose_sum_overflows_are_fine() -> None:
    assert bool(preference_loss(torch.full((4,), 3e38), 0.3).isfinite())


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="lam=0 must be above 0; 1 is plain Bradley-Terry"):
        preference_loss(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="lam=-1 must be above 0"):
        outlier_offset(torch.zeros(2), -1)
    with pytest.raises(ValueError, match=r"margins have shape \(0,\); give one for each of at least one pair"):
        preference_loss(torch.zeros(0), 0.3)
    with pytest.raises(ValueError, match="reduction='max' is not known; choose one of mean, sum, none"):
        preference_loss(torch.zeros(2), 0.3, "max")
    with pytest.raises(ValueError, match=r"chosen has shape \(3,\) and rejected \(2,\)"):
        RobustRewardLoss()(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(3,\) and the reference's \(3,\); give \[2B\] of both"):
        RobustDPOLoss()(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="loss='kto' is not known; choose one of r3m"):
        value_and_slope(torch.zeros(2), Rule("kto"))


def test_inputs_stay_as_they_are_and_the_reference_gets_no_gradient() -> None:
    policy, given = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    copies = policy.detach().clone(), given.detach().clone()
    RobustDPOLoss()(policy, given).backward()
    assert given.grad is None and torch.equal(policy, copies[0]) and torch.equal(given, copies[1])


def test_a_budget_flags_about_its_share_and_keeps_still_in_evaluation() -> None:
    source = torch.Generator().manual_seed(0)
    loss = RobustRewardLoss(R3MConfig(lam="auto", outlier_budget=0.1, momentum=0.8))
    assert loss.lam == 1, "no margin seen yet"
    for _ in range(60):
        loss.of_margins(torch.randn(256, generator=source) * 2 + 3)
    margin = torch.randn(20_000, generator=source) * 2 + 3
    assert float((margin < cutoff(loss.lam)).double().mean()) == pytest.approx(0.1, abs=0.02)
    before = loss.lam
    loss.eval().of_margins(margin - 50)
    assert loss.lam == before
    again = RobustRewardLoss(loss.config)
    again.load_state_dict(loss.state_dict())
    assert again.lam == before and list(again.parameters()) == []

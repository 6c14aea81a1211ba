"""The reference against cases worked by hand, and against itself."""

from __future__ import annotations

import math

import pytest
import torch

from zq_lib.r3m import reference as ref

# lam, margin, cut-off, offset, profile loss, its slope, -log sigma(margin)
WORKED = [
    (0.2, -1.0, 1.386294, 2.386294, 0.700402, -0.2, 1.313262),
    (0.2, 2.0, 1.386294, 0.0, 0.126928, -0.119203, 0.126928),
    (0.5, -1.0, 0.0, 1.0, 1.193147, -0.5, 1.313262),
    (0.75, -1.0, -1.098612, 0.0, 1.313262, -0.731059, 1.313262),
    (0.75, -2.0, -1.098612, 0.901388, 2.062335, -0.75, 2.126928),
]


def _one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize(("lam", "margin", "c", "offset", "loss", "slope", "plain"), WORKED)
def test_hand_worked_pairs(lam, margin, c, offset, loss, slope, plain) -> None:
    m = _one(margin).requires_grad_()
    found = ref.profile_loss(m, lam)
    found.sum().backward()
    assert math.log(1 / lam - 1) == pytest.approx(c, abs=5e-7)
    assert float(ref.best_offset(m.detach(), lam)) == pytest.approx(offset, abs=5e-7)
    assert float(found.detach()) == pytest.approx(loss, abs=5e-7)
    assert float(m.grad) == pytest.approx(slope, abs=5e-7)
    assert float(ref.profile_loss(m.detach(), 1.0)) == pytest.approx(plain, abs=5e-7)


def test_the_offset_is_the_numerical_optimum() -> None:
    """4,000 margins and prices against a golden-section search of the loss itself."""
    source = torch.Generator().manual_seed(0)
    margin = torch.randn(4000, generator=source, dtype=torch.float64) * 4
    lam = 0.05 + 0.9 * torch.rand(4000, generator=source, dtype=torch.float64)
    loss = lambda d: -torch.nn.functional.logsigmoid(margin + d) + lam * d.abs()  # noqa: E731
    low, high, golden = torch.full_like(margin, -30), torch.full_like(margin, 60), (math.sqrt(5) - 1) / 2
    for _ in range(120):
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = loss(a) < loss(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    best = torch.stack([ref.best_offset(m, float(k)) for m, k in zip(margin, lam, strict=True)])
    assert float((best - (low + high) / 2).abs().max()) <= 1e-6
    assert float((loss(best) - loss((low + high) / 2)).max()) <= 1e-14, "never above what the search found"


def test_holding_the_offset_or_differentiating_it_is_the_same_but_its_price_has_to_stay() -> None:
    chosen = torch.linspace(-6, 6, 41, dtype=torch.float64).requires_grad_()
    zero, lam = torch.zeros(41, dtype=torch.float64), 0.3
    (held,) = torch.autograd.grad(ref.alternating_loss(chosen, zero, lam), chosen)
    (through,) = torch.autograd.grad(ref.profile_loss(chosen, lam).mean(), chosen)
    torch.testing.assert_close(held, through, rtol=0, atol=1e-15)
    offset = ref.best_offset(chosen, lam)
    (dropped,) = torch.autograd.grad((-torch.nn.functional.logsigmoid(chosen + offset)).mean(), chosen)
    flagged = offset.detach() > 0
    assert 0 < int(flagged.sum()) < 41 and float(dropped[flagged].abs().max()) < 1e-15
    assert float(held[flagged].abs().min()) > 0.007


def test_the_theorems_price_of_one_nth_is_plain_maximum_likelihood() -> None:
    """lambda of (3.2) = 1 / n is lam = 1, where no offset can pay for itself."""
    margin = torch.linspace(-50, 50, 101, dtype=torch.float64)
    assert float(ref.best_offset(margin, 1.0).max()) == 0
    n, offset = 8, torch.rand(8, dtype=torch.float64)
    per_pair = ref.pair_loss(margin[:8], offset, 0.4).mean()
    summed = -torch.nn.functional.logsigmoid(margin[:8] + offset).mean() + 0.4 / n * offset.abs().sum()
    assert float(per_pair) == pytest.approx(float(summed), rel=1e-12)


def test_a_segment_reward_discounts_from_the_first_step() -> None:
    steps = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    assert float(ref.segment_reward(steps, 0.5)) == pytest.approx(0.5 + 0.5 + 0.5)
    assert float(ref.segment_reward(steps)) == 7


def test_the_policys_loss_passes_a_gradient_check() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [0, 6, 5], [-100, 4, 4]])
    given = torch.randn(4, dtype=torch.float64)
    call = lambda z: ref.dpo_loss(ref.sequence_logps(z, labels), given, 0.5, 0.4)  # noqa: E731
    assert torch.autograd.gradcheck(call, logits)
    assert float(ref.probability(_one(0.0), _one(0.0))) == 0.5

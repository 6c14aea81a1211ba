"""Annotators who are wrong, and the truth about them."""

from __future__ import annotations

import pytest
import torch

from zq_lib.r3m import noise


def _margin(n: int = 6400, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize(("power", "flips"), [(1 / 3, 4), (1 / 2, 8), (2 / 3, 16)])
def test_the_irrational_annotator_flips_the_clearest_pairs_of_each_batch(power: float, flips: int) -> None:
    margin = _margin()
    labels = noise.irrational(margin, power)
    for part, wrong in zip(margin.split(64), labels.is_outlier.split(64), strict=True):
        assert int(wrong.sum()) == flips
        assert float(part[wrong].abs().min()) >= float(part[~wrong].abs().max())
    assert torch.equal(labels.is_outlier, labels.sign != margin.sign())


def test_a_last_short_batch_is_flipped_by_its_own_size() -> None:
    assert noise.irrational(_margin(64 + 9), 0.5).is_outlier.split(64)[1].sum() == 3
    assert noise.irrational(_margin(1), 0.5).is_outlier.tolist() == [True], "1 to any power is 1"


def test_random_flips_are_a_fixed_share_of_the_labels_given() -> None:
    margin = _margin(1000)
    source = torch.Generator().manual_seed(3)
    assert int(noise.random_flip(margin, 0.2, source).is_outlier.sum()) == 200
    base = noise.stochastic(margin, 1.0, source)
    twice = noise.random_flip(margin, 0.3, source, base.sign)
    assert int((twice.sign != base.sign).sum()) == 300
    assert torch.equal(twice.is_outlier, twice.sign * margin < 0)
    assert int(noise.random_flip(margin, 1.0).is_outlier.sum()) == 1000
    assert int(noise.random_flip(margin, 0.0).is_outlier.sum()) == 0


def test_the_stochastic_annotator_follows_bradley_and_terry() -> None:
    margin = _margin(40_000)
    source = torch.Generator().manual_seed(1)  # that of the margins would draw the very same bits
    shares = []
    for tau in (1.0, 2.0, 3.0):
        labels = noise.stochastic(margin, tau, source)
        assert float((labels.sign > 0).double().mean()) == pytest.approx(
            float(torch.sigmoid(margin / tau).mean()), abs=0.01
        )
        shares.append(float(labels.is_outlier.double().mean()))
    assert shares == sorted(shares)
    relative = noise.stochastic(margin * 1000, 1.0, source, relative=True)
    assert float(relative.is_outlier.double().mean()) == pytest.approx(
        float(torch.sigmoid(-(margin / margin.std()).abs()).mean()), abs=0.01
    )


def test_the_myopic_annotator_minds_the_end() -> None:
    first = torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    second = torch.tensor([[0.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    labels = noise.myopic(first, second, 0.3)
    assert labels.sign.tolist() == [-1, 1] and labels.is_outlier.tolist() == [True, False]
    assert noise.myopic(first, second, 1.0).is_outlier.tolist() == [False, False]


def test_a_tie_contradicts_nothing() -> None:
    for labels in (noise.random_flip(torch.zeros(4), 1.0), noise.irrational(torch.zeros(4), 0.5)):
        assert not bool(labels.is_outlier.any()) and bool((labels.sign.abs() == 1).all())


def test_the_same_seed_gives_the_same_labels_and_margins_stay_as_they_are() -> None:
    margin = _margin(100)
    copy = margin.clone()
    draw = lambda: noise.random_flip(margin, 0.3, torch.Generator().manual_seed(7)).sign  # noqa: E731
    assert torch.equal(draw(), draw()) and torch.equal(margin, copy)
    sign = torch.ones(100)
    noise.random_flip(margin, 0.5, sign=sign)
    assert bool((sign == 1).all())


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="margin is empty"):
        noise.irrational(torch.zeros(0), 0.5)
    with pytest.raises(ValueError, match="margin holds NaN or infinity; the true rewards must be finite"):
        noise.random_flip(torch.tensor([torch.inf]), 0.5)
    with pytest.raises(ValueError, match="tau=0 must be above 0"):
        noise.stochastic(torch.ones(2), 0)
    with pytest.raises(ValueError, match="gamma=2 must be above 0"):
        noise.myopic(torch.ones(2, 3), torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match=r"first has shape \(2, 3\) and second \(2, 4\)"):
        noise.myopic(torch.ones(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match="power=1 must lie between 0 and 1"):
        noise.irrational(torch.ones(2), 1)
    with pytest.raises(ValueError, match="rate=1.5 must be a share"):
        noise.random_flip(torch.ones(2), 1.5)

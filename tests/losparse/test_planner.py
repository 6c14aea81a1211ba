"""The planner meets its target at the least loss, says why, and leaves the model alone until it is asked."""

from __future__ import annotations

import copy

import pytest
import torch

from zq_lib.core.models import tiny
from zq_lib.losparse import LoSparseConfig, prices
from zq_lib.losparse.calibration import mean_loss
from zq_lib.losparse.layer import LowRankSparse
from zq_lib.losparse.planner import plan
from zq_lib.losparse.prices import Price, time_layer
from zq_lib.losparse.targets import find_layers

SMALL = {"by": "flops", "tokens": 64}


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(3, 128, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": x} for x in ids]


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.mark.parametrize("target", [0.75, 0.4])
def test_a_plan_in_multiply_adds_is_kept_to_the_row(llama, batches, target) -> None:
    made = plan(llama, batches, target, **SMALL)
    before = copy.deepcopy(llama)
    whole = {n: m.weight.numel() for n, m in find_layers(before)[0].items()}
    report = made.compress(llama).report()
    needed = sum(x.flops for x in report.layers) + sum(whole[n] for n in report.left_dense)
    assert target - 0.02 < needed / sum(whole.values()) <= target
    assert needed / sum(whole.values()) == pytest.approx(made.share)
    assert set(report.left_dense) == set(made.stay_dense)
    taken = next(r for r in made.rows if r["low_rank"] == made.config.low_rank)
    assert taken["loss"] == min(r["loss"] for r in made.rows if r["meets"])
    assert mean_loss(llama, batches) == pytest.approx(taken["loss"], rel=1e-4) != mean_loss(before, batches)


def test_planning_changes_nothing(llama, batches) -> None:
    before, flags = copy.deepcopy(llama.state_dict()), [p.requires_grad for p in llama.parameters()]
    llama.train()
    plan(llama, batches, 0.5, shares=(0.05,), **SMALL)
    assert llama.training and [p.requires_grad for p in llama.parameters()] == flags
    for name, t in llama.state_dict().items():
        assert torch.equal(t, before[name])


def test_layers_that_would_lose_stay_dense_and_the_reason_has_the_numbers(llama, batches, monkeypatch) -> None:
    slow = (32, 32)  # the square matrices gain nothing from being cut, as small ones do with few tokens

    def clock(outputs: int, inputs: int, rank: int, rows: int, tokens: int, **_: object) -> dict:
        shrunk = 2.0 if (outputs, inputs) == slow else rows / outputs
        return {"shrunk_s": shrunk, "dense_s": 1.5, "rows": rows}

    monkeypatch.setattr(prices, "time_layer", clock)
    made = plan(llama, batches, 0.6, tokens=16, shares=(0.1,))
    square = {n for n, m in llama.named_modules() if getattr(m, "weight", None) is not None and m.weight.shape == slow}
    assert square and square <= set(made.stay_dense) and "1.33 times as long" in str(made)
    handle = made.compress(llama)
    assert all(type(handle.model.get_submodule(n)) is torch.nn.Linear for n in square)
    assert any(isinstance(m, LowRankSparse) for m in llama.modules())
    assert made.timings and made.share <= 0.6


def test_a_target_that_nothing_meets_is_refused_with_what_was_tried(llama, batches) -> None:
    with pytest.raises(ValueError, match="met by none of rho_L = 0.3"):
        plan(llama, batches, 0.2, shares=(0.3,), **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, "target=1.5"),
        ({"by": "size"}, "by='size'"),
        ({"tokens": 0}, "tokens=0"),
        ({"shares": (1.0,)}, r"shares=\(1.0,\)"),
    ],
)
def test_what_cannot_be_planned_is_refused(llama, batches, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(llama, batches, **{"target": 0.5, **settings})


def test_prices_are_read_between_the_measured_points() -> None:
    price = Price(inputs=8, dense=10.0, most=60, rows=(0, 50, 100), shrunk=(2.0, 4.0, 14.0))
    assert [price.at(n) for n in (0, 25, 50, 75, 100)] == [2.0, 3.0, 4.0, 9.0, 14.0]
    assert [price.best(n) for n in (25, 60, 61, 100)] == [3.0, 6.0, 10.0, 10.0]
    assert not price.pays(61) and "more than 60" in price.reason(61)


def test_a_config_of_ones_own_is_kept(llama, batches) -> None:
    config = LoSparseConfig(init="svd", skip=("down_proj",))
    made = plan(llama, batches, 0.6, shares=(0.05,), config=config, **SMALL)
    assert made.config.init == "svd" and made.config.exact and "down_proj" in made.config.skip
    assert not any("down_proj" in name for name in made.calibration.factors)


def test_a_layer_is_timed_both_ways() -> None:
    row = time_layer(64, 48, 4, 10, 32, repeats=3)
    assert row["dense_s"] > 0 and row["shrunk_s"] > 0 and row["gain_low"] <= row["gain"] <= row["gain_high"]

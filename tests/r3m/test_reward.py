"""Reward models: features, segments and tokens, trained by the capped loss, at the price of the plain one."""

from __future__ import annotations

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from zq_lib.core.timing import cpu_seconds
from zq_lib.r3m import (
    PairBatches,
    R3MConfig,
    RobustRewardLoss,
    SegmentReward,
    Standardised,
    fit_reward,
    noise,
    outlier_report,
    pair_margins,
    preference_loss,
    rewards_of,
)
from zq_lib.r3m import reference as ref


def _segments(n: int = 256, steps: int = 10, width: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides of n pairs of segments and their true margins: each step pays a bent function of its state."""
    source = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, steps, width, generator=source) for _ in range(2))
    pay = lambda s: torch.tanh(s[..., 0] + 0.5 * s[..., 1] ** 2).sum(1)  # noqa: E731
    return first, second, pay(first) - pay(second)


def _fit(model: nn.Module, batches, config: R3MConfig, epochs: int = 8, rate: float = 3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return list(fit_reward(model, batches, optimizer, RobustRewardLoss(config), epochs=epochs))


def test_a_segment_reward_learns_the_order_and_its_report_names_the_flipped_pairs() -> None:
    first, second, margin = _segments(512)
    labels = noise.random_flip(margin, 0.1, torch.Generator().manual_seed(1))
    chosen, rejected = noise.ordered(first, second, labels.sign)
    torch.manual_seed(0)
    model = SegmentReward(4, (32, 32))
    batches = PairBatches(chosen, rejected, 64, torch.Generator().manual_seed(0))
    steps = _fit(model, batches, R3MConfig(lam=0.3), epochs=15)
    assert len(steps) == 120 and steps[-1].step == 120 and not model.training
    assert steps[0].flagged == 1, "at the beginning every pair is, for lam below 0.5"
    assert sum(s.loss for s in steps[-8:]) < sum(s.loss for s in steps[:8])
    report = outlier_report(*pair_margins(model, batches), lam=0.3)
    assert report.pairs == 512 and report.against(labels.is_outlier).auroc > 0.85
    test = _segments(1000, seed=5)
    found = rewards_of(model, test[0]) - rewards_of(model, test[1])
    assert float((found * test[2] > 0).double().mean()) > 0.85


def test_features_train_with_any_module_of_one_output() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    better = x[:, 0] > 0
    chosen, rejected = torch.where(better[:, None], x, -x), torch.where(better[:, None], -x, x)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    _fit(model, PairBatches(chosen, rejected, 50), R3MConfig(lam=0.5), epochs=40, rate=0.05)
    margin, index = pair_margins(model, PairBatches(chosen, rejected, 64))
    assert float((margin > 0).double().mean()) > 0.95 and torch.equal(index, torch.arange(200))


def test_token_sequences_train_a_classifier_with_one_label() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)  # fmt: skip
    model = LlamaForSequenceClassification(config)
    ids = torch.randint(3, 20, (64, 5))
    good = {"input_ids": torch.cat((ids, torch.full((64, 1), 1)), 1), "attention_mask": torch.ones(64, 6).long()}
    bad = {"input_ids": torch.cat((ids, torch.full((64, 1), 2)), 1), "attention_mask": torch.ones(64, 6).long()}
    batches = PairBatches(good, bad, 16, torch.Generator().manual_seed(0))
    steps = _fit(model, batches, R3MConfig(lam=0.5), epochs=5, rate=1e-2)
    assert float(steps[-1].margin.min()) > 0 and steps[-1].index.shape == (16,)


def test_two_accumulated_batches_are_one_large_one() -> None:
    first, second, _ = _segments(64)
    found = []
    for size, accumulate in ((64, 1), (32, 2)):
        torch.manual_seed(0)
        model = SegmentReward(4, (8,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = RobustRewardLoss(R3MConfig(lam=0.4))
        batches = PairBatches(first, second, size)
        steps = list(fit_reward(model, batches, optimizer, loss, epochs=3, accumulate=accumulate))
        assert len(steps) == 3 and len(steps[0].margin) == 64
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_at_lam_1_the_parameters_are_cross_entropys_to_the_last_bit() -> None:
    first, second, _ = _segments(96)
    found = []
    for config in (R3MConfig(lam=1.0), R3MConfig(loss="cross_entropy"), None):
        torch.manual_seed(0)
        model = SegmentReward(4, (8, 8)).double()
        batches = PairBatches(first.double(), second.double(), 32)
        if config:
            _fit(model, batches, config, epochs=3)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for batch in list(batches) * 3:
                chosen, rejected = model(batch.inputs).chunk(2)
                optimizer.zero_grad()
                (-F.logsigmoid(chosen - rejected).mean()).backward()
                optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_ragged_segments_need_a_mask_and_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model = SegmentReward(4, (8,), gamma=0.9).double()
    segments = torch.randn(3, 6, 4, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 2, 1])[:, None]
    expected = torch.stack(
        [ref.segment_reward(model.step(s[m])[None, :, 0], 0.9)[0] for s, m in zip(segments, mask, strict=True)]
    )
    for padding in (0.0, 1e6):
        padded = segments.masked_fill(~mask[..., None], padding)
        torch.testing.assert_close(rewards_of(model, {"segments": padded, "mask": mask}), expected)
    with pytest.raises(ValueError, match="row 1 of mask has no step; drop segments that are empty"):
        model(segments, mask & (torch.arange(3) != 1)[:, None])
    with pytest.raises(ValueError, match=r"chosen has shapes .*\(3, 6, 4\).* and rejected .*\(3, 5, 4\).*; pad both"):
        PairBatches(segments, segments[:, :5])


def test_rewards_that_overflow_stop_the_training_before_they_reach_the_parameters() -> None:
    first, second, _ = _segments(8)
    first[3] = torch.inf
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the margin of pair 3 is .*: its rewards overflow or hold NaN"):
        _fit(model, PairBatches(first, second, 8), R3MConfig(lam=0.3), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="the margin of pair 3 is"):
        pair_margins(model, PairBatches(first, second, 8))


def test_standardised_rewards_have_the_same_order_and_a_scale_of_one() -> None:
    first, second, _ = _segments(100)
    torch.manual_seed(0)
    model = SegmentReward(4)
    inputs = torch.cat((first, second))
    with torch.no_grad():
        plain, scaled = rewards_of(model, inputs), rewards_of(Standardised(model, inputs), inputs)
    assert torch.equal(plain.argsort(), scaled.argsort())
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-5) and float(scaled.std()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="the rewards of inputs are all equal"):
        Standardised(model, first[:1].repeat(3, 1, 1))


def test_bad_input_is_one_clear_sentence() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"outputs of shape \(8, 2\), not one reward for each row; use num_labels=1"):
        _fit(nn.Linear(3, 2), PairBatches(x, x), R3MConfig())
    with pytest.raises(ValueError, match="there are 0 pairs in batches of 64"):
        PairBatches(x[:0], x[:0])
    with pytest.raises(ValueError, match="batches is empty, and the model learned nothing"):
        _fit(nn.Linear(3, 1), [], R3MConfig())
    with pytest.raises(ValueError, match="batches is empty; give at least one pair"):
        pair_margins(nn.Linear(3, 1), [])


def test_robustness_costs_at_most_three_percent_of_plain_training() -> None:
    """The same loop with torch's own logsigmoid and with the capped loss, step by step in turns: the calmest of six
    medians, on the smallest model that a real task has (25 to 30 steps of a robot, 64 pairs)."""
    first, second, _ = _segments(512, 30, 23)
    batches = PairBatches(first, second, 64)

    def steps(loss_of):
        model = SegmentReward(23)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(40):
            for batch in batches:
                chosen, rejected = model(batch.inputs).chunk(2)
                loss = loss_of(chosen - rejected)
                loss.backward()
                value = float(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                yield value

    plain, robust = steps(lambda m: -F.logsigmoid(m).mean()), steps(lambda m: preference_loss(m, 0.3))
    ratios = []
    for place in range(300):
        order = (robust, plain) if place % 2 else (plain, robust)
        times = {run: cpu_seconds(lambda run=run: next(run)) for run in order}
        ratios.append(times[robust] / times[plain])
    assert min(median(ratios[k : k + 50]) for k in range(0, 300, 50)) <= 1.03

"""The benchmarks on a toy model: every one fills its tables, and the numbers mean what the columns say."""

from __future__ import annotations

import pytest

from zq_lib.core.models import tiny
from zq_lib.masformer import benchmark
from zq_lib.masformer.passkey import selection
from zq_lib.masformer.training import TrainingConfig


@pytest.fixture
def toy(smollm2, monkeypatch):
    _, tokenizer = smollm2
    monkeypatch.setattr(
        benchmark.models,
        "load",
        lambda: (tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=8192), tokenizer),
    )
    monkeypatch.setattr(benchmark, "COUNT", 1)
    return tokenizer


def silent(_: str) -> None: ...


def test_speed_compares_every_way_with_full_attention(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "LENGTHS", (512,))
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    rows = {r["attention"]: r for r in benchmark.speed(silent)}
    assert rows["full"]["forward_gain"] == rows["full"]["both_gain"] == 1.0
    assert rows["full, masked"]["both_ms"] == "" and len(rows) == 5
    for row in rows.values():
        assert row["forward_gain"] == pytest.approx(rows["full"]["forward_ms"] / row["forward_ms"])


def test_the_whole_model_reports_bytes_that_the_plan_predicts(toy, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "DECODED", 2)
    rows = benchmark.whole(silent)
    for row in rows:
        assert row["cache_mb"] == pytest.approx(row["cache_predicted_mb"], rel=0.01)
    full, ours = rows[:2]
    assert ours["cache_mb"] < 0.5 * full["cache_mb"] and ours["score_entries"] < full["score_entries"] == 1.0
    assert full["prefill_gain"] == full["step_gain"] == full["predicted_gain"] == 1.0 < ours["predicted_gain"]


def test_training_judges_before_and_after_each_diet(toy, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "RECIPE", TrainingConfig(steps=2))
    monkeypatch.setattr(benchmark, "TRAIN_LENGTH", 64)
    monkeypatch.setattr(benchmark, "QUOTE", 16)
    monkeypatch.setattr(benchmark, "DIETS", (("even", 16),))
    monkeypatch.setattr(benchmark.passkey, "held_out", lambda tokenizer, *_: selection(tokenizer, 1, 100))
    found = benchmark.training(silent)
    assert [r["step"] for r in found["training"]] == [0, 2] and found["training"][1]["tokens"] == 128
    assert {r["diet"] for r in found["training"]} == {"quoting"} and len(found["training_curves"]) == 2
    assert found["training"][0]["perplexity"] != found["training"][1]["perplexity"]

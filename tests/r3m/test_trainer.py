"""transformers' Trainer: rewards and policies learn, the log names the flagged share, runs resume bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments

from zq_lib.core import models
from zq_lib.r3m import R3MConfig, ReferenceCache, RobustDPOTrainer, RobustRewardTrainer
from zq_lib.r3m.trainer import BUDGET


def _reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_labels=1, pad_token_id=0)
    )  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    def build(**settings) -> TrainingArguments:
        options = dict(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, seed=3,
            report_to=[], logging_steps=4, save_steps=5, disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        return TrainingArguments(**(options | settings))

    return build


def _build(kind: str, arguments, token_rows, config: R3MConfig, **settings):
    rows = token_rows(16)
    if kind == "reward":
        return RobustRewardTrainer(_reward_model(), arguments(**settings), config=config, train_dataset=rows,
            eval_dataset=rows)  # fmt: skip
    model = models.tiny("llama", vocab_size=60)
    return RobustDPOTrainer(model, arguments(**settings), config=config, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("kind", ["reward", "policy"])
def test_it_learns_and_logs_the_flagged_share_and_reports_suspects(kind: str, arguments, token_rows) -> None:
    trainer = _build(kind, arguments, token_rows, R3MConfig(lam=0.3, beta=0.1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "r3m_flagged" in entry]
    assert len(logged) == 3 and logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["r3m_accuracy"] >= logged[0]["r3m_accuracy"] and 0 <= logged[-1]["r3m_flagged"] <= 1
    assert trainer.evaluate()["eval_loss"] < before
    report = trainer.report()
    assert report.pairs == 16 and report.lam == 0.3 and sorted(report.indices) == list(range(16))
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (16,)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("policy", R3MConfig(lam=0.6)), ("reward", R3MConfig(lam="auto", outlier_budget=0.2))],
)
def test_a_run_resumed_from_a_checkpoint_equals_the_uninterrupted_one(
    kind: str, config: R3MConfig, arguments, token_rows, tmp_path
) -> None:
    trainer = _build(kind, arguments, token_rows, config)
    trainer.train()
    saved = tmp_path / "checkpoint-5"
    assert (saved / BUDGET).exists() == (config.outlier_budget is not None)
    again = _build(kind, arguments, token_rows, config)
    again.train(resume_from_checkpoint=str(saved))
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.loss.lam == trainer.loss.lam


def test_gradient_accumulation_is_one_large_batch(arguments, token_rows) -> None:
    plain = dict(max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=2, optim="sgd")
    found = []
    for settings in ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 2}):
        trainer = _build("policy", arguments, token_rows, R3MConfig(lam=0.6), **plain, **settings)
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_cache_takes_the_place_of_the_reference(arguments, token_rows) -> None:
    rows, model = token_rows(16), models.tiny("llama", vocab_size=60)
    cache = ReferenceCache.of(models.tiny("llama", vocab_size=60), rows)

    def build(**more) -> RobustDPOTrainer:
        return RobustDPOTrainer(model, arguments(), config=R3MConfig(**more), train_dataset=rows, reference=cache)

    assert build().train_dataset[3]["reference"] == cache.logps[3].tolist()
    assert build().report().accuracy <= 1 and build().report().margins == pytest.approx([0.0] * 16, abs=1e-5)
    with pytest.raises(ValueError, match="the reference has average=False and the config average=True; make it anew"):
        build(average=True)
    with pytest.raises(ValueError, match="these rows have no reference; join them first"):
        build().report(rows)


def test_columns_have_to_stay(arguments, token_rows) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=True would take everything out of the rows"):
        _build("reward", arguments, token_rows, R3MConfig(), remove_unused_columns=True)

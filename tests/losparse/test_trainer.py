"""transformers' Trainer: the callback brings the steps, logs, and checkpoints that resume bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from zq_lib.losparse import LoSparseCallback, LoSparseConfig, attach

CONFIG = LoSparseConfig(low_rank=0.1, remaining=0.2, warmup=2, final=8, interval=2)


class Rows(Dataset):
    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (64, 6), generator=source)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i].sum() % 2)}


def _trainer(folder, config=CONFIG, **settings):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    handle = attach(model, config)
    options = dict(
        output_dir=str(folder), max_steps=24, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        logging_steps=6, save_steps=7, disable_tqdm=True, use_cpu=True, seed=3, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(**(options | settings)), train_dataset=Rows(), eval_dataset=Rows(),
        callbacks=[LoSparseCallback(handle)],
    )  # fmt: skip
    return trainer, handle


def test_the_callback_takes_the_number_of_steps_and_the_rows_meet_the_budget(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path)
    trainer.train()
    report = handle.finish()
    assert handle.schedule.total == 24 and handle.step == 24 and report.fixed and handle.shrunk
    assert sum(x.rows * x.inputs for x in report.layers) == pytest.approx(
        0.2 * sum(x.outputs * x.inputs for x in report.layers), abs=25
    )
    logged = [entry for entry in trainer.state.log_history if "losparse_share" in entry]
    assert logged[-1]["losparse_share"] == 0.2 and logged[-1]["losparse_ratio"] == report.ratio and len(logged) >= 4


def test_gradient_accumulation_counts_optimiser_steps(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert handle.step == 24 and handle.shrunk
    handle.merge()


@pytest.mark.parametrize("stop", [7, 21])
def test_a_run_resumed_by_the_trainer_equals_the_uninterrupted_one(tmp_path, stop: int) -> None:
    """Once before the rows are cut, once after."""
    trainer, handle = _trainer(tmp_path)
    trainer.train()
    again, resumed = _trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.step == 24 and torch.equal(resumed.keep, handle.keep) and resumed.shrunk
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_config_with_another_number_of_steps_is_refused(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path, LoSparseConfig(total_steps=100))
    with pytest.raises(ValueError, match="total_steps=100, but this training takes 24 steps"):
        trainer.train()
    handle.merge()


def test_a_best_model_from_before_the_cut_is_noticed(tmp_path) -> None:
    trainer, handle = _trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=7, metric_for_best_model="eval_worse"
    )
    trainer.compute_metrics = lambda _: {"worse": -trainer.state.global_step}
    with pytest.raises(RuntimeError, match="load_best_model_at_end brought back a checkpoint from before"):
        trainer.train()
    handle.merge()

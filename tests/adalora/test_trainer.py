"""transformers' Trainer: the callback brings T, checkpoints resume bit for bit, the log shows the budget."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from zq_lib.adalora import AdaLoraCallback, AdaLoraConfig, attach

CONFIG = AdaLoraConfig(init_rank=4, target_rank=2, warmup=2, final=8, interval=2, train_also=("classifier",))


class Rows(Dataset):
    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (64, 6), generator=source)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i].sum() % 2)}


def _model():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def _trainer(folder, config=CONFIG, **settings):
    model = _model()
    handle = attach(model, config)
    options = dict(
        output_dir=str(folder), max_steps=24, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        logging_steps=6, save_steps=7, disable_tqdm=True, use_cpu=True, seed=3, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(**(options | settings)), train_dataset=Rows(), callbacks=[AdaLoraCallback(handle)]
    )
    return trainer, handle


def test_the_callback_takes_the_number_of_steps_and_the_ranks_meet_the_budget(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path)
    trainer.train()
    assert handle.schedule.total == 24 and handle.step == 24
    report = handle.report()
    assert report.active == 2 * len(handle.adapters) and report.finished
    logged = [entry for entry in trainer.state.log_history if "adalora_budget" in entry]
    assert [entry["adalora_budget"] for entry in logged][-1] == report.budget and len(logged) >= 4


def test_gradient_accumulation_counts_optimiser_steps(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert handle.step == 24 and handle.report().finished


@pytest.mark.parametrize("stop", [7, 21])
def test_a_run_resumed_by_the_trainer_equals_the_uninterrupted_one(tmp_path, stop: int) -> None:
    trainer, handle = _trainer(tmp_path)
    trainer.train()
    again, resumed = _trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.step == 24 and torch.equal(resumed.keep, handle.keep)
    for a, b in zip(handle.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_config_with_another_number_of_steps_is_refused(tmp_path) -> None:
    trainer, _ = _trainer(tmp_path, AdaLoraConfig(total_steps=100, init_rank=4, target_rank=2))
    with pytest.raises(ValueError, match="total_steps=100, but this training takes 24 steps"):
        trainer.train()


def test_evaluation_reports_the_task_loss_alone(tmp_path) -> None:
    trainer, handle = _trainer(tmp_path, AdaLoraConfig(init_rank=4, target_rank=2, orthogonality=9.0))
    data = Rows()
    with torch.no_grad():
        want = trainer.model.eval()(
            input_ids=data.ids[:8], labels=torch.tensor([data[i]["labels"] for i in range(8)])
        ).loss
    found = trainer.evaluate(torch.utils.data.Subset(data, range(8)))["eval_loss"]
    assert found == pytest.approx(float(want), abs=1e-7) and float(handle.penalty().detach()) > 1
    handle.detach()

"""transformers' Trainer: filters train along, the log has the terms, checkpoints resume bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from zq_lib.ted import StateCache, TedConfig, TedLoss, TedTrainer, distil, fit, task_filters
from zq_lib.ted.trainer import FILTERS

CONFIG = TedConfig(filter_dim=6, dropout=0.0)


class Rows(Dataset):
    def __init__(self, batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int):
        return {k: v[i] for k, v in self.batch.items()}


@pytest.fixture
def trainer_of(make, batch_of, tmp_path):
    """`trainer_of(cached, **settings)`: a TedTrainer on 32 rows, the same every time."""

    def build(cached: bool = False, folder: str = "", **settings) -> TedTrainer:
        teacher, student = make(depth=4, width=16), make(depth=2, width=8)
        data = batch_of(rows=32)
        torch.manual_seed(3)
        pair = task_filters(teacher, student, CONFIG)
        for filters in pair:
            list(fit(filters, [data]))
        ted = TedLoss(teacher, *pair, CONFIG)
        cache = StateCache.of(teacher, [data], ted.teacher_layers) if cached else None
        options = dict(
            output_dir=str(tmp_path / folder), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, seed=3,
            report_to=[], logging_steps=3, save_steps=5, disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        return TedTrainer(
            student, TrainingArguments(**(options | settings)), ted=ted, cache=cache, train_dataset=Rows(data),
            eval_dataset=Rows(data),
        )  # fmt: skip

    return build


@pytest.mark.parametrize("cached", [False, True])
def test_the_student_and_its_filters_train_and_the_log_has_the_terms(cached: bool, trainer_of) -> None:
    trainer = trainer_of(cached)
    filters = [p.detach().clone() for p in trainer.ted.parameters()]
    teacher = copy.deepcopy(trainer.ted.teacher.state_dict())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "ted_kd" in entry]
    assert len(logged) == 4 and logged[-1]["loss"] < logged[0]["loss"]
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["ted_task"] + entry["ted_kd"] + entry["ted_layer"], rel=1e-4)
    assert all(not torch.equal(a, b) for a, b in zip(filters, trainer.ted.parameters(), strict=True))
    assert all(torch.equal(v, teacher[k]) for k, v in trainer.ted.teacher.state_dict().items())
    assert all(p.grad is None for p in trainer.ted.parameters()), "the next step would add to a gradient that stayed"
    evaluated = trainer.evaluate()
    assert "eval_loss" in evaluated and evaluated["eval_loss"] < logged[-1]["loss"]


def test_it_takes_the_steps_of_the_plain_loop(trainer_of) -> None:
    trainer = trainer_of(max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=4, optim="sgd")
    student, ted = copy.deepcopy(trainer.model), copy.deepcopy(trainer.ted)
    ted._teacher = trainer.ted._teacher
    for model in (student, trainer.model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    batches = list(trainer.get_train_dataloader())
    optimizer = torch.optim.SGD([*student.parameters(), *ted.parameters()], lr=1e-2)
    list(distil(student, ted, batches, optimizer))
    trainer.get_train_dataloader = lambda: batches
    trainer.train()
    for a, b in zip(
        [*student.parameters(), *ted.parameters()],
        [*trainer.model.parameters(), *trainer.ted.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_resumed_from_a_checkpoint_equals_the_uninterrupted_one(trainer_of, tmp_path) -> None:
    trainer = trainer_of()
    trainer.train()
    saved = tmp_path / "checkpoint-5"
    assert (saved / FILTERS).exists() and not any("filter" in k for k in trainer.model.state_dict())
    again = trainer_of()
    again.train(resume_from_checkpoint=str(saved))
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(trainer.ted.parameters(), again.ted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation_is_one_large_batch(trainer_of) -> None:
    plain = dict(max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=2, optim="sgd")
    found = []
    for settings in ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 2}):
        trainer = trainer_of(**plain, **settings)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.ted.config = TedConfig(filter_dim=6, layer_weight=1.0)
        trainer.train()
        found.append([p.detach() for p in trainer.ted.parameters()])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= 2e-2 * float(a.norm()), (
            "a mean over tokens of 8 rows is not that of 16, but near"
        )


def test_a_cache_needs_the_examples_numbers(trainer_of) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=True takes 'example' out of the batches"):
        trainer_of(cached=True, remove_unused_columns=True)

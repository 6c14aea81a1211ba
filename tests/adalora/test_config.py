"""Settings check themselves, and the budget takes the values the paper's schedule must take."""

from __future__ import annotations

import dataclasses

import pytest

from zq_lib.adalora import AdaLoraConfig, Schedule, reference
from zq_lib.adalora.config import PAPER_TASKS


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ((40, 4, 10, 1, 72, 36), {4: 72, 5: 68, 6: 64, 17: 40, 29: 36, 30: 36, 39: 36}),
        ((1000, 100, 200, 1, 864, 576), {100: 864, 101: 862, 102: 861, 450: 612, 799: 576, 800: 576}),
    ],
)
def test_the_schedule_takes_the_golden_values(case, values) -> None:
    schedule = Schedule(*case)
    total, warmup, final, _, start, target = case
    for step, budget in values.items():
        assert schedule.budget(step) == budget
        assert reference.budget(step, start, target, total, warmup, final) == budget


def test_the_budget_never_rises_and_ends_at_the_target() -> None:
    schedule = Schedule(400, 50, 133, 10, 144, 36)
    budgets = [schedule.budget(t) for t in range(400)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] == 144 and budgets[-1] == 36


def test_ranks_are_shared_out_every_interval_and_once_at_the_end_of_the_budget_phase() -> None:
    assert Schedule(40, 4, 11, 5, 72, 36).allocation_steps() == [5, 10, 15, 20, 25, 29]
    assert Schedule(20, 3, 0, 7, 8, 4).allocation_steps() == [7, 14, 19]


def test_a_schedule_without_final_phase_reaches_its_target_at_the_last_step() -> None:
    schedule = Schedule(20, 3, 0, 7, 8, 4)
    assert schedule.last == 19 and schedule.budget(19) == 4


def test_a_target_not_below_the_start_prunes_nothing() -> None:
    schedule = Schedule(20, 3, 5, 1, 8, 12)
    assert not schedule.prunes and schedule.allocation_steps() == [] and schedule.budget(19) == 8


@pytest.mark.parametrize(("warmup", "final"), [(20, 0), (10, 10), (5, 30), (0, 20)])
def test_a_schedule_without_a_step_to_share_out_ranks_is_refused(warmup: int, final: int) -> None:
    with pytest.raises(ValueError, match=f"warmup={warmup} and final={final} leave no step of total_steps=20"):
        AdaLoraConfig(total_steps=20, warmup=warmup, final=final)


def test_shares_of_the_training_become_steps_and_the_interval_a_hundredth() -> None:
    schedule = AdaLoraConfig(init_rank=12, target_rank=8, total_steps=1000).schedule(cost=72)
    assert schedule == Schedule(1000, 100, 300, 10, 864, 576)
    assert AdaLoraConfig(total_steps=30).schedule(1).interval == 1


def test_a_total_budget_replaces_the_mean_rank() -> None:
    assert AdaLoraConfig(init_rank=8, budget=37, total_steps=10).schedule(10).target == 37


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"init_rank": 0}, "init_rank=0 must be a whole number of at least 1"),
        ({"init_rank": 2.5}, "init_rank=2.5"),
        ({"init_rank": True}, "init_rank=True"),
        ({"target_rank": -1}, "target_rank=-1 must be at least 0"),
        ({"target_rank": float("nan")}, "target_rank=nan"),
        ({"budget": -3}, "budget=-3"),
        ({"budget": 0, "total_steps": 20}, "the final budget is 0 ranks; raise target_rank or budget"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"interval": 0}, "interval=0"),
        ({"warmup": 1.0}, "warmup=1.0 must be a number of steps, or a share"),
        ({"final": -1}, "final=-1"),
        ({"beta1": 1.0}, "beta1=1.0 must be above 0 and below 1"),
        ({"beta2": 0}, "beta2=0"),
        ({"orthogonality": -0.1}, "orthogonality=-0.1"),
        ({"alpha": 0}, "alpha=0 must be above 0 and finite"),
        ({"dropout": 1}, "dropout=1"),
        ({"score": "best"}, "score='best' is not known; choose one of adalora"),
        ({"penalty": "l2"}, "penalty='l2'"),
        ({"ties": "random"}, "ties='random'"),
        ({"budget_unit": "bytes"}, "budget_unit='bytes'"),
        ({"min_rank": 13}, "min_rank=13 must lie between 0 and init_rank=12"),
        ({"max_rank": {"query": 20}}, "must lie between 0 and init_rank=12"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank=5 is above max_rank=4"),
        ({"ties": "threshold", "min_rank": 1}, "ties='threshold' knows no bounds"),
        ({"targets": ()}, "targets=() names nothing"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(setting: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdaLoraConfig(**setting)
    assert message in str(caught.value)


def test_the_scale_comes_from_the_initial_rank_and_is_two_by_default() -> None:
    assert AdaLoraConfig(init_rank=12).scale == pytest.approx(2, rel=1e-5)
    assert AdaLoraConfig(init_rank=4, alpha=16).scale == 16 / (4 + 1e-5)


def test_json_gives_the_same_config_back() -> None:
    config = AdaLoraConfig(targets=("query", "value"), min_rank={"query": 2}, total_steps=50, train_also=("head",))
    assert AdaLoraConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="'rank' is no setting"):
        AdaLoraConfig.from_json('{"rank": 3}')


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaLoraConfig().init_rank = 3


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_papers_settings_are_valid_for_trainings_of_their_length(task: str) -> None:
    row = PAPER_TASKS[task]
    config = AdaLoraConfig.paper(task, total_steps=row.warmup + row.final + 1000)
    assert config.penalty == "squared" and config.sensitivity_at == "pre_step"
    assert config.schedule(72).last == row.warmup + 1000


def test_a_task_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="task='IMDB' is not in the paper's tables"):
        AdaLoraConfig.paper("IMDB")

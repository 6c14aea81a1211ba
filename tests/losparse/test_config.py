"""Settings check themselves, survive JSON, and make the schedule of the paper."""

from __future__ import annotations

import pytest

from zq_lib.losparse.config import PAPER_TASKS, LoSparseConfig
from zq_lib.losparse.reference import rank_for, share
from zq_lib.losparse.schedule import Schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_rank": 0.5, "remaining": 0.6}, r"low_rank=0.5 and remaining=0.6 sum to 1.1.*lower remaining to 0.5"),
        ({"low_rank": 0, "remaining": 0}, "leave nothing of the weights; raise one"),
        ({"low_rank": -0.1}, "low_rank=-0.1 must be a share from 0 to 1"),
        ({"remaining": 15}, "remaining=15 must be a share from 0 to 1"),
        ({"remaining": float("nan")}, "remaining=nan must be a share"),
        ({"init": "pca"}, "init='pca' is not known; choose one of svd, activation"),
        ({"form": "mean"}, "form='mean' is not known; choose one of window, ema"),
        ({"score": "size"}, "score='size' is not known; choose one of sensitivity, magnitude, random"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ({"round_to": 1.5}, "round_to=1.5 must be a whole number"),
        ({"total_steps": 0}, "total_steps=0 must be a whole number"),
        ({"warmup": 1.5}, "warmup=1.5 must be a number of steps, or a share"),
        ({"final": -1}, "final=-1 must be a number of steps"),
        ({"beta": 1}, "beta=1 must be at least 0 and below 1"),
        ({"targets": ()}, r"targets=\(\) names nothing"),
        ({"skip": "query"}, "skip='query' must be a tuple of name patterns"),
        ({"min_rows": -1}, "min_rows=-1 must hold whole numbers"),
        ({"max_share": {"up": 2}}, "max_share=.* must hold shares from 0 to 1"),
        ({"min_rows": 2}, "are bounds, which the published rule does not know; set exact=True"),
        ({"total_steps": 10, "warmup": 8, "final": 2}, "leave no step of total_steps=10 to drop rows in"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoSparseConfig(**settings)


@pytest.mark.parametrize("settings", [{"low_rank": 0}, {"remaining": 0}, {"low_rank": 0.25, "remaining": 0.75}])
def test_rows_alone_and_low_rank_alone_are_settings_like_any_other(settings: dict) -> None:
    LoSparseConfig(**settings)


def test_the_config_survives_json_and_an_unknown_setting_does_not() -> None:
    config = LoSparseConfig(
        targets=("up",), skip=("down",), exact=True, min_rows={"up": 2}, max_share={"up": 0.5}, total_steps=9
    )
    assert LoSparseConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="'rank' is no setting of LoSparseConfig"):
        LoSparseConfig.from_json('{"rank": 3}')


def test_the_rank_is_that_of_the_paper() -> None:
    config = LoSparseConfig(low_rank=0.05)
    for size in ((384, 384), (384, 1536), (1536, 384), (4096, 4096), (7, 5)):
        assert config.rank(*size) == rank_for(0.05, *size)
    assert config.rank(4096, 4096) == 103
    assert LoSparseConfig(low_rank=0).rank(8, 8) == 0
    assert LoSparseConfig(low_rank=1, remaining=0).rank(8, 8) == 4


def test_the_presets_are_valid_and_an_unknown_task_is_refused() -> None:
    assert LoSparseConfig.quick(60).schedule().total == 60
    for task, row in PAPER_TASKS.items():
        config = LoSparseConfig.paper(task, total_steps=200_000)
        assert config.schedule().warmup == row.warmup and config.schedule().final == row.final and not config.shrink
    with pytest.raises(ValueError, match="task='RTE' has no sample command"):
        LoSparseConfig.paper("RTE")


def test_without_a_number_of_steps_there_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="total_steps=None: give the number of optimiser steps"):
        LoSparseConfig().schedule()


@pytest.mark.parametrize(("total", "warmup", "final"), [(100, 5, 25), (60, 0, 2), (40, 10, 1)])
def test_the_schedule_is_the_equation(total: int, warmup: int, final: int) -> None:
    schedule = Schedule(total, warmup, final, 10, 0.15)
    for step in range(total + 5):
        assert schedule.share(step) == pytest.approx(share(step, 0.15, total, warmup, final), abs=1e-15)


def test_rows_are_masked_every_interval_after_warm_up_and_at_every_step_of_the_final_phase() -> None:
    schedule = Schedule(60, 12, 20, 10, 0.2)
    assert schedule.mask_steps() == [20, 30, 40, *range(41, 60)] and schedule.last == 41


def test_a_schedule_without_a_final_phase_still_ends_at_the_target() -> None:
    schedule = Schedule(50, 0, 0, 10, 0.2)
    assert schedule.last == 49 and schedule.share(49) == 0.2 and schedule.masks(49)

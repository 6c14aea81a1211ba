"""The dry run tells what a training will do, and what looks odd, without touching the model."""

from __future__ import annotations

import pytest

from zq_lib.adalora import AdaLoraConfig, plan


def test_the_plan_has_the_schedule_and_the_bounds_of_the_parameters(toy) -> None:
    before = list(toy.state_dict())
    made = plan(toy, AdaLoraConfig(init_rank=6, target_rank=3, total_steps=100))
    assert made.layers["blocks.0.up"] == (28, 12) and len(made.layers) == 6
    assert made.parameters_at_start == 6 * 6 * 41 and made.parameters == (18 * 41, 18 * 41)
    assert made.budgets(3) == [(0, 36), (50, made.schedule.budget(50)), (99, 18)]
    assert made.warnings == () and list(toy.state_dict()) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "total_steps is missing"),
        ({"total_steps": 100, "alpha": 4, "init_rank": 12}, "so small a scale learns little"),
        ({"total_steps": 100, "target_rank": 12}, "no rank will be pruned"),
        ({"total_steps": 100, "target_rank": 11}, "less than 1.5 times the target"),
        ({"total_steps": 100, "warmup": 50, "final": 30}, "the budget phase has 20 of 100 steps"),
        ({"total_steps": 100, "interval": 30}, "shared out only"),
        ({"total_steps": 100, "final": 5}, "only 5 steps follow the last cut"),
    ],
)
def test_what_looks_odd_is_said_in_a_sentence(toy, config: dict, message: str) -> None:
    assert any(message in warning for warning in plan(toy, AdaLoraConfig(**config)).warnings)


def test_a_plan_without_a_length_has_no_budgets(toy) -> None:
    with pytest.raises(ValueError, match="give total_steps"):
        plan(toy, AdaLoraConfig()).budgets()
    assert plan(toy, AdaLoraConfig(), total_steps=50).budgets()[-1] == (49, 48)

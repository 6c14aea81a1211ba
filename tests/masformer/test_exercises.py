"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import pytest

from zq_lib.core.exercises import Exercise, verify_exercise
from zq_lib.masformer import SpanPlan, receptive_field
from zq_lib.masformer.exercises import ALL, BUDGET, DEPTH


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    assert verify_exercise(exercise) == []


@pytest.mark.parametrize(("length", "window"), [(29, 8), (30, 8), (50, 2), (7, 7)])
def test_the_depth_of_exercise_4_is_where_the_influence_cone_covers_the_text(length: int, window: int) -> None:
    depth = DEPTH.solution(length, window)
    assert receptive_field(SpanPlan((window,) * depth), length)[0].all()
    assert depth == 1 or not receptive_field(SpanPlan((window,) * (depth - 1)), length)[0].all()


def test_the_budget_of_exercise_6_is_what_a_plan_keeps() -> None:
    drops = (0.1, 1.9, -0.1, 0.5, 0.5, 0.05)
    full = BUDGET.solution(drops, 1024, 67, 3000)
    plan = SpanPlan.mixed(6, full=full, span=64, sinks=4)
    assert sum(plan.kept(layer, 1024) for layer in range(6)) <= 3000
    wider = SpanPlan.mixed(6, full=[*full, 0], span=64, sinks=4)
    assert sum(wider.kept(layer, 1024) for layer in range(6)) > 3000

"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import pytest

from zq_lib.adalora.exercises import ALL
from zq_lib.core.exercises import Exercise, verify_exercise


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    assert verify_exercise(exercise) == []

"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zq_lib.core.exercises import Exercise, verify_exercise
from zq_lib.losparse.exercises import ALIVE, ALL, BREAK_EVEN, SELECT
from zq_lib.losparse.layer import LowRankSparse
from zq_lib.losparse.reference import keep_rows


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    assert verify_exercise(exercise) == []


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(12, 7, 2), (8, 8, 1), (30, 10, 3), (6, 9, 0)])
def test_the_break_even_of_exercise_2_is_the_layers_own(outputs: int, inputs: int, rank: int) -> None:
    layer = LowRankSparse.from_dense(nn.Linear(inputs, outputs), rank)
    assert BREAK_EVEN.solution(outputs, inputs, rank) == layer.break_even


@pytest.mark.parametrize("seed", range(20))
def test_the_row_selection_of_exercise_4_is_the_rule_on_single_entries(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (30,), generator=source).float()  # with ties
    widths = torch.randint(1, 12, (30,), generator=source)
    share = float(torch.rand(1, generator=source))
    wanted = torch.cat(keep_rows(list(scores.split(1)), widths.tolist(), share))
    assert torch.equal(SELECT.solution(scores, widths, share), wanted)


def test_the_sum_of_exercise_5_loses_rows_that_are_there() -> None:
    published = ALIVE.wrong[0][0]
    sparse = torch.tensor([[1.0, -1, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [2, -1, -1, 0]])
    assert published(sparse).tolist() == [1] and ALIVE.solution(sparse).tolist() == [0, 1, 3]

"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core.exercises import Exercise, verify_exercise
from zq_lib.gear.config import GearConfig
from zq_lib.gear.exercises import ALL, BREAK_EVEN
from zq_lib.gear.packed import compress


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    assert verify_exercise(exercise) == []


def test_the_break_even_of_exercise_4_is_where_the_stored_bytes_cross() -> None:
    def bits(n: int, width: int, gear: GearConfig) -> float:
        x = torch.randn(1, 1, n, width, generator=torch.Generator().manual_seed(0))
        return 8 * sum(compress(x, gear.keys, prompt=True).nbytes().values()) / x.numel()

    lite = GearConfig.lite().but(scheme="kcvt", buffer=1)  # metadata of both are 32 / n: they cancel
    for width, rank in ((128, 4), (64, 2)):
        n = BREAK_EVEN.solution(width, rank)
        for tokens, cheaper in ((n - 1, False), (n, True)):
            costs = bits(tokens, width, lite.but(rank=rank)), bits(tokens, width, lite.but(bits=3, rank=0))
            assert (costs[0] <= costs[1]) is cheaper

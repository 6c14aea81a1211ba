"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zq_lib.core.exercises import Exercise, verify_exercise
from zq_lib.ted import TaskFilters, TedConfig
from zq_lib.ted.exercises import ALL, ONLINE, PADDING, PARAMETERS, SNIPPETS


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    assert verify_exercise(exercise) == []


def test_the_count_of_exercise_1_is_that_of_real_filters(make) -> None:
    teacher, student = make(depth=3, width=16), make(depth=3, width=8)
    filters = [TaskFilters(model, TedConfig(filter_dim=6)).filters for model in (teacher, student)]
    assert PARAMETERS.solution(8, 16, 6, 3) == (sum(p.numel() for f in filters for p in f.parameters()), 0)
    assert PARAMETERS.solution(384, 768, 768, 12)[0] == 10_635_264


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_single_pass_of_exercise_3_is_the_divergence_whatever_the_blocks(size: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    s, t = (9 * torch.randn(20, generator=source, dtype=torch.float64) for _ in range(2))
    wanted = F.kl_div(F.log_softmax(s, 0), F.log_softmax(t, 0), reduction="sum", log_target=True)
    torch.testing.assert_close(ONLINE.solution(s.split(size), t.split(size)), wanted, rtol=1e-12, atol=0)


def test_all_snippets_of_exercise_4_agree_where_nothing_is_padded() -> None:
    own, theirs = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [snippet(own, theirs, torch.ones(3, 4)) for snippet in SNIPPETS.values()]
    assert all(torch.allclose(x, found[0]) for x in found) and PADDING.solution in SNIPPETS

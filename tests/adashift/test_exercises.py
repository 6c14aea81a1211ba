"""The exercises: solutions pass, placeholders are kindly told so, wrong answers get their own hint."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from zq_lib.adashift import AdaShift
from zq_lib.adashift.counterexamples import Rule, first_moments
from zq_lib.adashift.exercises import ALL, BUGS, PERIOD, PERIOD_FOUR, ROWS, SNIPPETS, SURVIVE, TIME, broken
from zq_lib.core.exercises import Exercise, Status, verdict, verify_exercise


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_recognises_its_solution_and_every_known_mistake(exercise: Exercise) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # phi = none with a small eps warns, and one of the wrong answers is that
        assert verify_exercise(exercise) == []


def test_any_multiple_of_the_period_answers_exercise_3_and_adam_does_walk_the_wrong_way() -> None:
    assert PERIOD_FOUR.displacement(0.1, 0) > 0
    assert {n: verdict(PERIOD, n).status is Status.CORRECT for n in (3, 4, 5, 8, 12)} == {
        3: False, 4: True, 5: False, 8: True, 12: True
    }  # fmt: skip


def test_every_snippet_of_exercise_4_breaks_exactly_one_property_and_the_right_moments_none() -> None:
    assert {letter: broken(snippet) for letter, snippet in SNIPPETS.items()} == {
        k: [v] for k, v in BUGS.solution.items()
    }

    def right(gradients, n, beta1, beta2):
        window = first_moments(Rule(n=n, beta1=beta1), np.array(gradients)[:, None])[n:, 0]
        found, v = [], 0.0
        for age, (m, old) in enumerate(zip(window, gradients, strict=False), 1):
            v = beta2 * v + (1 - beta2) * old**2
            found.append((float(m), v / (1 - beta2**age)))
        return found

    assert broken(right) == []


def test_the_times_of_exercise_5_are_the_pages() -> None:
    found = [TIME.solution(124_400_000, beta1, size, 3.35e12) for beta1, size in ((0.9, 4), (0.9, 2), (0.0, 4))]
    assert found == pytest.approx([1.04, 0.89, 0.45], abs=5e-3)


def test_rows_of_exercise_6_are_what_the_optimiser_keeps() -> None:
    param = torch.nn.Parameter(torch.zeros(6, 4))
    param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer = AdaShift([param], n=2, block="row")
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["phi_ring"][0], ROWS.solution(param.grad))


@pytest.mark.parametrize("settings", [{"eps": 1e-4}, {"max_step": 10.0}, {"eps": 2e-5, "n": 2}])
def test_other_bounds_answer_exercise_7_too(settings: dict) -> None:
    assert verdict(SURVIVE, settings).status is Status.CORRECT

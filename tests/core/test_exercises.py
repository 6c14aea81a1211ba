from __future__ import annotations

from dataclasses import replace

import pytest

from zq_lib.core.exercises import Exercise, Status, check, verdict, verify_exercise


def judge(answer) -> str | None:
    assert answer(0) == 0, "Start with zero: twice nothing is nothing."
    if answer(2) == 2:
        return "That returns x itself; add it once more."
    return None if answer(3) == 6 else "Try 3: twice 3 is 6."


DOUBLE = Exercise(
    name="double",
    title="Exercise 2",
    prompt="Return twice x.",
    check=judge,
    solution=lambda x: 2 * x,
    wrong=[(lambda x: x, "x itself"), (lambda x: x + 1, "twice nothing"), (lambda x: x * x, "Try 3")],
    hint="Add x to x.",
)


def unfinished(x):
    raise NotImplementedError


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raising(error: BaseException):
    def answer(_):
        raise error

    return answer


def test_a_right_answer_is_called_correct(capsys):
    assert check(DOUBLE, lambda x: x + x) is None  # a value would be shown below the verdict
    assert capsys.readouterr().out.startswith("Exercise 2: correct. ")


@pytest.mark.parametrize("answer", [unfinished, ...])
def test_a_placeholder_counts_as_not_attempted(answer, capsys):
    check(DOUBLE, answer)
    assert capsys.readouterr().out == "Exercise 2: not attempted yet.\n"


def test_each_wrong_answer_gets_its_own_hint():
    for answer, fragment in DOUBLE.wrong:
        said = verdict(DOUBLE, answer)
        assert said.status is Status.NOT_YET and said.text.startswith("Exercise 2: not yet. ") and fragment in said.text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "TypeError: 'NoneType' object is not callable"),
        ("a word", "TypeError: 'str' object is not callable"),
        (lambda: 0, "TypeError"),
        (raising(KeyError("mask")), "KeyError: 'mask'"),
        (raising(ValueError()), "It stopped with ValueError. Add x to x."),
        (raising(Unprintable()), "It stopped with Unprintable. Add x to x."),
        (raising(SystemExit(1)), "SystemExit"),
        (lambda x: [][x], "IndexError"),
    ],
)
def test_whatever_an_answer_raises_becomes_a_sentence_with_the_hint(answer, reason):
    said = verdict(DOUBLE, answer)
    assert said.status is Status.NOT_YET and reason in said.text and said.text.endswith("Add x to x.")


def test_endless_recursion_is_caught_and_an_interrupt_is_not():
    def around(x):
        return around(x)

    assert "RecursionError" in verdict(DOUBLE, around).text
    with pytest.raises(KeyboardInterrupt):
        verdict(DOUBLE, raising(KeyboardInterrupt()))


@pytest.mark.parametrize("broken", [lambda answer: 1 / 0, None, lambda: True])
def test_a_broken_checker_does_not_raise_at_the_learner_but_fails_verification(broken):
    exercise = replace(DOUBLE, check=broken)
    assert verdict(exercise, DOUBLE.solution).status is Status.NOT_YET
    assert any("solution does not pass" in problem for problem in verify_exercise(exercise))


def test_a_checker_may_answer_with_a_truth_value():
    exercise = replace(DOUBLE, check=lambda f: f(3) == 6)
    assert verdict(exercise, lambda x: 2 * x).status is Status.CORRECT
    assert verdict(exercise, lambda x: x).text == "Exercise 2: not yet. Add x to x."


def test_a_good_exercise_has_no_problems_and_verification_is_silent(capsys):
    noisy = replace(DOUBLE, solution=lambda x: print("noise") or 2 * x)
    assert verify_exercise(DOUBLE) == verify_exercise(noisy) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"solution": lambda x: x}, "the solution does not pass"),
        ({"wrong": [(lambda x: 2 * x, "x")]}, "wrong answer 1 is taken as correct"),
        ({"wrong": [(lambda x: x, "nonsense")]}, "wrong answer 1 should hear 'nonsense'"),
        ({"wrong": [(lambda x: x, "")]}, "wrong answer 1 should hear ''"),
        ({"wrong": [(lambda x: x, "itself"), (lambda x: x + 0, "itself")]}, "wrong answer 2 shares its hint"),
        ({"wrong": []}, "lists no wrong answer"),
        ({"wrong": [(unfinished, "x")]}, "wrong answer 1 is taken as not attempted yet"),
        ({"hint": " "}, "hint is empty"),
        ({"check": lambda answer: None}, "the placeholder is not recognised"),
    ],
)
def test_verification_names_what_is_wrong_with_an_exercise(change, problem):
    found = verify_exercise(replace(DOUBLE, **change))
    assert any(problem in text for text in found), found


def test_numpy_truth_values_count_as_truth_values():
    import numpy as np

    exercise = replace(DOUBLE, check=lambda f: np.bool_(f(3) == 6))
    assert verdict(exercise, lambda x: 2 * x).status is Status.CORRECT
    assert verdict(exercise, lambda x: x).status is Status.NOT_YET

"""Exercises with instant, kind checks.

A method keeps its exercises in `zq_lib/<method>/exercises.py` as module constants, in the order of the notebook:

    BIAS = Exercise(name="bias", title="Exercise 1", prompt="...", check=..., solution=..., wrong=[...], hint="...")
    ALL = [BIAS, ...]

and the notebook asks for a verdict with the constant and the learner's answer, once per exercise:

    from zq_lib.pasta import exercises as ex
    check(ex.BIAS, bias)

The answer is usually a function. Its placeholder raises NotImplementedError; for an exercise whose answer is a value
the placeholder is `...`. Both give "not attempted yet", which is what the committed notebook shows.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """One exercise and everything that proves its checker.

    `check(answer)` says what it found: None or True if the answer is right, a sentence that helps if it is wrong,
    False for the general `hint`. `assert condition, sentence` inside it works as well.
    `title` opens the verdict ("Exercise 2"). `wrong` lists answers that learners give, each with a part of the hint
    that must greet it.
    """

    name: str
    title: str
    prompt: str
    check: Callable[[Any], str | bool | None]
    solution: Any
    wrong: Sequence[tuple[Any, str]]
    hint: str


class Status(Enum):
    """The three things that can be said of an answer."""

    CORRECT = "correct"
    NOT_YET = "not yet"
    NOT_ATTEMPTED = "not attempted yet"


@dataclass(frozen=True)
class Verdict:
    status: Status
    text: str


def verdict(exercise: Exercise, answer: Any) -> Verdict:
    """Judge an answer. Whatever the answer or the checker does, this returns; only an interrupt passes through."""
    if answer is ...:
        return _not_attempted(exercise)
    try:
        found = exercise.check(answer)
    except NotImplementedError:
        return _not_attempted(exercise)
    except AssertionError as error:
        found = _text(error) or False
    except (Exception, SystemExit) as error:
        reason = ": ".join(filter(None, (type(error).__name__, _text(error).rstrip("."))))
        found = f"It stopped with {reason}. {exercise.hint}"
    if found is None or (not isinstance(found, str) and bool(found)):
        return Verdict(
            Status.CORRECT, f"{exercise.title}: correct. Compare your answer with the folded solution below it."
        )
    hint = found if isinstance(found, str) and found else exercise.hint
    return Verdict(Status.NOT_YET, f"{exercise.title}: not yet. {hint}")


def check(exercise: Exercise, answer: Any) -> None:
    """Print the verdict on an answer, in one sentence or two. Never raises at the learner."""
    print(verdict(exercise, answer).text)


def verify_exercise(exercise: Exercise) -> list[str]:
    """What is wrong with an exercise itself, one sentence each; empty when its checker can be trusted.

    The solution must pass, the placeholder must count as not attempted, and each known wrong answer must get its own
    hint. What the answers print is swallowed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return _problems(exercise)


def _problems(exercise: Exercise) -> list[str]:
    def placeholder(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    problems = []
    for field in ("name", "title", "prompt", "hint"):
        if not getattr(exercise, field).strip():
            problems.append(f"{exercise.name}: {field} is empty")
    if not exercise.wrong:
        problems.append(f"{exercise.name}: lists no wrong answer, so nothing shows that its checker can say no")
    solved = verdict(exercise, exercise.solution)
    if solved.status is not Status.CORRECT:
        problems.append(f"{exercise.name}: the solution does not pass: {solved.text}")
    for blank in (..., *([placeholder] if callable(exercise.solution) else [])):
        said = verdict(exercise, blank)
        if said.status is not Status.NOT_ATTEMPTED:
            problems.append(f"{exercise.name}: the placeholder is not recognised: {said.text}")
    fragments = [fragment for _, fragment in exercise.wrong]
    for i, (answer, fragment) in enumerate(exercise.wrong, 1):
        said = verdict(exercise, answer)
        if said.status is not Status.NOT_YET:
            problems.append(f"{exercise.name}: wrong answer {i} is taken as {said.status.value}")
        elif not fragment or fragment not in said.text:
            problems.append(f"{exercise.name}: wrong answer {i} should hear {fragment!r} but hears: {said.text}")
        if fragments.count(fragment) > 1:
            problems.append(f"{exercise.name}: wrong answer {i} shares its hint {fragment!r} with another")
    return problems


def _not_attempted(exercise: Exercise) -> Verdict:
    return Verdict(Status.NOT_ATTEMPTED, f"{exercise.title}: not attempted yet.")


def _text(error: BaseException) -> str:
    """The first line of an error's message; empty if the error can not even be printed."""
    try:
        return str(error).strip().split("\n")[0]
    except Exception:  # a class of the learner's with a broken __str__
        return ""

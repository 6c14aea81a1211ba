"""Stop ends a run, also one that waits, and only its visitor's; stored results read back as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator

import gradio as gr
import numpy as np
import pytest

from zq_lib.ui import stored
from zq_lib.ui.runs import QUEUED, Runs


class Visitor:
    def __init__(self, name: str) -> None:
        self.session_hash = name


def pages(closed: list[bool]) -> Iterator[list[str]]:
    try:
        yield ["one", "1"]
        yield []
        yield ["two", "2"]
    finally:
        closed.append(True)


def test_a_run_that_nobody_ends_passes_on_every_page_that_shows_something():
    runs, closed = Runs("Stopped."), []
    ticket, said = runs.begin(Visitor("one"))
    assert said == QUEUED
    assert list(runs.follow(ticket, 2, pages(closed))) == [["one", "1"], ["two", "2"]] and closed == [True]


def test_stop_ends_its_own_visitors_run_and_closes_it():
    runs, closed = Runs("Stopped."), []
    one, other = Visitor("one"), Visitor("other")
    ticket, _ = runs.begin(one)
    running = runs.follow(ticket, 2, pages(closed))
    runs.begin(other)
    runs.stop(other)
    assert next(running) == ["one", "1"]
    runs.stop(one)
    assert [page[0] for page in running] == ["Stopped."] and closed == [True]
    runs.stop(one)  # nothing runs any more


def test_stop_reaches_a_run_that_still_waits():
    runs = Runs("Stopped.")
    ticket, _ = runs.begin(Visitor("one"))
    runs.stop(Visitor("one"))
    assert [page[0] for page in runs.follow(ticket, 2, pages([]))] == ["Stopped."]


def test_a_new_run_ends_the_old_one_without_a_word():
    runs, closed = Runs("Stopped."), []
    first, _ = runs.begin(Visitor("one"))
    running = runs.follow(first, 2, pages(closed))
    next(running)
    second, _ = runs.begin(Visitor("one"))
    assert list(running) == [] and closed == [True] and second == []


def test_a_clear_error_becomes_a_message_and_the_state_says_that_nothing_was_run():
    def broken() -> Iterator[list[str]]:
        raise ValueError("rank=0 is too small; give at least 1")
        yield []

    found = Runs("Stopped.").follow([], 2, broken())
    assert next(found)[0] == "Nothing was run."
    with pytest.raises(gr.Error, match="rank=0 is too small"):
        next(found)


def test_stored_results_are_rounded_open_to_their_depth_and_read_back(tmp_path):
    data = {"λ": {"a": np.array([1 / 3, 2.0]), "b": {"deep": (1, None)}}, "plain": "ü"}
    path = tmp_path / "folder" / "results.json"
    stored.write(path, stored.rounded(data))
    assert json.loads(path.read_text("utf-8")) == {"λ": {"a": [0.3333, 2.0], "b": {"deep": [1, None]}}, "plain": "ü"}
    lines = path.read_text("utf-8").splitlines()
    assert lines == ["{", ' "λ": {', '  "a": [0.3333, 2.0],', '  "b": {"deep": [1, null]}', " },", ' "plain": "ü"', "}"]

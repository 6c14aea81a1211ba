"""Tables, claims and intervals that every method's experiment shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from zq_lib.core.lab import LabResult, check_budget, proportion, read_rows, write_rows


def test_wilsons_interval_matches_its_textbook_values() -> None:
    share, low, high = proportion([True] * 8 + [False] * 2)
    assert share == 0.8
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert proportion([True] * 5)[2] == pytest.approx(1) and proportion([False] * 5)[1] == pytest.approx(0)


def test_no_observations_have_no_share() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        proportion([])


def test_rows_survive_the_way_through_a_file(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "n": 3, "x": 0.123456789, "ok": True}, {"name": "c", "n": 4, "x": 2.0, "ok": False}]
    write_rows(tmp_path / "t.csv", rows)
    assert read_rows(tmp_path / "t.csv") == [
        {"name": "a, b", "n": 3, "x": 0.12346, "ok": True},
        {"name": "c", "n": 4, "x": 2, "ok": False},
    ]


def test_find_gives_one_row_or_says_why_not() -> None:
    result = LabResult("pasta", "quick", 0, (), {"t": [{"a": 1, "b": 2}, {"a": 1, "b": 3}]})
    assert result.find("t", b=3) == {"a": 1, "b": 3}
    for where in ({"a": 1}, {"a": 9}):
        with pytest.raises(LookupError, match="rows with"):
            result.find("t", **where)


def test_an_unknown_budget_is_named() -> None:
    with pytest.raises(ValueError, match="budget='fast' is not known"):
        check_budget("fast")

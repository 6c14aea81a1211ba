"""Tables, claims and intervals that every method's experiment shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from zq_lib.core.lab import LabResult, check_budget, mean_interval, proportion, read_rows, write_rows


def test_wilsons_interval_matches_its_textbook_values() -> None:
    share, low, high = proportion([True] * 8 + [False] * 2)
    assert share == 0.8
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert proportion([True] * 5)[2] == pytest.approx(1) and proportion([False] * 5)[1] == pytest.approx(0)


def test_no_observations_have_no_share() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        proportion([])


def test_students_interval_of_a_mean_matches_its_textbook_values() -> None:
    for count, factor in ((2, 12.706), (5, 2.776), (8, 2.365), (12, 2.201), (20, 2.093)):
        values = [float(i) for i in range(count)]
        mean, low, high = mean_interval(values)
        spread = (sum((v - mean) ** 2 for v in values) / (count - 1)) ** 0.5
        assert mean == (count - 1) / 2 and high - mean == pytest.approx(mean - low)
        assert high - mean == pytest.approx(factor * spread / count**0.5, rel=1e-3)
    for values in ([1.0], [1.0] * 21):
        with pytest.raises(ValueError, match=f"values holds {len(values)} numbers; an interval needs 2 to 20"):
            mean_interval(values)


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

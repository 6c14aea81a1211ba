"""The benchmark harness and its clock."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from zq_lib.bench import harness
from zq_lib.core.lab import read_rows
from zq_lib.core.timing import cpu_seconds, paired_ratio
from zq_lib.registry import Method


def _busy(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


def test_cpu_seconds_do_not_count_waiting() -> None:
    assert cpu_seconds(lambda: time.sleep(0.2)) < 0.1
    assert cpu_seconds(lambda: _busy(0.1)) == pytest.approx(0.1, abs=0.05)


def test_a_paired_ratio_tells_twice_the_work() -> None:
    found = paired_ratio(lambda: _busy(0.01), lambda: _busy(0.02), 5)
    assert found["ratio"] == pytest.approx(2, rel=0.2)
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


def test_a_run_writes_each_table_with_device_versions_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"one": lambda say: [{"x": 1}], "two": lambda say: {"a": [{"y": 2}], "b": [{"z": 3}]}}
    monkeypatch.setattr(Method, "load", lambda self, part: SimpleNamespace(BENCHMARKS=made))
    written = harness.run("pasta", say=lambda _: None, folder=tmp_path)
    assert [p.name for p in written] == ["pasta_one.csv", "pasta_a.csv", "pasta_b.csv"]
    (row,) = read_rows(written[1])
    assert row["y"] == 2 and {"device", "torch", "transformers", "date"} <= set(row)


def test_unknown_methods_and_names_say_what_exists() -> None:
    with pytest.raises(ValueError, match="'gear2' has no benchmark; choose one of pasta"):
        harness.run("gear2")
    with pytest.raises(ValueError, match="no benchmark 'nothing'; choose from"):
        harness.run("pasta", ["nothing"])
    with pytest.raises(FileNotFoundError, match="make them with: zq bench pasta"):
        harness.results("pasta_nothing")

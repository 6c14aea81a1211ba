"""The lab's quick run, its claims, and the benchmark's tables in miniature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zq_lib.adashift import AdaShift, benchmark, lab
from zq_lib.adashift.config import AdaShiftConfig
from zq_lib.adashift.training import CONTENDERS, load_digits, train


@pytest.fixture(scope="module")
def walked():
    return lab.run(only=("walk", "factors", "sequential"))


def test_every_claim_about_the_walks_holds(walked) -> None:
    assert len(walked.claims) == 14 and all(claim.holds for claim in walked.claims)
    row = walked.find("walk", C=101, rule="AdaShift, n 1, beta1 0")
    assert row["right_way"] == row["runs"] == 20 and row["high"] < 0


def test_a_shift_by_the_period_is_adam_in_the_table(walked) -> None:
    adam, same = (walked.find("sequential", d=3, n=n) for n in (0, 3))
    assert adam["closed_form"] == same["closed_form"] > 0 and adam["walked"] == pytest.approx(same["walked"], rel=1e-9)


def test_a_walk_the_other_way_breaks_its_claim(walked) -> None:
    rows = [dict(r) for r in walked.tables["walk"]]
    rows[0]["right_way"] = 1
    assert [c.holds for c in lab.claims({"walk": rows})].count(False) == 1


def test_unknown_budgets_and_tables_are_named() -> None:
    with pytest.raises(ValueError, match="budget='slow'"):
        lab.run(budget="slow")
    with pytest.raises(ValueError, match="only='walks' is not a table; choose from walk, factors, sequential, digits"):
        lab.run(only=("walks",))


def test_the_digits_are_learned_by_all_four_in_the_quick_run() -> None:
    pytest.importorskip("sklearn")
    found = lab.run(AdaShiftConfig.quick(), only=("digits",))
    assert [row["optimizer"] for row in found.tables["digits"]] == list(lab.QUICK_CONTENDERS)
    assert all(row["accuracy"] > 0.9 for row in found.tables["digits"]) and all(c.holds for c in found.claims)
    first = [r["loss"] for r in found.tables["curves"] if r["optimizer"] == "AdaShift max"]
    assert first[0] > 2 and first[-1] < 0.3


def test_the_identity_with_the_published_eps_leaves_the_finite_numbers_or_fails_to_learn() -> None:
    pytest.importorskip("sklearn")
    data = load_digits(0)
    with pytest.warns(UserWarning, match="diverges"):
        row, _ = train(data, lambda p: AdaShift(p, phi="none", eps=1e-10, n=1, betas=(0.0, 0.999)), 0, 5)
    assert row["accuracy"] < 0.9
    row, _ = train(data, lambda p: AdaShift(p, phi="none", lr=1e-3), 0, 5)
    assert row["accuracy"] > 0.9 and math.isfinite(row["loss"])


def test_every_contender_makes_an_optimiser_at_its_rate() -> None:
    param = nn.Parameter(torch.zeros(2))
    assert [c([param]).param_groups[0]["lr"] for c in CONTENDERS] == [c.lr for c in CONTENDERS]
    assert CONTENDERS[0]([param], 0.5).param_groups[0]["lr"] == 0.5


def test_the_table_of_step_times_has_every_optimiser_and_the_bytes_it_keeps(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "MODELS", {"tiny": lambda: [(300, 10), (300,)]})
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    rows = {row["optimizer"]: row for row in benchmark.step(lambda _: None)}
    assert set(rows) == set(benchmark.STEPPERS) and rows["Adam foreach"]["of_foreach"] == 1
    assert rows["AdaShift max, beta1 0"]["state_bytes"] == 2 * 4 * (10 + 3)
    assert rows["AdaShift max"]["bytes_each"] == pytest.approx(44, rel=0.01)
    assert rows["AdaShift max, bf16 ring"]["bytes_each"] == pytest.approx(24, rel=0.01)


def test_the_transformers_shapes_hold_25_million_entries() -> None:
    shapes = list(benchmark.transformer())
    assert len(shapes) == 96 and sum(math.prod(s) for s in shapes) == 25_219_072

"""Who is suspected, in which order, and against the truth."""

from __future__ import annotations

import json
import math

import pytest
import torch

from zq_lib.r3m import noise, outlier_offset, outlier_report, profile_optimum


def test_suspects_come_with_the_strongest_first() -> None:
    margin = torch.tensor([2.0, -3.0, 0.5, -0.1])
    report = outlier_report(margin, torch.tensor([10, 11, 12, 13]), lam=0.5)
    assert [s.index for s in report.suspects] == [11, 13]
    first = report.suspects[0]
    assert first.margin == -3 and first.offset == 3
    assert first.doubt == pytest.approx(1 / (1 + math.exp(-3)))
    assert report.pairs == 4 and report.flagged == 2 and report.share == 0.5 and report.accuracy == 0.5
    assert [s.offset for s in report.suspects] == pytest.approx(
        outlier_offset(margin, 0.5).sort(descending=True).values[:2].tolist()
    )


def test_batches_in_any_order_make_the_same_report_and_repeats_count_once() -> None:
    margin, index = torch.tensor([2.0, -3.0, 0.5, -0.1]), torch.arange(4)
    whole = outlier_report(margin, index, lam=0.3)
    parts = outlier_report([margin[2:], margin[:2], margin[:1]], [index[2:], index[:2], index[:1]], lam=0.3)
    assert parts.suspects == whole.suspects and parts.pairs == 4
    assert outlier_report(margin, lam=0.3).suspects == whole.suspects


def test_flags_are_judged_against_the_truth() -> None:
    report = outlier_report(torch.tensor([-2.0, -1.0, 1.0, 3.0]), lam=0.5)
    found = report.against(torch.tensor([True, False, True, False]))
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.auroc == 0.75
    assert report.against(torch.tensor([1, 1, 0, 0])).auroc == 1
    assert math.isnan(report.against(torch.zeros(4)).auroc), "without a wrong label there is no order to judge"
    assert report.against(torch.zeros(4)).recall == 0
    ties = outlier_report(torch.zeros(4), lam=0.5).against(torch.tensor([1, 0, 1, 0]))
    assert ties.auroc == 0.5 and ties.f1 == 0


def test_it_finds_the_irrational_annotators_flips(linear) -> None:
    problem = linear(2000, 20)
    labels = noise.irrational(problem.margin, 1 / 3)
    x = problem.features * labels.sign[:, None]
    found = outlier_report(x @ profile_optimum(x, 0.7).weight, lam=0.7).against(labels.is_outlier)
    assert found.f1 >= 0.97


def test_the_report_says_what_a_share_does_not_mean() -> None:
    nothing = outlier_report(torch.tensor([1.0, -1.0]), lam=0.85)
    assert nothing.flagged == 0 and nothing.note.startswith("0 flagged: no margin lies below -1.73, so at lam=0.85 the")
    assert "100% flagged: the model ranks few pairs clearly" in outlier_report(torch.zeros(3), lam=0.3).note
    assert outlier_report(torch.tensor([3.0, 4.0, -3.0]), lam=0.3).note == ""


def test_the_report_goes_through_json() -> None:
    report = outlier_report(torch.tensor([2.0, -3.0]), lam=0.5)
    found = json.loads(report.to_json())
    assert found["suspects"][0]["index"] == 1 and found["pairs"] == 2 and found["lam"] == 0.5


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="margins is empty, and an empty report says nothing"):
        outlier_report(torch.zeros(0), lam=0.5)
    with pytest.raises(ValueError, match="margins is empty"):
        outlier_report([], lam=0.5)
    with pytest.raises(ValueError, match="the margin of pair 7 is not finite; its rewards overflow"):
        outlier_report(torch.tensor([1.0, torch.nan]), torch.tensor([3, 7]), lam=0.5)
    with pytest.raises(ValueError, match=r"margins have shape \(2,\) and indices \(3,\)"):
        outlier_report(torch.zeros(2), torch.arange(3), lam=0.5)
    with pytest.raises(ValueError, match="lam=0 must be above 0"):
        outlier_report(torch.zeros(2), lam=0)
    with pytest.raises(ValueError, match=r"is_outlier has shape \(1,\) but the report has a pair with index 1"):
        outlier_report(torch.zeros(2), lam=0.5).against(torch.ones(1))

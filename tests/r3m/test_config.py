"""Settings check themselves, and say what would do."""

from __future__ import annotations

import pytest

from zq_lib.r3m import R3MConfig
from zq_lib.r3m.config import PAPER_TASKS


@pytest.mark.parametrize("lam", [0, -0.1, 1.0001, float("nan"), float("inf"), True, "half"])
def test_a_lam_outside_of_0_to_1_is_refused_and_1_is_explained(lam) -> None:
    with pytest.raises(ValueError, match=r"lam=.* must be above 0 and at most 1; 1 is plain Bradley-Terry"):
        R3MConfig(lam=lam)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "kto"}, "loss='kto' is not known; choose one of r3m, cross_entropy"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"average": "yes"}, "average='yes' is not known; choose one of True, False"),
        ({"beta": 0}, "beta=0 must be a number above 0"),
        ({"tau": -1}, "tau=-1 must be a number above 0"),
        ({"epsilon": 0.5}, "epsilon=0.5 must be at least 0 and below 0.5; with half of the labels wrong"),
        ({"alpha": 0.5}, "alpha=0.5 must be a number of at least 1"),
        ({"gamma": 0}, "gamma=0 must be above 0 and at most 1"),
        ({"momentum": 1}, "momentum=1 must be at least 0 and below 1"),
        ({"outlier_budget": 0.1}, r"lam=0.5 and outlier_budget=0.1 both set the cut-off"),
        ({"lam": "auto", "outlier_budget": 0.5}, "outlier_budget=0.5 must lie between 0 and 0.5"),
    ],
)
def test_bad_settings_are_one_clear_sentence(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R3MConfig(**wrong)


def test_an_automatic_lam_has_to_be_chosen_before_training_or_have_a_budget() -> None:
    with pytest.raises(ValueError, match="lam='auto' has to be chosen first: call select_lambda"):
        R3MConfig(lam="auto").rule()
    assert R3MConfig(lam="auto", outlier_budget=0.1).rule().lam == 1
    assert R3MConfig(lam="auto", loss="hinge").rule().loss == "hinge", "a peer has no lam"


def test_settings_go_through_json_and_an_unknown_one_is_named() -> None:
    config = R3MConfig(lam="auto", outlier_budget=0.2, loss="r3m", beta=0.3)
    assert R3MConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="'lambda' is no setting of R3MConfig"):
        R3MConfig.from_json('{"lambda": 0.5}')


@pytest.mark.parametrize("task", list(PAPER_TASKS))
def test_paper_presets_lie_on_the_published_grids(task: str) -> None:
    config, row = R3MConfig.paper(task), PAPER_TASKS[task]
    assert config.lam in row.lam and (not row.beta or config.beta in row.beta)


def test_a_task_without_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="task='walker' has no published grid; choose one of halfcheetah"):
        R3MConfig.paper("walker")
    assert R3MConfig.quick().lam == 0.3

"""The pictures: each is drawn, and its description holds the numbers that were given."""

from __future__ import annotations

import numpy as np
import pytest

from zq_lib.adashift import figures
from zq_lib.adashift.counterexamples import Rule, Stochastic, simulate
from zq_lib.adashift.factors import Factors
from zq_lib.core.figures import Figure, to_png


def drawn(fig: Figure, *said: str) -> None:
    png = to_png(fig)
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for text in said:
        assert text in fig.caption, fig.caption


def title(fig: Figure) -> str:
    return fig.figure.axes[0].get_title(loc="left")


def test_trajectories_name_who_walks_the_wrong_way():
    paths = {"Adam": np.linspace([0, 0], [4, 6], 1000), "AdaShift n=1": np.linspace([0, 0], [-8, -7], 1000)}
    fig = figures.trajectories(paths)
    drawn(fig, "1000 steps", "Adam +5 (+4 to +6 in 2 runs)", "AdaShift n=1 -7.5 (-8 to -7 in 2 runs)")
    assert title(fig) == "The wrong way: Adam"
    assert title(figures.trajectories({"SGD": paths["AdaShift n=1"][:, :1]})) == "All walk the right way"


def test_trajectories_of_the_simulator_are_drawn():
    gradients = Stochastic(101, 1).gradients(3000, lanes=8)
    paths = {name: simulate(Rule(name, beta2=0.9), gradients) for name in ("Adam", "AMSGrad", "AdaShift", "SGD")}
    drawn(figures.trajectories(paths), "in 8 runs", "AMSGrad")


def test_factors_give_both_means_ratio_and_drift():
    found = {"Adam": Factors(0.02, 0.35, 0.057, 0.478), "AdaShift": Factors(0.5, 0.5, 1.0, -0.157)}
    fig = figures.update_factors(found)
    drawn(fig, "Adam 0.0200 and 0.350, ratio 0.0570, drift +0.478")
    drawn(fig, "AdaShift 0.500 and 0.500, ratio 1.00, drift -0.157")
    assert title(fig) == "Adam gives the large gradient 0.0570 of the small one's k"


def test_the_boundary_counts_the_problems_on_its_right_side():
    rows = [{"C": C, "delta": d, "drift": drift} for C, d, drift in ((100, 1, 0.1), (100, 9, -0.1), (20, 0.9, -0.1))]
    fig = figures.boundary(rows, beta2=0.9)
    drawn(fig, "beta2 0.900", "wrong way in 1 of 3", "delta_c, 5.00 at C 100", "right side of 2")
    assert title(fig) == "delta_c tells Adam's way in 2 of 3 problems"


@pytest.mark.parametrize(("n", "said"), [(3, "g_1 at step 4 and so on, g_5 at step 8"), (9, "until step 9")])
def test_the_ring_says_when_a_gradient_goes_to_v(n, said):
    fig = figures.ring(n)
    drawn(fig, f"slot (t - 1) mod {n}", said)
    texts = [text.get_text() for text in fig.figure.axes[0].texts]
    assert texts.count("g8") == 1 and texts.count("–") == min(n, 8)


def test_training_curves_say_who_is_inside_the_noise():
    rows = [{"optimizer": o, "epoch": t, "loss": a / t, "low": 0.8 * a / t, "high": 1.2 * a / t}
            for o, a in (("Adam", 1.0), ("AdaShift mean", 1.1), ("SGD", 3.0)) for t in (1, 2)]  # fmt: skip
    fig = figures.training(rows)
    drawn(fig, "epochs to 2", "Adam 0.500 (0.400 to 0.600)", "AdaShift mean 0.550", "SGD 1.50")
    assert title(fig) == "Adam ends lowest, 1 of 2 others inside its interval"
    plain = [{"optimizer": "Adam", "step": t, "accuracy": 0.5 + t / 10} for t in range(3)]
    assert title(figures.training(plain, "accuracy", "step")) == "Adam ends highest"


def test_costs_put_time_beside_memory():
    rows = [{"optimizer": o, "ms": t, "bytes": b} for o, t, b in (("Adam", 95.0, 8), ("AdaShift", 48.0, 44))]
    fig = figures.costs(rows)
    drawn(fig, "Adam 95.0 ms and 8.00 bytes", "AdaShift 48.0 ms and 44.0 bytes")
    assert title(fig) == "AdaShift is fastest"
    bare = {"optimizer": "beta1 0", "ms": 20.0, "bytes": 0}
    assert title(figures.costs([*rows, bare])) == "beta1 0 is fastest and smallest"


def test_the_grid_names_the_smallest_eps_that_all_survive():
    rows = [{"eps": e, "case": c, "survived": s, "runs": 3, "accuracy": a}
            for e, c, s, a in ((1e-10, "ReLU", 0, None), (1e-10, "linear", 1, 0.95), (1e-5, "ReLU", 3, 0.968),
                               (1e-5, "linear", 3, 0.961))]  # fmt: skip
    fig = figures.survival(rows)
    drawn(fig, "eps 1e-10 ReLU 0 of 3; ", "eps 1e-05 ReLU 3 of 3 at 0.968")
    assert title(fig) == "Every run survives from eps = 1e-05"
    assert title(figures.survival(rows[:2])) == "Some runs always diverge"


def test_every_line_looks_different_and_known_ones_as_everywhere():
    names = dict.fromkeys(("Adam", "AMSGrad", "AdaShift max", "AdaShift mean", "AdaShift none", "SGD", "other"))
    looks = dict(zip(names, figures._looks(names), strict=True))
    assert len({look[0] for look in looks.values()}) == len(names)
    assert looks["AdaShift max"] == figures.OPTIMISERS["AdaShift"] and looks["SGD"] == figures.OPTIMISERS["SGD"]

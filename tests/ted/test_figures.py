"""The pictures: each is drawn, and its description holds the numbers that were given."""

from __future__ import annotations

import pytest

from zq_lib.core.figures import Figure, to_png
from zq_lib.ted import LayerReport, figures

GAINS = (("TED 16", 0.0062, 0.0031, 0.0093), ("KD", -0.0001, -0.0019, 0.0017), ("LWD", -0.004, -0.006, -0.002))


def drawn(fig: Figure, *said: str) -> None:
    png = to_png(fig)
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for text in said:
        assert text in fig.caption, fig.caption


def title(fig: Figure) -> str:
    return fig.figure.axes[0].get_title(loc="left")


def probes(*values: tuple[int, str, float]) -> list[dict]:
    return [{"dim": dim, "side": side, "accuracy": accuracy} for dim, side, accuracy in values]


def test_the_heads_say_where_the_answer_is_known():
    reports = {
        "teacher": [LayerReport(k, 1.0, a) for k, a in ((1, 0.5), (2, 0.9), (3, 0.85))],
        "student": [LayerReport(k, 1.0, a) for k, a in ((1, 0.4), (2, 0.6))],
    }
    fig = figures.layer_accuracy(reports, chance=0.1)
    drawn(fig, "teacher layer 1 50.0 %, layer 2 90.0 %", "student layer 1 40.0 %, layer 2 60.0 %")
    assert title(fig) == "Layer 2 of the teacher knows best: 90.0 %"


def test_what_is_kept_is_a_mean_over_seeds_for_each_width_and_side():
    rows = probes((0, "left", 1.0), (0, "right", 1.0), (64, "left", 0.98), (64, "right", 1.0),
                  (8, "left", 0.97), (8, "left", 0.99), (8, "right", 0.4), (8, "right", 0.5))  # fmt: skip
    fig = figures.kept(rows)
    drawn(fig, "the state 1.00 and 1.00; width 64 0.980 and 1.00; width 8 0.980 and 0.450; chance is 0.100")
    assert "0.980 of the left digit and 0.450 of the right one" in title(fig)
    assert "the state" not in figures.kept([r for r in rows if r["dim"]]).caption


def test_stacked_terms_are_weighted_and_add_up():
    rows = [{"step": t, "task": 1.0 / (t + 1), "kd": 0.2, "layer": 0.5} for t in range(4)]
    fig = figures.loss_terms(rows, {"task": 1.0, "kd": 5.0, "layer": 2.0})
    drawn(fig, "labels term 1.00 to 0.250", "output term 1.00 to 1.00", "filtered states term 1.00 to 1.00")
    assert fig.figure.axes[0].get_ylim()[1] >= 3.0
    drawn(figures.loss_terms(rows, {"kd": 1.0}), "output term 0.200 to 0.200")


def test_arms_inside_the_noise_are_called_that():
    rows = [{"arm": a, "difference": d, "low": low, "high": high} for a, d, low, high in GAINS]
    fig = figures.arms(rows, "LWD at weight 1")
    assert title(fig) == "1 above LWD at weight 1, 1 below, 1 inside the noise"
    drawn(fig, "TED 16 +0.0062 (+0.0031 to +0.0093)", "KD -0.0001 (-0.0019 to +0.0017)")
    assert "seeds" not in fig.caption
    seeds = figures.arms([{**rows[0], "differences": (0.005, 0.0074)}], "LWD")
    drawn(seeds, "Ticks are single seeds")


def test_the_lens_gives_both_losses_of_each_layer_and_the_whole_models():
    rows = [{"layer": k, "identity": a, "lens": b} for k, a, b in (("5", 19.2, 11.5), ("29", 7.88, 6.96))]
    fig = figures.lens([*rows, {"layer": "model", "identity": 5.2, "lens": 5.2}])
    drawn(fig, "layer 5 19.2 to 11.5; layer 29 7.88 to 6.96", "whole model has 5.20")
    assert title(fig) == "Behind layer 5 the filter takes 19.2 down to 11.5"
    assert "whole" not in figures.lens(rows).caption


def test_perplexity_stands_beside_the_teachers():
    rows = [{"arm": "teacher", "step": 0, "perplexity": 15.0}]
    rows += [{"arm": arm, "step": 10 * t, "perplexity": 900.0 / (1 + t * speed)} for t in range(3)
             for arm, speed in (("KD", 4), ("TED", 7))]  # fmt: skip
    fig = figures.perplexity(rows)
    drawn(fig, "over 20 steps", "KD 900 to 100; TED 900 to 60.0", "teacher has 15.0")
    assert title(fig) == "TED ends lowest, at 60.0"
    assert "teacher" not in figures.perplexity(rows[1:]).caption
    assert "teacher has 12.0" in figures.perplexity(rows[1:], teacher=12.0).caption


@pytest.mark.parametrize(("more", "said"), [([], "4.00 times"), ([("states", 30.0, 15.0)], "2.00 to 4.00 times")])
def test_costs_say_how_much_less_it_is(more, said):
    rows = [{"what": w, "plain": p, "ours": o} for w, p, o in [("logits", 400.0, 100.0), *more]]
    fig = figures.costs(rows)
    drawn(fig, "logits 400 to 100 MB")
    assert said in title(fig)
    assert "ms" in figures.costs(rows, unit="ms").caption


def test_every_arm_of_a_figure_looks_different_and_known_ones_as_everywhere():
    names = dict.fromkeys(("KD", "TED 16", "LWD", "TED 384", "random 16", "pca 16", "labels only", "start"))
    looks = dict(zip(names, figures._looks(names), strict=True))
    assert len({look[0] for look in looks.values()}) == len(names)
    assert looks["TED 16"] == figures.ARMS["TED"] and looks["labels only"] == figures.ARMS["labels"]

"""AdaShift's page: what it computes, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from gradio_client.exceptions import AppError

from apps import adashift as app
from apps import adashift_figures as figures
from apps import adashift_run as run
from apps import adashift_views as views
from apps.adashift_settings import BY_HAND, DELTAS, IDENTITY, LANES, NAMES, RATE, Hand, Training, Walk, numbers
from zq_lib.adashift import Sequential, Stochastic, critical_delta, simulate
from zq_lib.adashift.counterexamples import ADAM, ADASHIFT, AMSGRAD, RULES, SGD, Rule, first_moments, step_sizes
from zq_lib.adashift.factors import net_update_factors
from zq_lib.adashift.training import load_digits
from zq_lib.adashift.training import train as library_train
from zq_lib.ui import serve

EXAMPLES = list(app.EXAMPLES)
WALKS = EXAMPLES[:4]
SPARSE = EXAMPLES[4]
TYPED = "<img src=x onerror=alert(1)> <b>bold</b> ${7+7}"


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    """A client of the page served alone."""
    from gradio_client import Client

    blocks = app.build()
    yield Client(serve.launch(blocks, port=None, wait=False), verbose=False)
    blocks.close()


@pytest.fixture(scope="module")
def fresh(client) -> dict[str, object]:
    """Every example, run now through the endpoint and with the settings that `adashift_examples` lists."""
    found = {}
    for name, listed in client.predict(api_name="/adashift_examples").items():
        data = client.predict(**listed["settings"], api_name=f"/{listed['endpoint']}")
        assert data.pop("verdict")
        part = run.PARTS[type(app.EXAMPLES[name].settings)]
        found[name] = run.RESULTS[part].from_data(data)
    return found


@pytest.mark.parametrize("name", WALKS)
def test_the_stored_walks_are_what_a_fresh_run_gives(name, fresh, same_numbers):
    same_numbers(run.stored()[name].to_data(), fresh[name].to_data())


def test_the_stored_training_is_what_a_fresh_run_gives_where_it_is_no_explosion(fresh):
    stored = run.stored()[SPARSE]
    assert [(r["optimizer"], r["epoch"]) for r in stored.curves] == [
        (r["optimizer"], r["epoch"]) for r in fresh[SPARSE].curves
    ]
    for one, other in zip(stored.curves, fresh[SPARSE].curves, strict=True):
        if one["optimizer"] != IDENTITY:  # its rounding errors grow as its weights do
            assert one["loss"] == pytest.approx(other["loss"], rel=0.1)
            assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.011)


def test_every_example_is_stored_and_nothing_else():
    assert {name: r.settings for name, r in run.stored().items()} == {n: e.settings for n, e in app.EXAMPLES.items()}
    assert list(run.stored()) == EXAMPLES and set(app.FIRSTS) == set(app.LABELS)


def test_the_examples_show_what_they_say(fresh):
    away, same, creeps, alike, sparse = (fresh[name] for name in EXAMPLES)
    assert away.ends[ADAM]["right"] == 0 and away.ends[ADASHIFT]["right"] == LANES
    assert away.factors[ADAM]["ratio"] < 0.1 and away.factors[ADASHIFT]["ratio"] == pytest.approx(1, abs=0.02)
    assert same.ends[ADAM]["mean"] > 0.2 and same.ends[ADASHIFT]["mean"] == pytest.approx(0.226, abs=0.002)
    for n in (1, 2):
        assert run.walk(replace(same.settings, n=n)).ends[ADASHIFT]["mean"] < -0.2
    assert creeps.ends[AMSGRAD]["right"] == LANES
    assert creeps.ends[ADASHIFT]["mean"] < 20 * creeps.ends[AMSGRAD]["mean"] < 0
    means = [end["mean"] for end in alike.ends.values()]
    assert max(means) < 0 and min(means) / max(means) < 1.2
    assert figures.EXPLODED < (sparse.peaks[IDENTITY] or np.inf) and sparse.end(IDENTITY)["accuracy"] < 0.9
    assert all(sparse.end(name)["accuracy"] > 0.9 for name in ("Adam", "AdaShift max"))


def test_the_identity_learns_with_the_eps_that_the_notice_recommends():
    result = run.finish(replace(app.EXAMPLES[SPARSE].settings, optimizers=(IDENTITY,), eps=1e-5))
    assert result.end(IDENTITY)["accuracy"] > 0.9
    assert "breaks down" not in figures.training_verdict(result)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_walk_is_the_librarys(beta1):
    s = Walk(C=21.0, delta=0.5, n=10, beta1=beta1, steps=1_000)
    result, gradients = run.walk(s), Stochastic(21, 0.5).gradients(1_000, LANES)
    for name in RULES:
        scale = np.sqrt((gradients**2).mean()) if name == SGD else 1.0
        theta = simulate(Rule(name, beta1, 0.9, 10), gradients, RATE / scale)
        end = result.ends[name]
        assert (end["mean"], end["low"]) == pytest.approx((theta[-1].mean(), theta[-1].min()))
        assert end["right"] == (theta[-1] < 0).sum()
        assert result.paths[name]["high"] == pytest.approx(theta[np.array(result.at) - 1].max(1))
        assert len(result.at) == run.POINTS and result.at[-1] == 1_000


def test_ones_own_gradients_are_repeated_or_drawn():
    own = Walk("own", gradients=(4.0, -1.0, -2.0), steps=500)
    assert own.draw()[:4, 0].tolist() == [4, -1, -2, 4] and run.walk(own).runs == 1
    drawn = replace(own, problem="drawn").draw()
    assert drawn.shape == (500, LANES) and set(np.unique(drawn)) == {-2, -1, 4}
    assert drawn.mean() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("rule", BY_HAND)
@pytest.mark.parametrize(("n", "beta1"), [(1, 0.0), (3, 0.0), (4, 0.5)])
def test_the_calculation_by_hand_is_the_librarys(rule, n, beta1):
    settings = Hand(rule, (0.0, 3.0, -1.0, 2.0, -0.5, 0.0, 4.0), n, beta1, 0.7)
    result, g = run.by_hand(settings), np.array(settings.gradients)[:, None]
    made = Rule(rule, beta1, 0.7, n)
    sizes, m = step_sizes(made, g, 1.0)[:, 0], first_moments(made, g)[:, 0]
    for row in result.rows:
        t = row["t"]
        assert (row["r"], row["m"]) == pytest.approx((sizes[t - 1], m[t - 1]))
        if row["corrected"] > 0:  # what the row says of v explains its size
            correction = 1 - beta1**t if rule != ADASHIFT else 1
            assert row["r"] == pytest.approx(1 / correction / np.sqrt(row["corrected"]), rel=1e-6)
        assert row["theta"] == pytest.approx(-sum(k * x for k, x in zip(row["k"], settings.gradients, strict=True)))
        assert row["seen"] == (None if rule == ADASHIFT and t <= n else g[t - 1 - n * (rule == ADASHIFT), 0])
        assert figures.hand_words(result, t).startswith(f"Step {t} of 7: g_{t} =")
    assert result.rows[-1]["k"] == pytest.approx(net_update_factors(made, g, 1.0)[:, 0])


def test_by_hand_a_shift_of_the_period_has_adams_v():
    adam, shifted = (run.by_hand(Hand(rule, n=3)) for rule in (ADAM, ADASHIFT))
    assert [r["v"] for r in shifted.rows[3:]] == pytest.approx([r["v"] for r in adam.rows[:-3]])
    assert "not itself but g_2 = -1" in figures.hand_words(shifted, 5)
    assert "only remembered" in figures.hand_words(shifted, 3)
    assert "goes itself g_5 = -1" in figures.hand_words(adam, 5)


@pytest.mark.parametrize("name", ["Adam", "AdaShift max", "SGD"])
def test_a_training_is_the_librarys_with_all_optimisers_abreast(name):
    s = Training(("Adam", "AdaShift max", "SGD"), epochs=2, seed=3)
    result = run.finish(s)
    row, losses = library_train(load_digits(3), run.maker(s, name), 3, 2)
    epochs = [np.mean(losses[: len(losses) // 2]), np.mean(losses[len(losses) // 2 :])]
    assert [r["loss"] for r in result.curves if r["optimizer"] == name] == pytest.approx(epochs, rel=1e-6)
    assert result.end(name)["accuracy"] == pytest.approx(row["accuracy"])
    assert result.peaks[name] == pytest.approx(max(losses))


def test_one_rate_and_an_eps_reach_the_optimisers():
    s = Training(("Adam", IDENTITY), rate=0.01, eps=1e-2, epochs=2)
    assert next(run.watch_training(s)).result.rates == {"Adam": 0.01, IDENTITY: 0.01}
    made = run.maker(s, IDENTITY)([_parameter()])
    assert (made.param_groups[0]["eps"], made.param_groups[0]["phi"]) == (1e-2, "none")


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2))


def test_an_optimiser_that_leaves_the_finite_numbers_stops_and_the_others_go_on():
    result = run.TrainingResult(
        Training(("Adam", IDENTITY), epochs=2), {"Adam": 0.003, IDENTITY: 0.001},
        [
            {"optimizer": "Adam", "epoch": 1, "loss": 0.5, "accuracy": 0.9},
            {"optimizer": IDENTITY, "epoch": 1, "loss": None, "accuracy": 0.0},
            {"optimizer": "Adam", "epoch": 2, "loss": 0.4, "accuracy": 0.91},
        ], {"Adam": 2.3, IDENTITY: None},
    )  # fmt: skip
    shown = views.digits(result)
    assert "ends with 0.0%" in shown["verdict"] and "leaves the finite numbers" in shown["verdict"]
    assert "Adam ends with 91.0%" in shown["verdict"] and "not finite" in shown["table"]


def test_only_four_endpoints_are_public(client):
    found = set(client.view_api(return_format="dict")["named_endpoints"])
    assert found == {"/adashift_walk", "/adashift_by_hand", "/adashift_train", "/adashift_examples"}


def test_the_calculation_by_hand_answers_through_its_endpoint(client):
    data = client.predict(gradients=[2, -1, -0.5], n=2, api_name="/adashift_by_hand")
    assert data["verdict"].startswith("Step 3 of 3") and len(data["rows"]) == 3
    assert data["rows"][2]["seen"] == 2


@pytest.mark.parametrize(
    ("endpoint", "given", "part"),
    [
        ("walk", {"problem": TYPED}, "is not offered here; choose one of stochastic, sequential, own, drawn"),
        ("walk", {"C": 1}, "C=1"),
        ("walk", {"C": 500}, "C=500 must be a number from 1 to 120"),
        ("walk", {"delta": 0}, "delta=0 must lie in (0"),
        ("walk", {"C": 5, "delta": 8}, "delta=8 must lie in (0, C=5]"),
        ("walk", {"problem": "sequential", "C": 3, "d": 5}, "must exceed (d - 1) other = 4"),
        ("walk", {"problem": "own", "gradients": [1]}, "gradients has 1 numbers; give from 2 to 40"),
        ("walk", {"problem": "own", "gradients": [1, 2]}, "numbers of one sign only"),
        ("walk", {"problem": "drawn", "gradients": [1, -2]}, "sums to -1; it must be positive"),
        ("walk", {"problem": "own", "gradients": ["x", 2]}, "must be a list of finite numbers"),
        ("walk", {"problem": "own", "gradients": [1e9, -1]}, "gradients has 1e+09; give numbers from -10000 to 10000"),
        ("walk", {"beta2": 1}, "beta2=1 must be a number from 0 to 0.999"),
        ("walk", {"beta1": -0.1}, "beta1=-0.1 must be a number from 0 to 0.99"),
        ("walk", {"n": 0}, "n=0 must be a whole number from 1 to 40"),
        ("walk", {"n": True}, "n=True must be a whole number"),
        ("walk", {"steps": 1_000_000}, "steps=1000000 must be a whole number from 500 to 10000"),
        ("by_hand", {"rule": "SGD"}, "rule='SGD' is not offered here; choose one of Adam, AMSGrad, AdaShift"),
        ("by_hand", {"gradients": [1] * 13}, "gradients has 13 numbers; give from 2 to 12"),
        ("by_hand", {"gradients": [1, 2], "n": 2}, "n=2 leaves nothing to move of 2 gradients"),
        ("train", {"optimizers": []}, "optimizers has 0 names; choose from 1 to 4"),
        ("train", {"optimizers": list(NAMES[:5])}, "optimizers has 5 names"),
        ("train", {"optimizers": [TYPED]}, "is not offered here; choose one of Adam, AMSGrad"),
        ("train", {"rate": 1.5}, "rate=1.5 is not offered here"),
        ("train", {"eps": 0}, "eps=0 is not offered here"),
        ("train", {"epochs": 31}, "epochs=31 must be a whole number from 2 to 30"),
        ("train", {"seed": -1}, "seed=-1 must be a whole number from 0 to 9"),
    ],
)
def test_bad_input_is_answered_with_one_readable_sentence(endpoint, given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name=f"/adashift_{endpoint}")
    message = str(caught.value)
    assert part in message.replace("&lt;", "<") and "Traceback" not in message and "<img" not in message


def test_typed_numbers_are_read_and_anything_else_is_named():
    assert numbers(" 3, -1;-1\n2e0 ") == (3, -1, -1, 2) and numbers("") == ()
    with pytest.raises(ValueError, match="gradients has 'three', which is not a number; write them like 3, -1, -1"):
        numbers("three, -1")
    for text in ("nan, 1", "inf, -1"):
        with pytest.raises(ValueError, match="finite"):
            Hand(gradients=numbers(text))


def test_what_cannot_be_is_explained_in_the_page_as_text_and_keeps_the_rest():
    state, code, mark, paths, bars, verdict, table = app._walk("own", 3, 1, 3, TYPED, 0.9, 1, 0, 500)
    assert "&lt;img" in verdict and "<img" not in verdict and "is not a number" in verdict
    assert all(isinstance(kept, dict) for kept in (state, code, mark, paths, bars, table))
    code, at, words, *rest = app._hand(3, ADASHIFT, TYPED, 1, 0, 0.9)
    assert "&lt;img" in words and "<img" not in words and all(isinstance(kept, dict) for kept in (code, at, *rest))


def test_next_and_back_stay_inside_the_sequence():
    given = (ADASHIFT, "3, -1, -1", 1, 0, 0.1)
    assert [app._hand(at, *given, by=by)[1]["value"] for at, by in ((1, -1), (1, 1), (3, 1), (9, 0))] == [1, 2, 3, 3]


def test_the_controls_say_what_the_settings_are():
    for example in app.EXAMPLES.values():
        settings, part = example.settings, run.PARTS[type(example.settings)]
        values = [v["value"] if isinstance(v, dict) else v for v in app._controls(settings)]
        assert app._settings(part, *values) == settings
    assert app._changed([], 0.0, 1e-5, 2, 0)[1] == app.gr.skip()


def test_a_problem_shows_only_its_own_controls():
    shown = {p: [c["visible"] for c in app._switch(p)] for p in app.PROBLEMS.values()}
    assert shown["stochastic"] == [True, True, False, False] and shown["sequential"] == [True, False, True, False]
    assert shown["own"] == shown["drawn"] == [False, False, False, True]


def test_delta_c_is_marked_where_the_slider_has_it():
    low, high = DELTAS
    share = 100 * (critical_delta(101, 0.9) - low) / (high - low)
    assert f"left: {share:.1f}%" in figures.mark(Walk()) and "delta_c = 5.05" in figures.mark(Walk())
    assert "beyond the slider" in figures.mark(Walk(beta2=0.1)) and figures.mark(Walk("sequential", C=3.0)) == ""


@pytest.mark.parametrize(
    "settings",
    [Walk(steps=500), Walk("sequential", C=3.0, steps=500), Walk("own", steps=500), Walk("drawn", steps=500)],
    ids=lambda s: s.problem,
)
def test_copy_as_python_of_a_walk_prints_what_the_page_shows(settings):
    said, result = _said(settings.python()), run.walk(settings)
    for name in RULES:
        line = next(line for line in said if line.startswith(name + " "))
        assert float(line.split()[1]) == pytest.approx(result.ends[name]["mean"])
        assert line.endswith(f"wrong in {result.runs - result.ends[name]['right']} of {result.runs}")
    assert f"ratio={result.factors[SGD]['ratio']}"[:8] in said[-1]


def test_copy_as_python_by_hand_and_of_a_training_says_the_same():
    said = _said(Hand(AMSGRAD).python())
    found = [float(x) for x in re.findall(r"-?\d+\.\d*", " ".join(said))]
    for key in ("r", "theta"):
        for row in run.by_hand(Hand(AMSGRAD)).rows:
            assert any(x == pytest.approx(row[key], abs=1e-7) for x in found), (key, row["t"])
    settings = Training(("SGD", IDENTITY), rate=0.01, eps=1e-2, epochs=2)
    said, result = _said(settings.python()), run.finish(settings)
    for name in settings.optimizers:
        line = next(line for line in said if line.startswith(name + " {"))
        assert f"'accuracy': {result.end(name)['accuracy']:.3f}"[:16] in line
        assert float(line.split()[-1]) == pytest.approx(result.peaks[name], rel=1e-4)


def _said(program: str) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    return printed.getvalue().splitlines()


def test_verdicts_and_captions_tell_the_numbers():
    away, same, creeps, alike, sparse = (run.stored()[name] for name in EXAMPLES)
    assert "the wrong way Adam to +1.62 (0 of 64)" in figures.walk_verdict(away)
    assert "As expected of Adam: delta 1 is below delta_c = 5.05" in figures.walk_verdict(away)
    closed = f"{Sequential(3, 3).displacement(0.1, 3):+.3g}"
    assert "n = 3 is a multiple of the period 3" in figures.walk_verdict(same)
    assert f"Adam {closed}, AdaShift {closed}" in figures.walk_verdict(same)
    assert "times as far as AMSGrad" in figures.walk_verdict(creeps)
    assert "wrong way" not in figures.walk_verdict(alike)
    assert "means of 64 runs" in figures.paths(away).caption and "bands" not in figures.paths(same).caption
    assert "ratio 0.077" in figures.factors(away).caption
    assert f"{IDENTITY} breaks down" in figures.training_verdict(sparse)
    assert "inside what chance does" in figures.training_verdict(sparse)
    assert "delta_c is only an estimate" in figures.walk_verdict(run.walk(Walk(delta=4.9, steps=500)))
    assert app.thumbnail().startswith("<figure")


def test_a_run_shows_what_there_is_from_its_first_moment():
    begun = next(run.watch_training(Training()))
    assert begun.result.curves == [] and views.digits(begun.result)["verdict"] == f"<p>{views.BEGUN}</p>"


def test_examples_can_be_handed_to_their_endpoints():
    for name, listed in app.examples().items():
        made = asdict(app.EXAMPLES[name].settings)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in listed["settings"].items()} == made

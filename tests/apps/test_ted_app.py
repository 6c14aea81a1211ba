"""TED's page: what it computes, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from gradio_client.exceptions import AppError

from apps import ted as app
from apps import ted_figures as figures
from apps import ted_run as run
from apps import ted_views as views
from apps.ted_run import START, TEACHER, WIDTHS
from apps.ted_settings import KD_WEIGHTS, LAYER_WEIGHTS, MOST_PICTURES, Digits, Question, Training
from zq_lib.ted import arms, digits, lab, text
from zq_lib.ted.digits import DIMS, KD, LAYERS, LWD, PLAIN, SIDES
from zq_lib.ted.probe import probe
from zq_lib.ui import serve

NAMES = list(app.EXAMPLES)
OTHERS = NAMES[:-1]  # without the question, whose models take a minute
DROPS, WIDE, HELPS, LOSES, ASKS = NAMES
TYPED = "<img src=x onerror=alert(1)> <b>bold</b> ${7+7}"
SMALL = text.Size(48, 16, 32, 12, 1, 1, 1)


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    """A client of the page served alone; nothing was trained before, and on sentences everything is small."""
    from gradio_client import Client

    run.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SETTING", run.Once(lambda say: text.setting(SMALL, 0, say), 2))
        blocks = app.build()
        yield Client(serve.launch(blocks, port=None, wait=False), verbose=False)
        blocks.close()
    run.forget()


@pytest.fixture(scope="module")
def fresh(client) -> dict[str, object]:
    """The examples, run now through the endpoints and with the settings that `ted_examples` lists."""
    found = {}
    for name, listed in client.predict(api_name="/ted_examples").items():
        data = client.predict(**listed["settings"], api_name=f"/{listed['endpoint']}")
        data.pop("verdict")
        found[name] = run.RESULTS[run.PARTS[type(app.EXAMPLES[name].settings)]][0].from_data(data)
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_the_stored_first_view_is_what_a_fresh_run_gives(name, fresh, same_numbers):
    same_numbers(run.stored()[name].to_data(), fresh[name].to_data())


def test_every_example_is_stored_and_nothing_else():
    assert {name: r.settings for name, r in run.stored().items()} == {n: e.settings for n, e in app.EXAMPLES.items()}
    assert list(run.stored()) == NAMES and set(app.FIRSTS) == set(app.LABELS)


def test_the_examples_show_what_they_say(fresh):
    for name, dim in ((DROPS, 8), (WIDE, 64)):
        result = fresh[name]
        before, after = ({side: result.accuracy(w, LAYERS, side) for side in SIDES} for w in (0, dim))
        assert min(before.values()) > 0.9 and after["left"] > 0.9
        assert after["right"] < 0.5 if dim == 8 else after["right"] > 0.9
    right = {name: {r["arm"]: r["accuracy"] for r in fresh[name].rows} for name in (HELPS, LOSES)}
    ours = right[HELPS]["TED 8"]
    assert ours > right[HELPS]["LWD"] + 0.04 and ours > right[HELPS][PLAIN.name] + 0.04
    assert abs(ours - right[HELPS]["KD"]) < 0.04 and fresh[HELPS].levels[START] < 0.2
    assert max(right[LOSES][n] for n in ("TED 8", "LWD")) < right[LOSES][PLAIN.name] - 0.02
    assert abs(right[LOSES]["KD"] - right[LOSES][PLAIN.name]) < 0.03
    asked = run.stored()[ASKS]
    assert asked.accuracy[TEACHER] > max(v for n, v in asked.accuracy.items() if n != TEACHER) + 0.1
    assert asked.accuracy["KD"] > asked.accuracy[START] + 0.1


def test_readers_are_the_librarys_probe(fresh):
    found, known = run.DIGITS.get(), run._KNOWN[0]
    states = [digits.class_states(found.teacher, pairs) for pairs in (found.train, found.test)]
    for dim, layer, side in ((0, 1, "left"), (8, 3, "right")):
        own, other = (run.filtered(known, dim, layer, h) for h in states)
        expected = probe(own, found.train.labels[side], other, found.test.labels[side])
        assert fresh[DROPS].accuracy(dim, layer, side) == pytest.approx(expected, abs=2e-3)
        shares = known.readers[dim, layer, side](other)
        assert torch.allclose(shares.sum(1), torch.ones(len(shares), dtype=shares.dtype))


def test_every_offered_pair_exists_and_is_made_of_the_wanted_digits(fresh):
    pairs = run.DIGITS.get().test
    for side in SIDES:
        assert int(pairs.labels[side].bincount(minlength=10).min()) >= MOST_PICTURES
    one, other = (run.chosen(pairs, Digits(left=left, right=4, picture=7)) for left in (2, 9))
    images = [torch.tensor(run.pixels(pair)) for pair in (one, other)]
    assert torch.equal(images[0][:, 8:], images[1][:, 8:]) and not torch.equal(images[0][:, :8], images[1][:, :8])
    index = int((pairs.labels["right"] == 4).nonzero()[7])
    known = torch.tensor(
        run.pixels(digits.Pairs({k: v[index : index + 1] for k, v in pairs.rows.items()}, pairs.right))
    )
    assert torch.equal(images[0][:, 8:], known[:, 8:])


def test_a_drawing_is_what_the_teacher_gets(fresh):
    lines = ["#" + "." * 14 + "#", "", "+" * 16]
    image = torch.tensor(run.pixels(run.drawn(Digits(drawing="\n".join(lines)))))
    expected = torch.zeros(8, 16)
    expected[0, 0] = expected[0, 15] = 1
    expected[2] = 0.5
    assert torch.equal(image, expected)
    copied = run.finish(Digits(drawing=run.as_text(fresh[DROPS])))
    assert not copied.labels and copied.shares(0, LAYERS, "left")[3] > 0.9, "a coarse 3 is still a 3"
    assert views.digits(copied)["pair"].count("drawn pair") == 2  # alternative text and caption


def test_another_pair_is_shown_without_training_again(fresh):
    began = time.monotonic()
    moments = list(run.watch(Digits(left=1, right=2)))
    assert len(moments) == 1 and time.monotonic() - began < 5
    assert moments[0].result.kept == run.finish(Digits()).kept and run.ready()


def test_the_curves_go_from_the_start_to_the_results_and_the_terms_add_up(fresh):
    shown = fresh[LOSES]
    for name, values in shown.curves.items():
        assert len(values) == shown.epochs + 1 and values[0] == shown.levels[START], name
        assert values[-1] == shown.row(name)["accuracy"]
    for row in shown.terms:
        assert row["total"] == pytest.approx(row["task"] + row["kd"] + row["layer"], rel=2e-3)
    assert len(shown.terms) == shown.steps * shown.epochs


def test_only_the_chosen_layers_are_matched(fresh):
    start = run._start(0)
    for layers in ((3,), (1, 2)):
        s = Training(layers=layers, layer_weight=10.0)
        problem = run.Paired(**{**vars(start), "cache": run._states(layers), "layers": s.pairs})
        first = next(arms.watch(problem, {LWD: 10.0}, 0))
        assert first.terms.errors.shape == (len(layers),)


def test_what_was_trained_with_the_same_settings_is_not_trained_again(fresh):
    said = [m.said for m in run.watch(app.EXAMPLES[LOSES].settings)]
    assert said[-1] == "Done" and not any("step" in s for s in said)


def test_a_training_that_is_left_half_way_is_not_taken_for_a_whole_one(fresh):
    settings = Training(kd_weight=1.0, layer_weight=0.0)
    watched = run.watch(settings)
    assert any(moment.said.startswith("KD: step 3 ") for moment in watched)
    watched.close()
    assert not any(arm is KD and weight == 1.0 for arm, _, weight, _ in run._ARMS)


def test_weights_of_zero_leave_out_what_they_make_equal():
    names = {(kd, layer): [a.name for a in Training(kd, layer).arms] for kd in (0.0, 5.0) for layer in (0.0, 1.0)}
    assert names[0.0, 0.0] == [PLAIN.name] and names[5.0, 0.0] == ["KD", PLAIN.name]
    assert names[0.0, 1.0] == ["TED 8", "LWD", PLAIN.name] and len(names[5.0, 1.0]) == 4


def test_something_slow_is_made_once_also_for_one_who_leaves():
    made = []

    def make(say) -> str:
        say("half")
        time.sleep(0.7)
        made.append(1)
        return "it"

    once = run.Once(make, 1.0)
    waiting = once.wait()
    assert next(waiting) == ("half", 0.25)
    waiting.close()
    assert once.get() == "it" and list(once.wait()) == [] and made == [1]


def test_what_goes_wrong_in_the_thread_is_raised_where_one_waits():
    def make(say) -> None:
        raise OSError("no such model; run `zq assets`")

    once = run.Once(make, 1.0)
    for _ in range(2):  # and the next one tries again
        with pytest.raises(OSError, match="run `zq assets`"):
            list(once.wait())


def test_a_question_is_answered_by_teacher_and_students_as_the_library_does(fresh):
    result, asked, found = fresh[ASKS], run._ASKED[0], run.SETTING.get().found
    rows = lab.answers(asked.models, found, result.settings.question)
    assert [r["probability"] for r in result.answers] == pytest.approx([r["probability"] for r in rows], abs=1e-3)
    assert result.models == [TEACHER, START, *(arm.name for arm in run.STUDENTS)] and result.tested == SMALL.test
    assert {r["layer"] for r in result.layers} == set(range(1, 7))
    for model in result.models:
        assert sum(result.table("model", model).values()) == pytest.approx(1, abs=1e-3)
        assert result.accuracy[model] == pytest.approx(
            arms.judge(asked.models[model], found.test)["accuracy"], abs=1e-3
        )
    assert len(list(run.watch(Question("Where is Rome?")))) == 1, "nothing is trained again"
    assert set(run.KINDS) == set(found.kinds)


def test_only_four_endpoints_are_public(client):
    found = set(client.view_api(return_format="dict")["named_endpoints"])
    assert found == {"/ted_read", "/ted_train", "/ted_ask", "/ted_examples"}


@pytest.mark.parametrize(
    ("endpoint", "given", "part"),
    [
        ("read", {"dim": 5}, "dim=5 is not offered here; choose one of 4, 8, 16, 64"),
        ("read", {"layer": 4}, "layer=4 is not offered here; choose one of 1, 2, 3"),
        ("read", {"layer": True}, "layer=True"),
        ("read", {"left": 10}, "left=10 does not exist; choose a whole number from 0 to 9"),
        ("read", {"right": 1.5}, "right=1.5 does not exist"),
        ("read", {"picture": 40}, "picture=40 does not exist; choose a whole number from 0 to 39"),
        ("read", {"drawing": "#\n" * 9}, "drawing has 9 lines, the longest of 1 characters; draw at most 8 of 16"),
        ("read", {"drawing": "#" * 17}, "the longest of 17 characters"),
        ("read", {"drawing": "<b>"}, "drawing has the character '&lt;'; use # for ink"),
        ("train", {"kd_weight": 3}, "kd_weight=3 is not offered here; choose one of 0.0, 1.0, 5.0, 20.0"),
        ("train", {"layer_weight": -1}, "layer_weight=-1 is not offered here"),
        ("train", {"dim": 12}, "dim=12 is not offered here"),
        ("train", {"layers": []}, "layers is empty; choose at least one of 1 to 3"),
        ("train", {"layers": [1, 4]}, "layers=4 is not offered here; choose one of 1, 2, 3"),
        ("train", {"seed": 10}, "seed=10 does not exist; choose a whole number from 0 to 9"),
        ("ask", {"question": "  "}, "has no words; write a question"),
        ("ask", {"question": "x" * 151}, "question has 151 characters, more than 150; shorten"),
        ("ask", {"question": TYPED * 4}, "&lt;img src=x"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_with_one_readable_sentence(endpoint, given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name=f"/ted_{endpoint}")
    message = str(caught.value)
    assert part in message and "Traceback" not in message and "<img" not in message


def test_what_is_typed_is_never_an_element_of_a_piece():
    asked = replace(run.stored()[ASKS], settings=Question(TYPED))
    html = "".join(views.sentences(asked).values())
    assert "<img src=x" not in html and "<b>" not in html and "&lt;img src=x" in html


def test_an_unfit_drawing_is_explained_where_the_verdict_stands_and_keeps_the_rest():
    state, code, shown, *parts = app._pair(8, 3, 3, 7, 0, "what is this")
    at = views.SEEN["digits"].index("verdict")
    assert "use # for ink" in parts.pop(at) and all(isinstance(part, dict) for part in (state, code, shown, *parts))


def test_another_pair_waits_for_the_button_until_there_is_a_teacher(monkeypatch):
    monkeypatch.setattr(run, "_KNOWN", [])
    state, code, *rest = app._pair(8, 3, 1, 2, 0, "")
    assert state == app.CHANGED and "selectivity" in code and all(isinstance(part, dict) for part in rest)


def test_width_and_layer_follow_without_a_run():
    shown = run.stored()[DROPS]
    code, *parts = app._at(shown, 4, 2, 3, 7, 0, "")
    assert "dims=(4,), layers=(2,)" in code and parts == list(views.look(shown, 4, 2).values())
    assert "width 4, left" in parts[0] and "Behind layer 2 a filter of width 4" in parts[1]


def test_the_controls_say_what_the_settings_are():
    for example in app.EXAMPLES.values():
        settings, part = example.settings, run.PARTS[type(example.settings)]
        assert app._settings(part, *app._controls(settings)) == settings
    assert app._changed("training", 5.0, 1.0, 8, [], 0)[1] == app.gr.skip()
    assert {e.settings.kd_weight for n, e in app.EXAMPLES.items() if n in (HELPS, LOSES)} <= set(KD_WEIGHTS)
    assert Training(layers=[3, 1, 3]).layers == (1, 3) and 0.0 in LAYER_WEIGHTS


def test_copy_as_python_of_digits_prints_what_the_page_shows(fresh, monkeypatch):
    monkeypatch.setattr(digits, "digits", run.DIGITS.get)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(Digits(dim=16, layer=1).python(), {})
    rows = [eval(line) for line in said.getvalue().splitlines()]
    assert {(r["dim"], r["side"]) for r in rows} == {(d, side) for d in (0, 16) for side in SIDES}
    for row in rows:
        seen = fresh[DROPS].accuracy(row["dim"], 1, row["side"])
        assert row["accuracy"] == pytest.approx(seen, abs=2e-3) and row["images"] == "new"


def test_copy_as_python_of_a_training_prints_what_the_page_shows(fresh, monkeypatch):
    monkeypatch.setattr(digits, "digits", run.DIGITS.get)
    settings = Training(5.0, 0.0, layers=(3,), seed=0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(settings.python(), {})
    start, *trained = (eval(line) for line in said.getvalue().splitlines())
    assert start["accuracy"] == pytest.approx(fresh[LOSES].levels[START], abs=2e-3)
    assert [row["arm"] for row in trained] == ["KD", PLAIN.name]
    for row in trained:
        assert row["accuracy"] == pytest.approx(fresh[LOSES].row(row["arm"])["accuracy"], abs=2e-3)
    whole = Training(20.0, 100.0, 16, (1, 3), 4).python()
    compile(whole, "training", "exec")
    for part in ("((1, 1), (3, 3))", "seed=4", "'kd_weight': 20", "lab.narrow(16), digits.LWD, digits.KD", "100)"):
        assert part in whole


def test_copy_as_python_of_a_question_prints_what_the_page_shows(fresh, monkeypatch):
    monkeypatch.setattr(text, "setting", lambda say: run.SETTING.get())
    said, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(fresh[ASKS].settings.python(), scope)
    rows = [eval(line) for line in said.getvalue().splitlines()]
    answers = [r["probability"] for r in rows if "model" in r]
    assert answers == pytest.approx([r["probability"] for r in fresh[ASKS].answers], abs=2e-3)
    assert len([r for r in rows if "layer" in r]) == 6 * len(run.KINDS)
    assert repr('It\'s "odd"') in Question('It\'s "odd"').python()


def test_captions_and_tables_tell_the_numbers():
    drops, wide, helps, loses, asked = (run.stored()[name] for name in NAMES)
    assert "It lets go of the digit that the task does not need" in figures.digits_verdict(drops, 8, 3)
    assert "It drops neither digit" in figures.digits_verdict(wide, 64, 3)
    assert "It begins to drop the digit that the task does not" in figures.digits_verdict(drops, 16, 3)
    assert "It also loses something of the digit that the task needs" in figures.digits_verdict(drops, 4, 1)
    assert "a 3 on the left" in figures.pair(drops).caption and "width 8, right: 7" in figures.said(drops, 8, 3).caption
    assert f"width 8 {figures._both(drops, 8, 3)}" in figures.kept(drops, 8, 3).caption
    assert all(f"width {w}" in figures.widths(drops, 3).caption for w in DIMS) and len(drops.kept) == 6 * len(WIDTHS)
    verdict = figures.training_verdict(helps)
    assert "better than LWD" in verdict and "no clear difference to KD" in verdict and "One seed" in verdict
    assert "worse than labels only" in figures.training_verdict(loses)
    assert "filtered states" in figures.terms(loses).caption and "TED 8" in figures.curves(loses).caption
    assert len(figures.outcome_rows(loses)) == 6 and figures.outcome_rows(loses)[0][2] == 100
    assert "sure to ±" in figures.sentences_verdict(asked) and len(figures.answer_rows(asked)) == len(asked.models)
    assert "layer 6" in figures.layers(asked).caption and "TED 16" in figures.answers(asked).caption
    assert app.thumbnail().startswith("<figure")


def test_a_run_shows_what_there_is_from_its_first_moment():
    begun = run.TrainingResult(Training())
    assert all(isinstance(view, str) for view in views.training(begun).values())
    assert views.training(begun)["verdict"] == f"<p>{views.ALL_TRAINED}</p>"


def test_examples_can_be_handed_to_their_endpoints():
    for name, listed in app.examples().items():
        made = asdict(app.EXAMPLES[name].settings)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in listed["settings"].items()} == made

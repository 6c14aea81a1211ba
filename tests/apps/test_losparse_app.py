"""LoSparse's page: what it computes, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from gradio_client.exceptions import AppError
from torch.optim import optimizer as torch_optimizer

from apps import losparse as app
from apps import losparse_figures as figures
from apps import losparse_run as run
from apps import losparse_views as views
from apps.losparse_run import OURS
from apps.losparse_settings import MODELS, STEPS, TIMED, Language, Matrix, Training
from zq_lib.losparse import LoSparseConfig, LowRankSparse, compress_once, lab
from zq_lib.losparse.oneshot import LOW_RANK, ROWS, approximation_errors
from zq_lib.losparse.targets import find_layers
from zq_lib.ui import serve

NAMES = list(app.EXAMPLES)
SLOW = "It loses: own rates"  # three more trainings
TYPED = "<img src=x onerror=alert(1)> <b>bold</b> ${7+7}"


@pytest.fixture(scope="module")
def client(model) -> Iterator[object]:
    """A client of the page served alone."""
    from gradio_client import Client

    blocks = app.build()
    yield Client(serve.launch(blocks, port=None, wait=False), verbose=False)
    blocks.close()


class Fresh(dict):
    """Examples by name, each run when it is first asked for, through the endpoint and with the settings it lists."""

    def __init__(self, client: object) -> None:
        super().__init__()
        self.client, self.listed = client, client.predict(api_name="/losparse_examples")

    def __missing__(self, name: str) -> object:
        listed = self.listed[name]
        timed = {"timed": True} if listed["endpoint"] == "losparse_split" else {}
        data = self.client.predict(**listed["settings"], **timed, api_name=f"/{listed['endpoint']}")
        data.pop("verdict")
        part = run.PARTS[type(app.EXAMPLES[name].settings)]
        self[name] = run.RESULTS[part][0].from_data(data)
        return self[name]


@pytest.fixture(scope="module")
def fresh(client) -> Fresh:
    """Every example, run now."""
    run._TRAINED.clear()
    run._FACTORS.clear()
    run._DENSE.clear()
    return Fresh(client)


def _untimed(result: object) -> dict:
    """The data without what is measured with a clock."""
    data = result.to_data()
    for row in data.get("timing", []):
        for name in [n for n in row if n.endswith("_s") or n.startswith("gain")]:
            del row[name]
    for side in ("dense", "ours"):
        data.get(side, {}).pop("seconds", None)
    return data


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == SLOW)) for n in NAMES])
def test_the_stored_first_view_is_what_a_fresh_run_gives(name, fresh, same_numbers):
    same_numbers(_untimed(run.stored()[name]), _untimed(fresh[name]))


def test_every_example_is_stored_and_nothing_else():
    assert {name: r.settings for name, r in run.stored().items()} == {n: e.settings for n, e in app.EXAMPLES.items()}
    assert list(run.stored()) == NAMES and set(app.FIRSTS) == set(app.LABELS)


def test_the_examples_show_what_they_say():
    one, loses, trained, own, language = (run.stored()[name] for name in NAMES)
    for result in (one, loses):
        assert result.errors[LOW_RANK] < result.errors[OURS] < result.errors[ROWS]
    assert loses.errors[LOW_RANK] < 0.7 * loses.errors[OURS]
    loss = {name: r.row(name)["nll"] for r in [trained] for name in lab.METHODS}
    assert min(loss, key=loss.__getitem__) == OURS
    loss = {name: own.row(name)["nll"] for name in lab.METHODS}
    assert min(loss, key=loss.__getitem__) == ROWS
    assert 1.3 < language.ours.perplexity / language.dense.perplexity < 1.7
    assert language.ours.parameters < 0.92 * language.dense.parameters


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_matrix_is_split_as_the_library_splits_it(name, model):
    settings = app.EXAMPLES[name].settings
    result = run.split(settings)
    w, *_ = run._decomposed(settings.model, settings.name)
    dense = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    dense.weight = torch.nn.Parameter(w.clone())
    layer = LowRankSparse.from_dense(dense, settings.config.rank(*w.shape))
    energy = layer.sparse.detach().square().sum(1)
    layer.shrink(energy.topk(result.rows).indices.sort().values)
    missed = (layer.weight - w).square().sum() / w.square().sum()
    assert missed.item() == pytest.approx(result.errors[OURS], rel=1e-3)
    assert (layer.flops(), layer.rank) == (result.size, result.rank)
    assert [i for i in range(run.PATCH) if i in layer.rows.tolist()] == result.kept
    sparse = torch.tensor(result.weight) - torch.tensor(result.product)
    part = layer.sparse.detach()[: sum(i < run.PATCH for i in layer.rows.tolist()), : run.PATCH]
    assert torch.allclose(sparse[result.kept], part, atol=2e-2 * float(w.abs().max()))


def test_the_curves_are_those_of_the_libraries_table(model):
    settings = Matrix(low_rank=0.05)
    result = run.split(settings)
    w, *_ = run._decomposed(settings.model, settings.name)
    known = {(r, name): error for r, name, error in approximation_errors(w, (0.2, 0.5))}
    for ratio in (0.2, 0.5):
        at = run.GRID.index(ratio)
        assert result.curves[OURS][at] == pytest.approx(known[ratio, "LoSparse 5%"], abs=3e-3)
        assert result.curves[ROWS][at] == pytest.approx(known[ratio, ROWS], abs=3e-3)
        one = 5e-3  # the table rounds a rank up, the page down
        assert result.curves[LOW_RANK][at] == pytest.approx(known[ratio, LOW_RANK], abs=one)


@pytest.mark.parametrize("shares", [(0.0, 0.2), (0.2, 0.0), (0.4, 0.6), (0.0, 0.01)])
def test_any_shares_that_leave_something_can_be_shown(shares, model):
    result = run.split(Matrix(matrix="query", low_rank=shares[0], remaining=shares[1]))
    assert all(isinstance(view, str) and view for name, view in views.matrix(result).items() if name != "timing")
    assert 0 <= result.errors[OURS] <= 1 and result.rows == round(shares[1] * 384)


def test_every_matrix_of_the_page_is_a_layer_that_the_library_compresses(model):
    for name, (_, layers, kinds) in MODELS.items():
        found, _ = find_layers(run._encoder() if name == "minilm-l6" else model[0])
        offered = {Matrix(name, layer, kind).name for layer in range(layers) for kind in kinds}
        assert offered == set(found)


def test_a_layer_is_timed_at_all_numbers_of_tokens(fresh):
    timing = fresh[NAMES[0]].timing
    assert [row["tokens"] for row in timing] == list(TIMED)
    assert all(row["dense_s"] > 0 and row["shrunk_s"] > 0 for row in timing)
    assert timing[-1]["gain"] > 1.2, "256 tokens through a fifth of the numbers"


def test_a_training_is_the_labs(fresh):
    found = fresh["A training"]
    seen = [m for m in lab.watch(lab.questions(), 0.15, STEPS, (OURS,)) if m.row]
    assert found.row(OURS)["nll"] == pytest.approx(seen[0].row["nll"], rel=5e-3)
    assert found.kept == seen[0].handle.trace.rows and found.steps == seen[0].handle.trace.steps
    assert len(found.answers) == len(found.settings.questions)


def test_other_questions_are_answered_without_training_again(fresh, model):
    moments = list(run.watch(Training(questions=("Where is Rome?",))))
    assert len(moments) == 1 and list(moments[0].result.answers[0]) == [lab.DENSE, OURS]
    assert moments[0].result.row(OURS)["nll"] == pytest.approx(fresh["A training"].row(OURS)["nll"], rel=1e-3)


def test_a_training_that_is_left_half_way_follows_its_optimiser_no_more(model):
    def hooks() -> int:
        return len(torch_optimizer._global_optimizer_pre_hooks)

    before, watched = hooks(), run.watch(Training(ratio=0.3))
    for moment in watched:
        if moment.said.startswith(f"{OURS}: step 3 "):
            break
    assert hooks() == before + 1
    watched.close()
    assert hooks() == before and (0.3, False) not in run._TRAINED


def test_the_language_model_is_compressed_as_compress_once_does(fresh, model):
    import copy

    language_model, _ = model
    settings = app.EXAMPLES["A language model"].settings
    batch, inputs, _ = run._texts()
    own = copy.deepcopy(language_model)
    own.model.layers = own.model.layers[:1]  # a block is enough to compare factors; the page's own is whole
    layers, _ = find_layers(own)
    config = replace(settings.config, remaining=0.0)
    handle = compress_once(own, config, [batch], inputs=inputs)
    factors = run._FACTORS["activation"]
    for name in layers:
        layer = handle.layers[name]
        u, v = factors[name][0][:, : layer.rank], factors[name][1][: layer.rank]
        assert torch.allclose(u @ v, (layer.left @ layer.right).detach(), atol=2e-3)


def test_the_shared_language_model_is_as_it_was_after_a_compression(fresh, model):
    assert not any(isinstance(m, LowRankSparse) for m in model[0].modules())
    assert find_layers(model[0])[0].keys() == run._FACTORS["activation"].keys()


def test_only_four_endpoints_are_public(client):
    found = set(client.view_api(return_format="dict")["named_endpoints"])
    assert found == {"/losparse_split", "/losparse_train", "/losparse_compress", "/losparse_examples"}


@pytest.mark.parametrize(
    ("endpoint", "given", "part"),
    [
        ("split", {"model": "gpt5"}, "model='gpt5' is not offered here; choose one of minilm-l6, smollm2"),
        ("split", {"layer": 6}, "layer=6 is not in minilm-l6; choose a whole number from 0 to 5"),
        ("split", {"layer": True}, "layer=True"),
        ("split", {"matrix": "FFN gate"}, "matrix='FFN gate' is not offered here"),
        ("split", {"low_rank": 0.5, "remaining": 0.6}, "lower remaining to 0.5"),
        ("split", {"low_rank": 0, "remaining": 0}, "leave nothing of the weights"),
        ("split", {"low_rank": -0.1}, "low_rank=-0.1 must be a share"),
        ("train", {"ratio": 0.01}, "ratio=0.01 is not offered here; choose one of 0.1"),
        ("train", {"own_rates": 1}, "own_rates=1 is not offered here"),
        ("train", {"questions": ["x"] * 6}, "questions has 6 lines, more than 5"),
        ("train", {"questions": ["x" * 151]}, "a line of 151 characters"),
        ("train", {"questions": [1]}, "must be a list of texts"),
        ("compress", {"total": 0.99}, "total=0.99 is not offered here"),
        ("compress", {"low_rank": 0.3}, "low_rank=0.3 is not offered here"),
        ("compress", {"init": TYPED}, "is not offered here; choose one of activation, svd"),
        ("compress", {"prompt": "  "}, "has no words"),
        ("compress", {"prompt": "x" * 201}, "prompt has 201 characters, more than 200"),
    ],
)
def test_bad_input_is_answered_with_one_readable_sentence(endpoint, given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name=f"/losparse_{endpoint}")
    message = str(caught.value)
    assert part in message and "Traceback" not in message and "<img" not in message


def test_what_is_typed_or_written_is_never_an_element_of_a_piece():
    results = run.stored()
    language = results["A language model"]
    loud = replace(language, settings=replace(language.settings, prompt=TYPED), ours=replace(language.ours, text=TYPED))
    trained = results["A training"]
    asked = replace(trained, settings=Training(questions=(TYPED,)), answers=trained.answers[:1])
    html = "".join([*views.language(loud).values(), *views.training(asked).values()])
    assert "<img src=x" not in html and "<b>" not in html and "&lt;img src=x" in html


def test_an_unfit_matrix_is_explained_where_the_verdict_stands_and_keeps_the_rest():
    state, code, verdict, *rest = app._split("minilm-l6", 0, "query", 0, 0)
    assert "leave nothing of the weights" in verdict and all(isinstance(part, dict) for part in (state, code, *rest))


def test_the_controls_say_what_the_settings_are():
    for example in app.EXAMPLES.values():
        settings, part = example.settings, run.PARTS[type(example.settings)]
        values = [v["value"] if isinstance(v, dict) else v for v in app._controls(settings)]
        assert app._settings(part, *values) == settings
    assert app._changed("language", 0.9, 0.05, "svd", "")[1] == app.gr.skip()


def test_another_model_has_its_own_layers_and_matrices():
    layer, kind = app._switch("minilm-l6", 29, "FFN gate")
    assert (layer["maximum"], layer["value"], kind["value"]) == (5, 5, "query")
    assert app._switch("smollm2", 5, "FFN out")[1]["value"] == "FFN out"


@pytest.mark.parametrize("settings", [Matrix("smollm2", 3, "FFN gate", 0.1, 0.2), Matrix(matrix="key", remaining=0.0)])
def test_copy_as_python_of_a_matrix_prints_what_the_page_shows(settings, monkeypatch, model):
    monkeypatch.setattr("zq_lib.core.models.load", lambda name: model if name == "smollm2" else (run._encoder(), None))
    said, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(settings.python().split("for tokens")[0], scope)
    result = run.split(settings)
    assert f"numbers {result.outputs * result.inputs} {result.size}" in said.getvalue()
    assert scope["missed"].item() == pytest.approx(result.errors[OURS], rel=2e-3)


def test_copy_as_python_keeps_every_setting():
    program = Training(0.3, True).python()
    assert "0.3, 60" in program and "lab.OWN_RATES" in program
    compile(program, "training", "exec")
    program = Language(0.7, 0.2, "svd", 'It\'s "odd"\n').python()
    compile(program, "language", "exec")
    scope: dict[str, object] = {}
    line = next(x for x in program.splitlines() if x.startswith("config"))
    exec("from zq_lib import losparse\n" + line, scope)
    assert scope["config"] == LoSparseConfig(0.2, 0.5, init="svd") and repr('It\'s "odd"\n') in program


def test_captions_and_tables_tell_the_numbers():
    one, _, trained, own, language = (run.stored()[name] for name in NAMES)
    assert f"rank {one.rank}" in figures.errors(one).caption and "LoSparse 0." in figures.errors(one).caption
    assert f"{one.rank} singular values and {one.rows} rows" in figures.spectrum(one).caption
    assert figures.size_rows(one)[1][3] == one.size and figures.size_rows(one)[2][3] <= one.size
    assert "one learning rate for all" in figures.training_verdict(trained)
    assert "each at its own best learning rate" in figures.training_verdict(own)
    assert "less than rows only" in figures.training_verdict(trained)
    assert "more than rows only" in figures.training_verdict(own)
    assert figures.density(trained, 0).caption.endswith("every matrix still has all rows of S.")
    assert f"mask {len(trained.steps)}" in figures.density(trained).caption
    assert len(figures.outcome_rows(trained)) == 4 and len(figures.answer_rows(trained)) == 3
    assert len(language.densities) == 30 and "30 blocks by 7 matrices" in figures.survivors(language).caption
    assert app.thumbnail().startswith("<figure")


def test_a_run_shows_what_there_is_from_its_first_moment():
    begun = run.TrainingResult(Training())
    assert all(isinstance(view, str) for view in views.training(begun).values())
    assert views.training(begun)["verdict"] == f"<p>{views.ALL_TRAINED}</p>"


def test_examples_can_be_handed_to_their_endpoints():
    for name, listed in app.examples().items():
        made = asdict(app.EXAMPLES[name].settings)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in listed["settings"].items()} == made

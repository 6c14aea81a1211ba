"""GEAR's page: what it computes, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools

import pytest
import torch
from gradio_client.exceptions import AppError

from apps import gear as app
from apps import gear_figures
from apps.gear_run import KEPT, Look, Result, Rival, diverge, look, plain_scores, remember, rival, score, stored, watch
from apps.gear_settings import (
    BEGINS,
    CONFIGS,
    HEADS,
    LAYERS,
    MORE,
    MOST_CHARACTERS,
    PLAIN,
    PROMPT,
    STEPS,
    WHOLE,
    WIDTH,
    Settings,
    dense_bytes,
    expression,
    weigh,
)
from zq_lib import gear
from zq_lib.gear import measure

NAMES = list(app.EXAMPLES)


@pytest.fixture(scope="session")
def client(gear_address):
    """A client of the page alone."""
    from gradio_client import Client

    return Client(gear_address, verbose=False)


def _answer(client, settings: Settings) -> dict:
    return client.predict(*vars(settings).values(), api_name="/compress")


@pytest.fixture(scope="session")
def answered(client) -> dict[str, dict]:
    """Every example, run now through the public endpoint."""
    return {name: _answer(client, e.settings) for name, e in app.EXAMPLES.items()}


@pytest.fixture(scope="session")
def fresh(answered) -> dict[str, Result]:
    return {
        name: Result.from_data({k: v for k, v in d.items() if k not in ("rival", "verdict")})
        for name, d in answered.items()
    }


def _shades(data: dict) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(data["look"].pop("shade"))))


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_first_view_is_what_a_fresh_run_gives(name, fresh, same_numbers):
    one, other = (r.to_data() for r in (stored()[0][name], fresh[name]))
    assert (_shades(one) - _shades(other)).abs().max() <= 1
    same_numbers(one, other)


def test_every_example_and_every_plain_setting_is_stored_and_nothing_else():
    examples, plain = stored()
    assert list(examples) == NAMES
    assert {name: e.settings for name, e in app.EXAMPLES.items()} == {n: r.settings for n, r in examples.items()}
    assert list(plain) == list(measure.TEXTS) and all(list(found) == list(PLAIN) for found in plain.values())


def test_the_stored_plain_settings_are_what_a_fresh_run_gives(model, same_numbers):
    for name, found in plain_scores(*model, "reasoning").items():
        kept = stored()[1]["reasoning"][name]
        assert torch.allclose(found.kl, kept.kl, rtol=5e-3, atol=2e-4), name
        assert torch.equal(found.agree, kept.agree) and (found.bits, found.bytes) == (kept.bits, kept.bytes), name


@pytest.mark.parametrize("text", measure.TEXTS[1:])
def test_the_stored_plain_settings_of_other_texts_are_fresh_too(text, model):
    found = score(model[0], remember(*model, text), PLAIN["plain 3 bit"])
    assert torch.allclose(found.kl, stored()[1][text]["plain 3 bit"].kl, rtol=5e-3, atol=2e-4)


@pytest.fixture(scope="session")
def plainly(model):
    """A text's ids, and what the library measures and the model writes in full precision, once per text."""
    language_model, tokenizer = model
    found = {}

    def of(settings: Settings) -> tuple:
        if settings.text not in found:
            ids = measure.texts(tokenizer, PROMPT + STEPS)[settings.text]
            more = tokenizer(settings.more, return_tensors="pt").input_ids
            prompt = torch.cat([ids[:, :PROMPT], more], 1)
            said = _generate(language_model, prompt, settings.new_tokens)
            found[settings.text] = ids, measure.full_precision(language_model, ids, steps=STEPS), prompt, said
        return found[settings.text]

    return of


def _generate(language_model, prompt: torch.Tensor, new_tokens: int, cache: object = None) -> list[int]:
    out = language_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
        max_new_tokens=new_tokens,
    )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_compress_endpoint_answers_every_example_as_the_library_does(name, model, fresh, plainly):
    language_model, _ = model
    settings, result = app.EXAMPLES[name].settings, fresh[name]
    ids, expected, prompt, said = plainly(settings)
    wanted = measure.teacher_forced(language_model, ids, settings.config, steps=STEPS, expected=expected)
    assert torch.allclose(result.score.kl, wanted.kl, rtol=5e-3, atol=2e-4)
    assert torch.equal(result.score.agree, wanted.agree) and result.score.bytes == wanted.bytes
    cache = gear.GearCache(language_model.config, settings.config)
    with torch.no_grad():
        language_model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
    assert {k: v for k, v in cache.nbytes_by_component().items() if v} == result.weight.parts
    assert cache.dense_nbytes() == dense_bytes(PROMPT)
    assert result.compressed.ids == _generate(language_model, prompt, settings.new_tokens, cache)
    assert result.full.ids == said


def test_the_inspect_endpoint_gives_the_error_of_one_head(model, client):
    language_model, tokenizer = model
    ids = measure.texts(tokenizer, PROMPT)["encyclopedia"]
    cache = gear.GearCache(language_model.config, "small")
    with torch.no_grad():
        language_model(ids, past_key_values=cache, logits_to_keep=1)
    pairs = zip(measure.keys_values(language_model, ids)[5], cache.layers[5].dequantize(), strict=True)
    for side, (exact, restored) in zip(("keys", "values"), pairs, strict=True):
        seen = Look(**client.predict("small", "encyclopedia", side, 5, 2, api_name="/inspect"))
        assert seen.error == pytest.approx(measure.relative_error(exact[0, 2], restored[0, 2]), rel=1e-4)
        wrong = (exact - restored)[0, 2, : len(seen.map())].abs()
        assert torch.allclose(seen.map(), wrong, atol=seen.largest / 255)
        marked = torch.tensor(seen.outliers)
        assert len(marked) and float(wrong[marked[:, 0], marked[:, 1]].max()) < 0.002  # exact but for float16
        assert seen.spectrum == sorted(seen.spectrum) and seen.spectrum[3] > seen.noise[3]


def test_the_examples_endpoint_lists_the_examples(client):
    answer = client.predict(api_name="/gear_examples")
    assert {name: e["notice"] for name, e in answer.items()} == {n: e.notice for n, e in app.EXAMPLES.items()}


def test_only_three_endpoints_are_public(client):
    found = set(client.view_api(return_format="dict")["named_endpoints"])
    assert found == {"/compress", "/inspect", "/gear_examples"}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"key_bits": 5}, "bits=5"),
        ({"value_bits": 1}, "bits=1"),
        ({"scheme": "best"}, "scheme='best'"),
        ({"group": 128, "buffer": 64}, "use buffer=128"),
        ({"group": 60}, "group=60"),
        ({"buffer": 100000}, "buffer=100000"),
        ({"key_outliers": 0.5}, "choose 0 to 0.05"),
        ({"rank": 65}, "choose 0 to 16"),
        ({"rank_decode": -1}, "rank_decode=-1"),
        ({"sinks": 1000}, "choose 0 to 4"),
        ({"factor_bits": 4}, "factor_bits=4"),
        ({"text": "/etc/passwd"}, "choose one of reasoning"),
        ({"more": "x" * 5000}, f"over the {MOST_CHARACTERS}"),
        ({"new_tokens": 1000}, "choose 1 to 48"),
        ({"new_tokens": 0}, "choose 1 to 48"),
        ({"side": "queries"}, "choose one of keys, values"),
        ({"layer": 30}, "choose 0 to 29"),
        ({"head": 3}, "choose 0 to 2"),
    ],
)
def test_bad_input_is_answered_with_one_readable_sentence(given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name="/compress")
    message = str(caught.value)
    assert part in message and "Traceback" not in message


def test_an_unknown_preset_is_answered_without_its_markup(client):
    with pytest.raises(AppError, match="choose one of paper_2bit") as caught:
        client.predict(preset="<img src=x onerror=alert(1)>", api_name="/inspect")
    assert "<" not in str(caught.value)


def test_what_is_typed_is_never_an_element_of_a_piece(model):
    *_, last = watch(*model, Settings(more=" <img src=x onerror=alert(1)> <b>hello</b> `$x^2$`", new_tokens=2))
    html = "".join(v for name, v in app._views(last.result).items() if isinstance(v, str) and name != "code")
    assert "<img src=x" not in html and "<b>" not in html


def test_copy_as_python_runs_and_prints_what_the_page_shows(monkeypatch, model, fresh):
    result = fresh["It loses"]
    monkeypatch.setattr("zq_lib.core.models.load", lambda: model)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(result.settings.python(), {})
    assert "".join(result.compressed.pieces) in said.getvalue()
    assert f"'bytes': {result.score.bytes}" in said.getvalue()


def test_copy_as_python_keeps_every_setting():
    settings = Settings(3, 8, "kcvt", 32, 0.01, 0.02, 5, 1, 128, 2, True, 8, more='it\'s "odd"\n\\ ' * 9, new_tokens=7)
    program = settings.python()
    scope: dict[str, object] = {"gear": gear}
    exec(program.split("model, tokenizer = load()\n")[1].split("text =")[0], scope)
    exec(program[program.index("more = (") : program.index("memory =")], scope)
    assert scope["setting"] == settings.config and scope["more"] == settings.more
    assert "max_new_tokens=7" in program


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_on_the_page_is_the_librarys(name):
    settings = Settings.of(name)
    assert settings.config == CONFIGS[name] and settings.preset == name
    assert eval(expression(settings.config), {"gear": gear}) == CONFIGS[name]
    filled = app._fill(name)
    assert app._weigh(*filled[:-1]) == [filled[-1], name]


def test_the_pages_model_has_the_shape_that_sizes_are_counted_for(model):
    config = model[0].config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (LAYERS, HEADS, WIDTH)


def test_the_page_tells_how_each_text_begins(model):
    for text, ids in measure.texts(model[1], 64).items():
        assert model[1].decode(ids[0]).startswith(BEGINS[text])
        assert model[1](MORE[text]).input_ids and Settings(text=text).more == MORE[text]


@pytest.mark.parametrize("name", ["paper_2bit", "balanced", "plain 8 bit"])
def test_sizes_counted_without_the_model_are_those_of_a_cache(name, model):
    memory, found = remember(*model, "reasoning"), weigh(CONFIGS[name])
    cache = memory.fill(gear.GearCache(model[0].config, CONFIGS[name]))
    assert measure.compressed_bits(cache) == pytest.approx(found.bits)
    assert cache.report()["ratio"] == pytest.approx(found.ratio)
    token = torch.randn(1, HEADS, 1, WIDTH)
    for tokens, size in found.growth[1:20]:  # over the first full buffer
        while cache.get_seq_length() < tokens:
            for i in range(LAYERS):
                cache.update(token, token, i)
        assert cache.nbytes() == size, tokens


def test_group_and_buffer_on_the_page_always_fit():
    blocks = app.build()
    follow = [f.fn for f in blocks.fns.values() if getattr(f.fn, "__name__", "") == "<lambda>" and f.fn.__defaults__]
    assert len(follow) == 2
    for (grown, shrunk), chosen, other in itertools.product([follow], WHOLE["group"], WHOLE["buffer"]):
        Settings(group=chosen, buffer=grown(chosen, other))
        Settings(buffer=chosen, group=shrunk(chosen, other))


def test_stopping_stops_the_model(model):
    language_model, _ = model
    settings = Settings(more=" Once more, and something that was not asked before:", new_tokens=48)
    calls = []
    hook = language_model.register_forward_hook(lambda *_: calls.append(1))
    run = watch(*model, settings)
    for moment in run:
        if moment.answers["full"]:
            break
    run.close()
    hook.remove()
    assert 0 < len(calls) < 14


def test_a_text_is_read_once_and_answers_in_full_precision_are_remembered(model):
    memory = remember(*model, "encyclopedia")
    assert remember(*model, "encyclopedia") is memory
    settings = Settings.of("plain 8 bit", more=" It is", new_tokens=1)
    for _ in range(2):
        *_, last = watch(*model, settings)
    assert memory.said[" It is", 1] == last.result.full.ids
    for i in range(40):
        memory.said[str(i), 1] = []
    *_, last = watch(*model, Settings.of("plain 8 bit", more=" It was", new_tokens=1))
    assert len(memory.said) == KEPT and (" It was", 1) in memory.said
    memory.said.clear()


def test_a_setting_without_repair_has_no_marks_and_a_zero_error_no_energy(model):
    memory = remember(*model, "reasoning")
    seen = look(memory, Settings.of("plain 2 bit", side="keys", layer=0))
    assert seen.outliers == [] and "No outliers." in gear_figures.error_map(seen).caption
    assert seen.errors[0] < seen.errors[1]  # keys are easier: their large channels have ranges of their own


def _score(kl: float, size: int, spread: float = 0.01) -> measure.Score:
    noise = torch.linspace(-spread, spread, 64)
    return measure.Score(kl + noise, torch.ones(64, dtype=torch.bool), 3.0, size)


@pytest.mark.parametrize(
    ("ours", "name", "part"),
    [
        (_score(0.3, 350), "plain K3 V2", "plain K3 V2 wins"),
        (_score(0.01, 350), "plain 3 bit", "your setting wins"),
        (_score(0.15, 350, 3.0), "plain K3 V2", "no clear winner"),
        (_score(0.1, 150), "plain 2 bit", "your setting wins"),
        (_score(0.15, 320), "plain K3 V2", "no fair winner"),
    ],
)
def test_a_winner_is_named_only_with_no_more_bytes_and_a_clear_difference(ours, name, part):
    plain = {"plain 2 bit": _score(0.4, 200), "plain K3 V2": _score(0.2, 300), "plain 3 bit": _score(0.1, 400)}
    found = rival(ours, plain)
    assert found.name == name
    assert part in gear_figures.verdict(Settings(rank=1), ours, found)


def test_the_plain_setting_itself_has_no_rival():
    settings, plain = Settings.of("plain 3 bit"), stored()[1]["reasoning"]
    found = Rival("plain 3 bit", plain["plain 3 bit"], 0.0, 0.0)
    assert gear_figures.verdict(settings, plain["plain 3 bit"], found).startswith("This is plain quantisation itself")


@pytest.mark.parametrize(
    ("one", "other", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([], [3], 0), ([], [], None)],
)
def test_answers_part_where_they_first_differ(one, other, at):
    assert diverge(one, other) == at == diverge(other, one)


def test_the_examples_show_what_they_say(fresh, answered):
    paper, codes, three, eight, loses = fresh.values()
    kl = {name: float(r.score.kl.mean()) for name, r in fresh.items()}
    assert kl["Paper, 2 bits"] < 0.6 * kl["Codes alone"]
    assert kl["Three bits"] < 0.5 * kl["Paper, 2 bits"] and three.score.bytes < paper.score.bytes
    assert eight.divergence is None and kl["Eight bits"] < 1e-3
    assert answered["It loses"]["verdict"].startswith("Same bytes: plain K4 V3 wins")
    assert "Nikos" in paper.full.pieces[0] and "Nikos" in paper.compressed.pieces[0]
    assert "Nikos" not in "".join(codes.compressed.pieces)
    assert loses.settings.config == paper.settings.config
    assert codes.weight.ratio > paper.weight.ratio > eight.weight.ratio


def test_captions_and_tables_tell_the_numbers(fresh):
    result = fresh[NAMES[0]]
    beside = rival(result.score, stored()[1][result.settings.text])
    assert "low rank 0.645" in gear_figures.sizes(result.settings, beside.name).caption
    assert gear_figures.quality(result.settings, result.score, beside)[0][1] == "4.34"
    assert "at rank 4" in gear_figures.spectrum(result.look, 4).caption
    assert f"{PROMPT} to" in gear_figures.growth(result.settings).caption
    rows = gear_figures.answers(result)
    assert rows[0][1].endswith(f"of {len(result.full.ids)}") or rows[0][1].startswith("all")

"""MASFormer's page: what it runs, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from gradio_client.exceptions import AppError

from apps import masformer as app
from apps import masformer_figures as figures
from apps import masformer_run as run
from apps import masformer_views as views
from apps.masformer_run import Result, Side
from apps.masformer_settings import (
    CHANNELS,
    DENSE,
    HEADS,
    KV_HEADS,
    LAYERS,
    LEAST_TOKENS,
    LENGTHS,
    LIMITS,
    MOST_CHARACTERS,
    MOST_TOKENS,
    NEEDLE,
    PLACES,
    QUESTION,
    VOCABULARY,
    WIDTH,
    Settings,
    layers_of,
    place_of,
    price,
)
from apps.masformer_text import STORY, story
from zq_lib import masformer
from zq_lib.masformer.attention import PLACE
from zq_lib.masformer.passkey import Probe, retrieve
from zq_lib.masformer.training import perplexity

NAMES = list(app.EXAMPLES)
SHORT = Settings(words=150)
TYPED = "<img src=x onerror=alert(1)> <b>bold</b> ${7+7} "


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    """Address of the page served alone."""
    from zq_lib.ui import serve

    blocks = app.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture(scope="module")
def client(address):
    """A client of the page alone."""
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def fresh(client) -> dict[str, Result]:
    """Every example, run now through the public endpoint with the settings that the other endpoint lists."""
    run._FULL.clear()
    listed = client.predict(api_name="/masformer_examples")
    found = {}
    for name in NAMES:
        data = client.predict(**listed[name]["settings"], api_name="/masformer_ask")
        said = data.pop("verdict")
        found[name] = Result.from_data(data)
        # the digits of the data are rounded once, those of the sentence twice at most
        assert said.split(":")[0] == figures.verdict(found[name]).split(":")[0]
    return found


@pytest.fixture(scope="module")
def short(model) -> Result:
    return run.ask(*model, SHORT)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_first_view_is_what_a_fresh_run_gives(name, fresh, same_numbers):
    same_numbers(run.stored()[name].to_data(), fresh[name].to_data())


def test_every_example_is_stored_and_nothing_else():
    assert {name: r.settings for name, r in run.stored().items()} == {n: e.settings for n, e in app.EXAMPLES.items()}
    assert list(run.stored()) == NAMES


@pytest.mark.parametrize("name", ["Profiled 8", "Blocks"])
def test_the_ask_endpoint_answers_as_the_library_does(name, fresh, model):
    language_model, tokenizer = model
    s, found = fresh[name].settings, fresh[name]
    prompt = run.encode(tokenizer, s)
    probe = Probe(torch.cat([prompt.ids, prompt.code]), len(s.code), s.depth)
    with masformer.attach(language_model, s.plan):  # the whole text at once, without a cache
        asked = retrieve(language_model, [probe])
        ppl = perplexity(language_model, [prompt.ids[: prompt.document]], run.CONTEXT)
    assert [a == b for a, b in zip(found.plan.chosen, s.code, strict=True)] == list(asked.hits[0])
    assert sum(map(math.log, found.plan.right)) / len(s.code) == pytest.approx(asked.mean_log_p, abs=5e-3)
    assert found.plan.perplexity == pytest.approx(ppl, rel=2e-3)


def test_full_attention_is_asked_as_the_library_does(fresh, model):
    language_model, tokenizer = model
    found = fresh[NAMES[0]]
    prompt = run.encode(tokenizer, found.settings)
    asked = retrieve(language_model, [Probe(torch.cat([prompt.ids, prompt.code]), len(prompt.code), 0.2)])
    ppl = perplexity(language_model, [prompt.ids[: prompt.document]], run.CONTEXT)
    assert sum(map(math.log, found.full.right)) / 6 == pytest.approx(asked.mean_log_p, abs=5e-3)
    assert found.full.perplexity == pytest.approx(ppl, rel=2e-3)


@pytest.mark.parametrize("place", PLACES)
def test_the_plan_endpoint_counts_as_the_library_does(place, client):
    data = client.predict(placement=place, count=8, window=100, kind="block", sinks=2, length=3000,
                          api_name="/masformer_plan")  # fmt: skip
    full = data.pop("full")
    plan = masformer.SpanPlan.from_dict({name: data.pop(name) for name in ("layers", "kind", "sinks")})
    assert list(plan.full) == full and len(full) == (0 if place == "none" else 8)
    assert data == pytest.approx(asdict(price(plan, 3000)))
    assert data["score_entries"] / data["full_score_entries"] == pytest.approx(plan.cost(3000).share)
    assert data["cache_bytes"] == plan.kv_bytes(3000, KV_HEADS, WIDTH, 4)
    assert data["reached"] == masformer.receptive_field(plan, 3000)[0].sum()


def test_the_examples_endpoint_lists_the_examples(client):
    answer = client.predict(api_name="/masformer_examples")
    assert {name: e["notice"] for name, e in answer.items()} == {n: e.notice for n, e in app.EXAMPLES.items()}


def test_only_three_endpoints_are_public(client):
    found = set(client.view_api(return_format="dict")["named_endpoints"])
    assert found == {"/masformer_ask", "/masformer_plan", "/masformer_examples"}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"full": [3, 30]}, "full names layer 30, but the model has layers 0 to 29"),
        ({"full": ["3"]}, "full names layer '3'"),
        ({"window": 0}, "window=0 is out of range; choose a whole number from 4 to 512"),
        ({"window": 10**6}, "window=1000000 is out of range"),
        ({"sinks": -1}, "sinks=-1 is out of range"),
        ({"kind": "spiral"}, "kind='spiral' is not offered here; choose one of window, block"),
        ({"words": 10**9}, "words=1000000000 is out of range"),
        ({"code": "12a456"}, "code='12a456' is no pass code"),
        ({"code": "12"}, "give 3 to 8 digits"),
        ({"depth": 1.5}, "depth=1.5 is out of range"),
        ({"document": "Too short."}, f"give at least {LEAST_TOKENS}"),
        ({"document": "word " * 2000}, f"more than the {MOST_TOKENS} this page takes"),
        ({"document": "x" * 20000}, f"more than the {MOST_CHARACTERS} this page takes"),
    ],
)
def test_bad_input_is_answered_with_one_readable_sentence(given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name="/masformer_ask")
    message = str(caught.value)
    assert part in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"placement": "<img src=x>"}, "choose one of profiled"),
        ({"count": 31}, "count=31"),
        ({"placement": "even", "count": -1}, "count=-1"),
        ({"length": 10**9}, "length=1000000000 is out of range"),
    ],
)
def test_a_plan_that_is_not_possible_is_explained(given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name="/masformer_plan")
    assert part in str(caught.value) and "<" not in str(caught.value)


def test_what_is_typed_or_answered_is_never_an_element_of_a_piece(short):
    loud = replace(
        short, settings=replace(SHORT, document=TYPED + STORY[:900]),
        plan=replace(short.plan, answer=TYPED, chosen=list("<b>482")),
    )  # fmt: skip
    html = "".join(v for name, v in views.everything(loud).items() if name != "code")
    assert "<img src=x" not in html and "<b>" not in html and "&lt;img src=x" in html


def test_an_unfit_setting_is_explained_in_an_element_that_escapes_it():
    state, *parts = app._look([1], 64, "window", 4, 8192, 450, "Some text", TYPED, 20)
    said = dict(zip(views.PLANNED, parts, strict=True))["sentence"]
    assert "is no pass code" in said and "<img" not in said
    assert isinstance(state, dict), "the note, which is Markdown, keeps what it says"
    assert app._read([1], 64, "window", 4, 8192, 450, "Some text", TYPED, 20)[0] == said
    said, program = app._read([1], 64, "window", 4, 8192, 450, "Some text", "7007", 20)
    assert "own choice of 1: " in said and "7007" in program


def test_an_empty_document_is_refused_with_the_way_back():
    with pytest.raises(ValueError, match="move the story's slider"):
        app._settings([1], 64, "window", 4, 8192, 450, " \n", "482913", 20)


def test_copy_as_python_runs_and_prints_what_the_page_shows(monkeypatch, model, short):
    monkeypatch.setattr("zq_lib.core.models.load", lambda: model)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(SHORT.python(), {})
    written = 2 * 4 * KV_HEADS * WIDTH * len(SHORT.full) * (len(SHORT.code) - 1)  # bytes that the answer adds
    assert f"{short.plan.answer} {short.plan.bytes + written}" in said.getvalue()


@pytest.mark.parametrize("full", [layers_of("profiled", 12), (3, 4), ()])
@pytest.mark.parametrize("document", ["", 'It\'s an "odd" text.\n\\ Really? ' * 40])
def test_copy_as_python_keeps_every_setting(full, document):
    settings = Settings(full, 32, "block", 2, 2048, 300, document, "0071", 0.4)
    scope: dict[str, object] = {}
    exec(settings.python().split("model, tokenizer")[0].replace("print", "str"), scope)
    assert scope["plan"] == settings.plan and scope["text"] == settings.text + QUESTION
    assert "(2048, " in settings.python() and "max_new_tokens=4" in settings.python()


def test_the_pages_model_has_the_sizes_that_are_counted(model):
    config = model[0].config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (
        LAYERS, HEADS, KV_HEADS,
    )  # fmt: skip
    assert (config.hidden_size, config.vocab_size, config.head_dim) == (CHANNELS, VOCABULARY, WIDTH)
    assert sum(p.numel() for p in model[0].model.layers[0].parameters()) == DENSE


def test_measured_bytes_of_a_cache_are_the_counted_ones_and_where_the_sinks_stand(fresh):
    for name in ("Profiled 8", "No sinks", "It loses"):
        found, s = fresh[name], fresh[name].settings
        counted = price(s.plan, found.tokens)
        assert found.full.bytes == counted.full_cache_bytes
        assert found.plan.bytes == counted.cache_bytes + 8 * s.sinks * (LAYERS - len(s.full))
    blocks = fresh["Blocks"]
    assert blocks.plan.bytes < price(blocks.settings.plan, blocks.tokens).cache_bytes  # which counts the fullest block


def test_the_story_has_no_digits_and_fits_the_page_at_any_length(model):
    assert not any(c.isdigit() for c in STORY)
    assert story(LIMITS["words"][1]) == STORY.strip() and len(STORY) < MOST_CHARACTERS
    for words in LIMITS["words"]:
        tokens = len(run.encode(model[1], Settings(words=words)).ids)
        assert LEAST_TOKENS <= tokens <= MOST_TOKENS and len(story(words).split()) <= words


def test_document_and_question_are_read_as_one_text(model):
    prompt = run.encode(model[1], SHORT)
    whole = model[1](SHORT.text + QUESTION + SHORT.code, add_special_tokens=False)["input_ids"]
    assert [*prompt.ids.tolist(), *prompt.code.tolist()] == whole
    assert len(prompt.code) == len(SHORT.code)


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.55, 1.0])
def test_the_code_stands_between_two_sentences_near_its_depth(depth):
    settings = Settings(depth=depth, code="000123")
    needle = NEEDLE.format(code="000123")
    before, after = settings.text.split(needle)
    assert before.rstrip()[-1:] in ("", ".") and (not after or after[0].isspace())
    assert len(before) / len(story(450)) == pytest.approx(depth, abs=0.07)
    assert (before + after).split() == story(450).split()


def test_in_a_text_without_sentences_the_code_stands_between_two_words():
    words = "nothing but words here " * 60
    before, after = Settings(document=words, depth=0.5).text.split(NEEDLE.format(code="482913"))
    assert (before + after).split() == words.split()
    assert len(before) == pytest.approx(len(words) / 2, abs=8)


def test_the_storys_own_words_are_not_kept_as_a_document():
    assert Settings(document=f" {story(450)}\n").document == ""
    assert Settings(document=story(400)).document == story(400)


def test_placement_count_and_strip_follow_each_other():
    for place in PLACES:
        for count in (0, 1, 8, LAYERS):
            named, many, layers = app._fill(place, count)
            assert many == len(layers) and set(layers) <= set(range(LAYERS))
            assert layers_of(app._named(layers)[0], many) == tuple(layers)
            assert named == place or (place == "none" and count)
    assert app._fill("none", 5) == ("profiled", 5, list(layers_of("profiled", 5)))
    assert app._fill(None, 3)[0] == "profiled" and app._fill("top", None) == ("top", 0, [])
    assert app._named([29, 28]) == ("top", 2) and app._named([0, 7]) == (None, 2)
    assert place_of(()) == "none" and Settings((0, 7)).label == "own choice of 2"


def test_a_run_leaves_the_model_as_it_was_between_any_two_steps(model):
    language_model, _ = model
    had = language_model.config._attn_implementation
    watched = run.watch(*model, replace(SHORT, code="111222"))
    for moment in watched:
        assert not any(hasattr(m, PLACE) for m in language_model.modules()), moment.said
        assert language_model.config._attn_implementation == had and not hasattr(language_model.config, "masformer")
        if moment.done > 0.6:
            break
    watched.close()


def test_two_visitors_whose_runs_take_turns_get_what_each_would_get_alone(model, short):
    other = replace(SHORT, full=layers_of("bottom", 4), sinks=0, code="905113")
    alone = run.ask(*model, other)
    run._FULL.clear()
    runs, results = {"one": run.watch(*model, SHORT), "other": run.watch(*model, other)}, {}
    while runs:
        for name in list(runs):
            moment = next(runs[name], None)
            if moment is None:
                del runs[name]
            elif moment.result:
                results[name] = moment.result
    assert results["one"].to_data() == short.to_data() and results["other"].to_data() == alone.to_data()


def test_stopping_stops_the_model(model):
    calls: list[int] = []
    hook = model[0].register_forward_hook(lambda *_: calls.append(1))
    inner = model[0].base_model.register_forward_hook(lambda *_: calls.append(1))
    watched = run.watch(*model, replace(SHORT, words=1000, code="333444"))
    for _ in range(3):
        moment = next(watched)
    watched.close()
    hook.remove()
    inner.remove()
    assert moment.said.startswith("Full attention: 256 of 1") and len(calls) == 2


def test_a_document_is_read_once_under_full_attention_and_the_oldest_is_forgotten(model, short):
    run._FULL.clear()
    run.ask(*model, SHORT)
    assert [m.said.split(":")[0] for m in run.watch(*model, replace(SHORT, sinks=1))][0] == "Profiled 8"
    for i in range(run.KEPT):
        run._FULL[(i,), ""] = short.full
    run.ask(*model, replace(SHORT, code="777888"))
    assert len(run._FULL) == run.KEPT and any(code == "777888" for _, code in run._FULL)
    run._FULL.clear()


def _result(full: str, plan: str, perplexity: float) -> Result:
    def side(chosen: str, ppl: float) -> Side:
        return Side([0.5] * 3, list(chosen), chosen, ppl, 1000)

    return Result(Settings(code="123"), 300, side(full, 20.0), side(plan, perplexity))


@pytest.mark.parametrize(
    ("result", "part"),
    [
        (_result("123", "123", 20.5), "The plan keeps the code: 3 of 3 digits (3 under full attention)"),
        (_result("123", "123", 40.0), "The plan keeps the code, but the text suffers: 3 of 3"),
        (_result("123", "1.3", 20.5), "The plan loses part of the code, and perplexity hardly tells: 2 of 3"),
        (_result("123", "...", 23.0), "The plan loses the code: 0 of 3"),
        (_result("123", "...", 40.0), "The plan loses the code, and the text suffers: 0 of 3"),
        (_result("12.", "123", 20.5), "Full attention itself misses the code, so this text says little: 3 of 3"),
    ],
)
def test_the_verdict_says_what_became_of_code_and_text(result, part):
    assert figures.verdict(result).startswith(part)


def test_the_examples_show_what_they_say(fresh):
    kept, bottom, bare, blocks, loses = fresh.values()
    assert all(r.found("full") == len(r.settings.code) for r in fresh.values())
    assert kept.found("plan") == 6 and kept.ratio < figures.BROKEN
    assert bottom.found("plan") <= 1 and "perplexity hardly tells" in figures.verdict(bottom)
    assert price(bottom.settings.plan, 8192).score_entries == price(kept.settings.plan, 8192).score_entries
    assert bare.found("plan") == 6 and bare.ratio > 1.5
    assert blocks.found("plan") == 6 and blocks.ratio > 1.4 and blocks.plan.bytes < kept.plan.bytes
    assert loses.found("plan") <= 3 and loses.settings.full == kept.settings.full and loses.tokens > 1500


def test_captions_and_tables_tell_the_numbers(fresh):
    result = fresh[NAMES[0]]
    s, counted = result.settings, price(result.settings.plan, 8192)
    assert "0.58, 0.77" in figures.digits(result).caption and "0.59" in figures.digits(result).caption
    assert "8192 tokens reach it" in figures.cone(s, counted).caption
    assert "red squares mark the 8 full layers" in figures.cone(s, counted).caption
    none = Settings(full=(), sinks=0)
    assert "1891 tokens reach it" in figures.cone(none, price(none.plan, 8192)).caption  # 30 layers of 63, and itself
    assert "no layer is full" in figures.cone(none, price(none.plan, 8192)).caption
    assert "its last 64 tokens and the first 4 tokens (sinks)" in figures.masks(s).caption
    assert "its own block of 64, no sinks" in figures.masks(replace(s, kind="block", sinks=0)).caption
    assert f"gain of {counted.attention_gain:.2f} becomes {counted.whole_gain:.2f}" in figures.left(s, counted).caption
    assert figures.run_rows(result)[0][1:] == ("6 of 6", "6 of 6")
    assert figures.price_rows(counted)[3][1:] == ("100%", "63.0%", counted.whole_gain)
    assert app.thumbnail().startswith("<figure")


@pytest.mark.parametrize("length", [n for _, n in LENGTHS])
def test_every_length_on_the_page_has_a_price_and_pictures(length):
    assert all(views.planned(Settings(length=length)).values())
    assert price(Settings().plan, length).whole_gain <= price(Settings().plan, length).attention_gain

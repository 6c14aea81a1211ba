"""PASTA's page: what it computes, what it stores, what its endpoints answer and how it treats bad input."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from gradio_client.exceptions import AppError

from apps import pasta as app
from apps import pasta_figures, pasta_words
from apps.pasta_comparison import MOST_TOKENS, Comparison, Settings, compare, stored, watch
from zq_lib import pasta
from zq_lib.pasta import MarkupError

NAMES = list(app.EXAMPLES)


@pytest.fixture(scope="session")
def fresh(client) -> dict[str, Comparison]:
    """Every example, run now through the public endpoint."""
    return {
        name: Comparison.from_data(client.predict(*vars(e.settings).values(), api_name="/steer"))
        for name, e in app.EXAMPLES.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_first_view_is_what_a_fresh_run_gives(name, fresh, same_numbers):
    same_numbers(stored()[name].to_data(), fresh[name].to_data())


def test_every_example_is_stored_and_nothing_else():
    assert list(stored()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_steer_endpoint_answers_every_example_as_the_library_does(name, model, fresh):
    settings, answer = app.EXAMPLES[name].settings, fresh[name]
    language_model, tokenizer = model
    prompt = pasta.encode(tokenizer, settings.source)
    with pasta.attach(language_model, settings.config) as steering:
        out = steering.generate(prompt, max_new_tokens=settings.new_tokens)
        with steering.steer(prompt, record=True), torch.no_grad():
            logits = language_model(**prompt.inputs).logits[0, -1]
        share = steering.report().after[:, 0]
    assert answer.steered.ids == out[0, prompt.input_ids.shape[1] :].tolist()
    assert torch.allclose(torch.tensor(answer.steered.share).double(), share.double(), rtol=5e-3, atol=2e-4)
    assert answer.following[0][2] == pytest.approx(float(logits.softmax(-1).max()), rel=5e-3)


def test_the_examples_endpoint_lists_the_examples(client):
    answer = client.predict(api_name="/pasta_examples")
    assert {name: e["notice"] for name, e in answer.items()} == {n: e.notice for n, e in app.EXAMPLES.items()}


def test_only_two_endpoints_are_public():
    public = {fn.api_name for fn in app.build().fns.values() if fn.api_visibility == "public"}
    assert public == {"steer", "pasta_examples"}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"text": "  "}, "has no words"),
        ({"text": "The *capital is"}, "never closes it"),
        ({"text": "no marks here"}, "has no marked word"),
        ({"text": "*a* " + "word " * 330}, f"more than the {MOST_TOKENS}"),
        ({"text": "*a* " + "x" * 5000}, "characters"),
        ({"text": "*a* b", "heads": "one", "layer": 99}, "layer 99"),
        ({"text": "*a* b", "heads": "some"}, "is not known"),
        ({"text": "*a* b", "alpha": 0}, "alpha=0"),
        ({"text": "*a* b", "protect": "last"}, "protect='last'"),
        ({"text": "*a* b", "new_tokens": 1000}, "choose 1 to 48"),
    ],
)
def test_bad_input_is_answered_with_one_readable_sentence(given, part, client):
    with pytest.raises(AppError) as caught:
        client.predict(**given, api_name="/steer")
    message = str(caught.value)
    assert part in message and "Traceback" not in message


def test_an_error_message_cannot_carry_markup(client):
    with pytest.raises(AppError) as caught:
        client.predict(text="<img src=x onerror=alert(1)> *open", api_name="/steer")
    assert "<" not in str(caught.value)


def test_what_is_typed_is_never_an_element_of_a_piece(model):
    text = "<img src=x onerror=alert(1)> says *<b>hello</b>* `$x^2$`"
    result = compare(*model, Settings(text, new_tokens=2))
    html = "".join(v for v in app._views(result)[:6] if isinstance(v, str))
    assert "<img src=x" not in html and "<b>" not in html


def test_copy_as_python_runs_and_prints_the_steered_answer(fresh):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(fresh["Keyword"].settings.python(), {})
    assert said.getvalue() == fresh["Keyword"].steered.answer + "\n"


def test_copy_as_python_keeps_every_setting():
    settings = Settings('it\'s *"odd"*\n\\* text ' * 5, True, 0.1, "one", 3, 2, "special", 7)
    scope: dict[str, object] = {}
    exec(settings.python().split("model, tokenizer")[0].split("load\n", 1)[1], scope)
    assert scope["text"] == settings.text
    assert "alpha=0.1, heads={3: [2]}, protect='special'" in settings.python()


def test_stopping_stops_the_model_and_detaches_it(model):
    language_model, tokenizer = model
    calls = []
    hook = language_model.register_forward_hook(lambda *_: calls.append(1))
    run = watch(language_model, tokenizer, Settings("A *cat* sat on", new_tokens=48))
    for moment in run:
        if moment.answers["plain"]:
            break
    run.close()
    hook.remove()
    assert 0 < len(calls) < 12
    assert language_model.config._attn_implementation == "sdpa"


def test_the_numbers_of_the_page_agree_with_each_other(fresh):
    for name, result in fresh.items():
        marked = torch.tensor(result.marked, dtype=torch.float)
        for side in (result.plain, result.steered):
            assert sum(side.row) == pytest.approx(1, abs=1e-4), name
            assert float((torch.tensor(side.row) * marked).sum()) == pytest.approx(result.share(side), abs=1e-4)
        assert result.share(result.steered) > result.share(result.plain) + 0.3


def test_the_examples_show_what_they_say(fresh):
    fact, pets, keyword, loses = fresh.values()
    assert "Paris" in fact.plain.answer and "Rome" in fact.steered.answer
    assert "duck" in pets.steered.answer and "duck" not in pets.plain.answer
    assert "garden" in keyword.steered.answer and "tea" in keyword.plain.answer
    assert "garden" not in keyword.plain.answer and "tea" not in keyword.steered.answer
    assert "8" in loses.plain.answer and "8" not in loses.steered.answer and not loses.steered.answer.isupper()


@pytest.mark.parametrize(
    ("plain", "chosen", "text"),
    [
        ("Say only this.", {1, 2}, "Say *only this.*"),
        ("a b c", {0, 2}, "*a* b *c*"),
        ("a (b) = c", {0}, "*a* (b) = c"),
        ("2*3 is six", {2}, r"2\*3 is *six*"),
        ("a b", set(), "a b"),
    ],
)
def test_choosing_words_writes_stars_and_reads_them_back(plain, chosen, text):
    assert pasta_words.write(plain, chosen) == text
    read = pasta_words.read(text)
    assert (read.plain, read.chosen) == (plain, frozenset(chosen))


def test_an_open_mark_while_typing_leaves_the_words_as_they_are():
    with pytest.raises(MarkupError):
        pasta_words.read("one *two")
    assert app._read_words("one *two") == {"label": app.OPEN, "__type__": "update"}
    assert app._write_words("one *two", ["0"]) == "one *two"


def test_captions_tell_the_numbers(fresh):
    caption = pasta_figures.attention_map(fresh[NAMES[0]]).caption
    assert "10 steered heads" in caption and "0.933" in caption
    assert '"Rome"' in pasta_figures.next_tokens(fresh[NAMES[0]]).caption

"""The importance of layers, the search for a plan, and the passkey prompts that both are measured on."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core.models import tiny
from zq_lib.masformer import passkey
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.passkey import Probe, retrieve
from zq_lib.masformer.profiling import Importance, profile, search, shipped
from zq_lib.masformer.spans import SpanPlan


def probes(count: int = 2, length: int = 40) -> list[Probe]:
    source = torch.Generator().manual_seed(0)
    return [Probe(torch.randint(3, 128, (length + i,), generator=source), 5, 0.0) for i in range(count)]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
def test_reusing_the_layers_below_changes_no_number(arch: str) -> None:
    model = tiny(arch)
    layers = model.config.num_hidden_layers
    found = profile(model, probes(), span=6, sinks=2)
    whole = retrieve(model, probes()).mean_log_p
    assert found.full == pytest.approx(whole, abs=1e-6) and found.tokens == (40, 41)
    for layer in range(layers):
        plan = SpanPlan.mixed(layers, full=set(range(layers)) - {layer}, span=6, sinks=2)
        with attach(model, plan):
            assert found.drop[layer] == pytest.approx(whole - retrieve(model, probes()).mean_log_p, abs=1e-5)


def test_profiling_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    before = [set(m.__dict__) for m in model.modules()]
    profile(model, probes(1), span=6)
    assert [set(m.__dict__) for m in model.modules()] == before and model.config._attn_implementation == "sdpa"


def test_the_layers_that_cost_most_are_chosen_and_the_file_keeps_them(tmp_path) -> None:
    found = Importance({"layers": 4}, (0.1, 2.0, -0.3, 0.5), -0.1, 32, "window", 0, (40,))
    assert found.choose(2) == (1, 3) and found.choose(0) == () and found.choose(4) == (0, 1, 2, 3)
    assert found.plan(1, span=9, sinks=2) == SpanPlan((9, None, 9, 9), "window", 2)
    found.save(tmp_path / "importance.json")
    assert Importance.load(tmp_path / "importance.json") == found
    with pytest.raises(ValueError, match="count=5 layers cannot be chosen; use 0 to 4"):
        found.choose(5)


def test_the_shipped_importance_belongs_to_the_embedded_model_only() -> None:
    found = shipped()
    assert len(found.drop) == 30 and max(range(30), key=found.drop.__getitem__) == 18
    with pytest.raises(ValueError, match="was measured on a model with"):
        found.check(tiny("llama"))


def test_the_search_returns_the_fewest_layers_within_the_loss() -> None:
    model = tiny("llama")
    found = profile(model, probes(), span=6)
    strict = search(model, probes(), found, loss=0.0, span=6, sinks=0)
    loose = search(model, probes(), found, loss=100.0, span=6, sinks=0)
    assert loose.plan.full == () and len(strict.plan.full) > 0
    for row in (*strict.rows, *loose.rows):
        assert row["within"] == (row["loss"] <= (0.0 if row in strict.rows else 100.0))
    with pytest.raises(ValueError, match="loss=-1"):
        search(model, probes(), found, loss=-1)


def test_a_probe_needs_an_answer_that_fits() -> None:
    with pytest.raises(ValueError, match="answer=4 tokens do not fit a text of 4"):
        Probe(torch.arange(4), 4, 0.0)
    with pytest.raises(ValueError, match="probes=\\[\\] asks nothing"):
        retrieve(tiny("llama"), [])


def test_prompts_hide_the_code_beyond_the_window_and_ask_for_it_last(smollm2) -> None:
    _, tokenizer = smollm2
    for probe in [*passkey.selection(tokenizer), *passkey.held_out(tokenizer)]:
        code = probe.ids[-probe.answer :]
        text = probe.ids[: -probe.answer].tolist()
        assert probe.answer == passkey.DIGITS and tokenizer.decode(code).isdigit()
        last = max(i for i in range(len(text)) if text[i : i + 6] == code.tolist())
        assert len(probe.ids) - (last + 6) > (32 if len(probe.ids) < 400 else 128)


def test_selection_and_held_out_prompts_share_no_wording(smollm2) -> None:
    _, tokenizer = smollm2
    chosen = [tokenizer.decode(p.ids) for p in passkey.selection(tokenizer)]
    held = [tokenizer.decode(p.ids) for p in passkey.held_out(tokenizer)]
    assert all("pass key" in text for text in chosen) and not any("pass key" in text for text in held)
    assert not any(line in text for line in passkey._filler() for text in held)
    lengths = [len(p.ids) for p in passkey.held_out(tokenizer)]
    assert 440 < min(lengths) < 490 and 880 < max(lengths) <= 926
    assert [p.ids.tolist() for p in passkey.held_out(tokenizer)] == [
        p.ids.tolist() for p in passkey.held_out(tokenizer)
    ]


def test_the_full_model_finds_the_code_and_local_layers_forget_it(smollm2) -> None:
    model, tokenizer = smollm2
    (probe,) = passkey.selection(tokenizer, count=1, tokens=200)
    assert retrieve(model, [probe]).accuracy == 1.0
    with attach(model, full=(), window=32):
        assert retrieve(model, [probe]).accuracy <= 0.34
    with attach(model, shipped().plan(8, span=32)):
        assert retrieve(model, [probe]).accuracy >= 0.8

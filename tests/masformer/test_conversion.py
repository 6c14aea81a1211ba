"""attach, report, detach, save and load; and what cannot be converted."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from zq_lib.core.models import tiny
from zq_lib.masformer.cache import SpanCache
from zq_lib.masformer.config import MASFormerConfig
from zq_lib.masformer.conversion import attach, load
from zq_lib.masformer.spans import SpanPlan

GROUPED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}
PLAN = SpanPlan.mixed(3, full=(1,), span=7, sinks=2)


def texts(rows: int = 1, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def trace(model) -> tuple:
    """All that attaching may touch."""
    hooks = [(m._forward_pre_hooks, m._forward_hooks, set(m.__dict__)) for m in model.modules()]
    return model.config.to_dict(), model.config._attn_implementation, [(dict(a), dict(b), c) for a, b, c in hooks]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma"])
def test_detaching_leaves_no_trace(arch: str) -> None:
    model, ids = tiny(arch), texts()
    before = trace(model)
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model, full=(1,), window=5) as conversion:
            assert not torch.equal(model(ids).logits, expected)
        conversion.detach()
        assert trace(model) == before and torch.equal(model(ids).logits, expected)


def test_an_error_inside_the_block_detaches_too() -> None:
    model = tiny("llama")
    before = trace(model)
    with pytest.raises(ZeroDivisionError), attach(model, PLAN):
        1 / 0  # noqa: B018
    assert trace(model) == before


def test_the_report_says_what_was_computed_and_its_cost() -> None:
    model = tiny("llama")
    with attach(model, PLAN) as conversion, torch.no_grad():
        with pytest.raises(RuntimeError, match="has not run since it was attached"):
            conversion.report()
        model(texts(), use_cache=False)
        report = conversion.report()
        assert report.calls == {0: 1, 1: 1, 2: 1} and (report.local_calls, report.full_calls) == (2, 1)
        assert (report.score_entries, report.full_entries) == (PLAN.cost(40).total, PLAN.cost(40).full)
        assert report.share == PLAN.cost(40).share and report.masked_calls == 0
        conversion.clear()
        model.generate(texts(), max_new_tokens=5)
        assert conversion.report().score_entries == PLAN.cost(44).total, "prefill and steps add up to the whole text"


def test_a_config_a_plan_and_keywords_say_the_same() -> None:
    model, ids, found = tiny("llama"), texts(), []
    for given, settings in (
        (MASFormerConfig(full=(1,), window=7, sinks=2), {}),
        (MASFormerConfig(full=(1,)), {"window": 7, "sinks": 2}),
        (PLAN, {}),
        (None, {"full": (1,), "window": 7, "sinks": 2}),
    ):
        with attach(model, given, **settings) as conversion, torch.no_grad():
            assert conversion.plan == PLAN
            found.append(model(ids).logits)
    assert all(torch.equal(found[0], other) for other in found)
    with pytest.raises(ValueError, match="'window' cannot be given beside a SpanPlan"):
        attach(model, PLAN, window=9)


def test_a_saved_model_is_loaded_with_its_plan(tmp_path, monkeypatch) -> None:
    model, ids = tiny("llama"), texts()
    with attach(model, PLAN) as conversion, torch.no_grad():
        expected = model(ids).logits
        conversion.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["masformer"] == PLAN.to_dict()
    monkeypatch.setattr("zq_lib.core.models.AutoTokenizer.from_pretrained", lambda *_, **__: _Tokenizer())
    again, _, handle = load(tmp_path)
    with torch.no_grad():
        assert handle.plan == PLAN and torch.equal(again(ids).logits, expected)
        handle.detach()
        assert again.config.masformer == PLAN.to_dict(), "the plan came with the model, so it stays"
        assert not torch.equal(again(ids).logits, expected)


class _Tokenizer:
    pad_token = "<pad>"


def test_a_model_that_carries_no_plan_needs_one() -> None:
    with pytest.raises(ValueError, match="carries no plan; give one"):
        attach(tiny("llama"))


def test_generate_takes_a_span_cache_unless_told_otherwise() -> None:
    model, ids = tiny("llama"), texts()
    with attach(model, PLAN):
        out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, SpanCache) and out.past_key_values.plan == PLAN
        own = DynamicCache()
        out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, past_key_values=own)
        assert out.past_key_values is own
        slow = model.generate(ids, max_new_tokens=3, use_cache=False)
        assert torch.equal(slow, out.sequences)
        with pytest.raises(ValueError, match="allocates its keys in advance"):
            model.generate(ids, max_new_tokens=3, cache_implementation="static")
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache


def test_a_second_plan_is_refused_and_the_first_stays() -> None:
    model, ids = tiny("llama"), texts()
    with attach(model, PLAN), torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(ValueError, match="follows a plan already; detach"):
            attach(model, full=(0,))
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    "plan, message",
    [
        (SpanPlan((4, 4)), "plan has 2 layers but the model has 3"),
        (SpanPlan((4, (3, 3), 4)), r"layers\[1\] has 2 spans but the model has 4 heads"),
        (SpanPlan((4, 300, 4)), r"layers\[1\] has a window of 300, above the model's context of 256"),
        (MASFormerConfig(full=(5,)), "full names layer 5, but the model has layers 0 to 2"),
    ],
)
def test_plans_that_do_not_fit_are_refused_and_change_nothing(plan, message: str) -> None:
    model = tiny("llama")
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        attach(model, plan)
    assert trace(model) == before


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_a_key_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window={window} must be"):
        attach(tiny("llama"), window=window)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: tiny("gemma3"), "has sliding windows of its own"),
        (lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)), "sliding windows"),
        (lambda: tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding windows"),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(
                **GROUPED, head_dim=8, layer_types=["full_attention"] * 2, sliding_window=None)),
            "soft-caps its attention scores",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, add_cross_attention=True)),
            "has cross-attention",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)),
            "use a decoder such as Llama",
        ),
        (
            lambda: GPTNeoForCausalLM(GPTNeoConfig(
                vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])),
            "GPTNeo",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_converted_are_refused_with_the_reason(build, message: str) -> None:
    model = build()
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        attach(model, window=8, count=1)
    assert trace(model) == before


def test_eager_attention_is_refused_with_the_remedy() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"'eager' cannot be replaced; call model.set_attn_implementation\('sdpa'\)"):
        attach(model, PLAN)


def test_half_precision_stays_half() -> None:
    model, ids = tiny("llama").to(torch.bfloat16), texts()
    with attach(model, PLAN), torch.no_grad():
        out = model(ids).logits
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
        assert model.generate(ids, max_new_tokens=4).shape == (1, 44)

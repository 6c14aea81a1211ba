"""The registered attention: local where the plan says so, dense where it must, and never a full score matrix else."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zq_lib import gear, pasta
from zq_lib.core.models import tiny
from zq_lib.masformer import attention
from zq_lib.masformer.attention import padding_of
from zq_lib.masformer.cache import SpanCache
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.reference import masked_attention, visible
from zq_lib.masformer.spans import SpanPlan

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma")


def texts(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def dense_copy(model: PreTrainedModel, plan: SpanPlan, mask: torch.Tensor | None = None) -> PreTrainedModel:
    """The model in double precision, with every layer under the plan's dense mask."""

    def dense(module, query, key, value, attention_mask, scaling=None, **kwargs):  # noqa: ANN001, ANN202
        span = plan.layers[module.layer_idx]
        real = None if mask is None else mask.bool()
        seen = visible(query.shape[2], key.shape[2], span, plan.kind, plan.sinks, padding=real)
        return masked_attention(query, key, value, seen, scale=scaling)[0].transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_oracle", dense)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("dense_oracle")
    return exact


def oracle(
    model: PreTrainedModel, plan: SpanPlan, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """The logits of that copy. [B, T, V]"""
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return dense_copy(model, plan, mask)(ids, position_ids=place, use_cache=False).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "kind, span, sinks", [("window", 7, 0), ("window", 6, 3), ("block", 8, 2), ("two_block", 5, 0)]
)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_prefill_equals_the_masked_reference_in_double_precision(arch, kind, span, sinks, side) -> None:
    model, ids = tiny(arch), texts()
    plan = SpanPlan.mixed(model.config.num_hidden_layers, full=(1,), span=span, kind=kind, sinks=sinks)
    mask, place = None, None
    if side:
        mask = torch.ones_like(ids)
        mask[1, slice(0, 9) if side == "left" else slice(31, 40)] = 0
        place = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = oracle(model, plan, ids, mask)
    with attach(model, plan) as conversion, torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
        report = conversion.report()
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert (found[valid] - expected[valid]).abs().max() < 2e-4 * expected.abs().max()
    assert report.local_calls == len(plan.layers) - 1 and report.masked_calls == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plan_of_full_layers_is_the_model_bit_for_bit(arch: str) -> None:
    model, ids = tiny(arch), texts()
    plan = SpanPlan((None,) * model.config.num_hidden_layers)
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model, plan):
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["window", "block"])
def test_a_span_that_covers_the_text_equals_full_attention(kind: str) -> None:
    model, ids = tiny("llama"), texts()
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model, full=(), window=64, kind=kind, sinks=0):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_distant_token_changes_nothing_bitwise_unless_a_layer_is_full() -> None:
    model, ids = tiny("llama"), texts(1)
    other = ids.clone()
    other[0, 5] = 3 + (other[0, 5] + 1) % 100
    with torch.no_grad():
        for full, reaches in (((), False), ((1,), True)):
            with attach(model, full=full, window=5, sinks=0):
                one, two = model(ids).logits[0, -1], model(other).logits[0, -1]
            assert torch.equal(one, two) != reaches


def test_heads_of_one_layer_may_have_their_own_spans() -> None:
    model, ids = tiny("llama"), texts()
    plan = SpanPlan(((3, 9, None, 5), None, (4, 4, 6, 6)), sinks=2)
    expected = oracle(model, plan, ids)
    with attach(model, plan), torch.no_grad():
        found = model(ids, use_cache=False).logits
        cache = SpanCache(plan)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 2e-4 * scale
    assert (torch.cat(steps, 1) - expected).abs().max() < 2e-4 * scale


def test_gradients_are_those_of_the_masked_reference() -> None:
    model, ids = tiny("llama"), texts()
    plan = SpanPlan.mixed(3, full=(1,), span=7, sinks=2)
    exact = dense_copy(model, plan)
    exact(ids, use_cache=False).logits.square().mean().backward()
    with attach(model, plan):
        model(ids, use_cache=False).logits.square().mean().backward()
    for (name, found), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (found.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm(), name


def test_gradient_checkpointing_recomputes_the_same() -> None:
    model, ids = tiny("llama"), texts()
    grads = []
    with attach(model, full=(1,), window=7):
        for checkpoint in (False, True):
            model.train()
            if checkpoint:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(ids, use_cache=False).logits.square().mean().backward()
            grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.equal(*grads)


def test_dropout_takes_the_dense_path_and_says_so() -> None:
    model, ids = tiny("gpt2", attn_pdrop=0.5), texts()
    with attach(model, full=(), window=7) as conversion:
        model.train()
        model(ids, use_cache=False)
        assert conversion.report().masked_calls == 2


def test_a_mask_of_ones_own_is_joined_with_the_span() -> None:
    model, ids = tiny("llama"), texts(1)
    own = torch.ones(1, 1, 40, 40).tril().bool()
    own[..., 20:, :20] = False  # two packed texts
    with attach(model, full=(1,), window=7, sinks=0) as conversion, torch.no_grad():
        place = torch.cat([torch.arange(20), torch.arange(20)])[None]
        packed = model(ids, attention_mask=own, position_ids=place, use_cache=False).logits[:, 20:]
        assert conversion.report().masked_calls == 2
        alone = model(ids[:, 20:], use_cache=False).logits
        additive = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
        again = model(ids, attention_mask=additive, position_ids=place, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(again, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_read_from_the_librarys_mask(padded: bool) -> None:
    real = torch.ones(2, 30).bool()
    real[0, :7] = not padded
    mask = sdpa_mask(2, 30, 30, attention_mask=real, mask_function=causal_mask_function, allow_is_causal_skip=False)
    found, plain = padding_of(mask)
    assert plain and (torch.equal(found, real) if padded else found is None)
    mask = mask.clone()
    mask[0, 0, 20, 10] = False
    assert padding_of(mask) == (None, False)


def test_no_score_matrix_is_built() -> None:
    """4,096 tokens in four heads would be 67 million scores a layer; the largest tensor is far smaller."""
    model, ids = tiny("llama", max_position_embeddings=4096), texts(1, 4096)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with attach(model, full=(), window=64, sinks=2), torch.no_grad(), Watch():
        model(ids, use_cache=False)
    assert max(sizes) < 4096 * 4096


@pytest.mark.parametrize("layers", ["local", "full"])
@pytest.mark.parametrize("first", ["pasta", "masformer"])
def test_steering_works_on_an_attached_model_with_any_cache(layers: str, first: str) -> None:
    model, ids = tiny("llama"), texts(1, 30)
    plan = SpanPlan.mixed(3, full=(1,), span=9, sinks=2)
    heads = {1: (0, 2)} if layers == "full" else {0: (1,), 2: (0, 3)}
    prompt = pasta.Prompt(**_marked(ids))
    with ExitStack() as stack:
        if first == "masformer":
            stack.enter_context(attach(model, plan))
        steering = stack.enter_context(pasta.attach(model, heads=heads))
        if first == "pasta":
            stack.enter_context(attach(model, plan))
        with torch.no_grad():
            plain = model(ids).logits[:, -1]
            with steering.steer(prompt):
                whole = model(ids, use_cache=False).logits[:, -1]
                outs = []
                for cache in (SpanCache(plan), DynamicCache()):
                    model(ids[:, :26], past_key_values=cache)
                    for i in range(26, 30):
                        last = model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
                    outs.append(last)
    assert (whole - plain).abs().max() > 1e-3
    for out in outs:
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def _marked(ids: torch.Tensor) -> dict:
    marked = torch.zeros_like(ids).bool()
    marked[:, 22:25] = True
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "marked": marked,
        "weights": marked.float(),
        "special": torch.zeros_like(ids).bool(),
        "message": torch.zeros_like(ids),
        "texts": [""],
        "spans": [()],
    }


@pytest.mark.parametrize("first", ["gear", "masformer"])
def test_a_compressed_cache_serves_local_and_full_layers(first: str) -> None:
    model, ids = tiny("llama", num_attention_heads=2, num_key_value_heads=2), texts(1, 60)
    plan = SpanPlan.mixed(3, full=(1,), span=9, sinks=2)
    cache = gear.GearCache(model.config, gear.GearConfig.plain(8).but(group=16, buffer=16, recent=0))
    with ExitStack() as stack, torch.no_grad():
        if first == "gear":
            stack.enter_context(gear.attend_packed(model))
        stack.enter_context(attach(model, plan))
        if first == "masformer":
            stack.enter_context(gear.attend_packed(model))
        whole = model(ids, use_cache=False).logits
        steps = [model(ids[:, :40], past_key_values=cache).logits]
        steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    error = (torch.cat(steps, 1) - whole).abs().max()
    assert 0 < error < 0.05 * whole.abs().max() and cache.gear_layers()[0].blocks


def test_caches_that_local_layers_cannot_read_are_refused() -> None:
    model, ids = tiny("llama"), texts(1)
    plan = SpanPlan.mixed(3, full=(1,), span=9)
    with attach(model, plan):
        with pytest.raises(ValueError, match="past_key_values=StaticCache allocates its keys in advance"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(ValueError, match="past_key_values was made for another plan"):
            model(ids, past_key_values=SpanCache(SpanPlan.mixed(3, full=(0,), span=9)))
        assert attention._RUNNING.get() is None


def test_a_copy_of_an_attached_model_follows_the_plan() -> None:
    model, ids = tiny("llama"), texts(1)
    with attach(model, full=(1,), window=5), torch.no_grad():
        twin = copy.deepcopy(model)
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, expected), "detaching the original leaves it alone"


def test_two_threads_with_their_own_caches_do_not_meet() -> None:
    model, found = tiny("llama"), {}
    with attach(model, full=(1,), window=5):
        expected = {n: model.generate(texts(1, n), max_new_tokens=15) for n in (12, 31)}

        def work(n: int) -> None:
            for _ in range(3):
                found[n] = model.generate(texts(1, n), max_new_tokens=15)

        threads = [threading.Thread(target=work, args=(n,)) for n in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in expected)

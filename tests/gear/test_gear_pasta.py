"""Steering while compressed: both methods on one model, in any order, and gone without trace."""

from __future__ import annotations

import contextlib

import pytest
import torch
from gear_cases import FULL, LOSSLESS, ids, tiny
from oracle import random_prompt, some_heads
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from zq_lib import pasta
from zq_lib.core.attach import BIAS_AWARE, dense_attention
from zq_lib.gear import GearCache, GearConfig, attend_packed

ORDERS = ("pasta first", "gear first", "restored")
each_order = pytest.mark.parametrize("order", ORDERS)


@contextlib.contextmanager
def steered(model: PreTrainedModel, order: str, **settings):  # noqa: ANN003, ANN201
    """The model steerable and, unless restored, packed; entered in this order and left in the opposite one."""
    with contextlib.ExitStack() as stack:
        if order == "gear first":
            stack.enter_context(attend_packed(model))
        steering = stack.enter_context(pasta.attach(model, **settings))
        if order == "pasta first":
            stack.enter_context(attend_packed(model))
        yield steering


def tokens(
    model: PreTrainedModel, prompt: pasta.Prompt, cache: object, order: str, options: dict, **settings
) -> Tensor:  # noqa: ANN003,E501
    with steered(model, order, **settings) as steering:
        if order == "restored" and isinstance(cache, GearCache):
            cache.set_padding(prompt.attention_mask)
        found = steering.generate(prompt, past_key_values=cache, min_new_tokens=12, max_new_tokens=12, **options)
        assert steering.report().calls > 12
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks
    return found


def logits(model: PreTrainedModel, prompt: pasta.Prompt, later: list[Tensor], cache: object) -> Tensor:
    """Of the prompt and then of some tokens at a time."""
    with torch.no_grad():
        return torch.cat([model(x, past_key_values=cache).logits for x in (prompt.input_ids, *later)], 1)


@pytest.mark.parametrize(
    ("arch", "order", "padding"),
    [
        *(("llama", order, "left") for order in ORDERS),
        ("llama", "pasta first", None),
        ("gpt2", "gear first", "left"),
        ("gemma3", "pasta first", "left"),
        ("gemma3", "restored", None),
    ],
)
def test_steered_tokens_equal_those_of_a_steered_dense_cache(arch: str, order: str, padding: str | None) -> None:
    model, prompt = tiny(arch), random_prompt(tokens=24, padding=padding)
    settings = {"heads": some_heads(model)}
    mine = tokens(model, prompt, GearCache(model.config, LOSSLESS), order, {}, **settings)
    dense = tokens(model, prompt, DynamicCache(config=model.config), "restored", {}, **settings)
    assert torch.equal(mine, dense)


@pytest.mark.parametrize("order", ["pasta first", "restored"])
@pytest.mark.parametrize(
    "settings",
    [{"mode": "target_mass", "share": 0.6}, {"mode": "include"}, {"mode": "generation"}, {"alpha": 0.3}],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_mode_steers_compressed_tokens_alike(order: str, settings: dict) -> None:
    model, prompt = tiny("llama"), random_prompt(tokens=24)
    cache = GearCache(model.config, LOSSLESS)
    mine = tokens(model, prompt, cache, order, {}, heads="all", **settings)
    dense = tokens(model, prompt, DynamicCache(config=model.config), "restored", {}, heads="all", **settings)
    assert torch.equal(mine, dense)


@each_order
def test_beams_steer_compressed_tokens_alike(order: str) -> None:
    model, prompt, options = tiny("llama"), random_prompt(tokens=24), {"num_beams": 3, "num_return_sequences": 2}
    mine = tokens(model, prompt, GearCache(model.config, LOSSLESS), order, options, heads="all")
    dense = tokens(model, prompt, DynamicCache(config=model.config), "restored", options, heads="all")
    assert torch.equal(mine, dense)


@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("settings", [{}, {"mode": "target_mass", "share": 0.6}], ids=["odds", "share"])
def test_steered_packed_logits_equal_steered_restored_ones_at_two_bits(arch: str, settings: dict) -> None:
    model, prompt = tiny(arch), random_prompt(rows=2, tokens=30, padding=None)
    later = list(ids(2, 14, seed=1).split([1, 1, 5, 1, 6], 1))
    found = []
    for order in ORDERS:
        with steered(model, order, heads=some_heads(model), **settings) as steering, steering.steer(prompt):
            found.append(logits(model, prompt, later, GearCache(model.config, FULL)))
    plain = logits(model, prompt, later, GearCache(model.config, FULL))
    scale = max(1.0, float(plain.abs().max()) / 10)
    assert (found[0] - found[2]).abs().max() < 1e-3 * scale and (found[1] - found[2]).abs().max() < 1e-3 * scale
    assert (found[0] - plain).abs().max() > 0.1  # steered at all


@each_order
def test_shares_are_recorded_from_compressed_tokens(order: str) -> None:
    model, prompt = tiny("llama"), random_prompt(rows=2, tokens=30, padding=None)
    later = list(ids(2, 3, seed=1).split(1, 1))
    shares = []
    for cache, how in ((GearCache(model.config, LOSSLESS), order), (DynamicCache(config=model.config), "restored")):
        with steered(model, how, heads="all") as steering:
            with steering.steer(prompt, record=True):
                logits(model, prompt, later, cache)
            shares.append((steering.report(), steering.last_row()))
    (mine, row), (dense, other) = shares
    assert torch.allclose(mine.before, dense.before, atol=1e-3) and torch.allclose(mine.after, dense.after, atol=1e-3)
    assert torch.allclose(row, other, atol=1e-3) and mine.calls == dense.calls
    assert (mine.after[0] > mine.before[0]).all()


@pytest.mark.parametrize("first", ["gear", "pasta"])
@pytest.mark.parametrize("leave", ["gear", "pasta"])
def test_attaching_and_detaching_in_any_order_gives_the_model_back(first: str, leave: str) -> None:
    model, prompt = tiny("llama"), random_prompt(rows=1, tokens=24, padding=None)
    later = list(ids(1, 4, seed=1).split(1, 1))
    plain = logits(model, prompt, later, GearCache(model.config, FULL))
    packing, parts = attend_packed(model), {}

    def start(which: str) -> None:
        parts[which] = packing.__enter__() if which == "gear" else pasta.attach(model, heads="all")

    def stop(which: str) -> None:
        packing.__exit__(None, None, None) if which == "gear" else parts["pasta"].detach()

    other = {"gear": "pasta", "pasta": "gear"}
    start(first)
    assert model.config._attn_implementation == {"gear": "zq_gear", "pasta": "zq_pasta"}[first]
    start(other[first])
    assert model.config._attn_implementation == "zq_gear"
    with parts["pasta"].steer(prompt):
        both = logits(model, prompt, later, GearCache(model.config, FULL))
    stop(leave)
    if leave == "gear":
        assert model.config._attn_implementation == "zq_pasta"
        with parts["pasta"].steer(prompt):
            assert torch.allclose(logits(model, prompt, later, GearCache(model.config, FULL)), both, atol=5e-3)
    else:
        assert model.config._attn_implementation == "zq_gear"
        found = logits(model, prompt, later, GearCache(model.config, FULL))
        assert torch.allclose(found, plain, atol=5e-3) and not torch.allclose(found, both, atol=0.1)
    stop(other[leave])
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks
    assert torch.equal(logits(model, prompt, later, GearCache(model.config, FULL)), plain)


def test_a_packed_model_that_is_attached_but_not_steered_is_unchanged_bit_for_bit() -> None:
    model, prompt = tiny("llama"), random_prompt(rows=1, tokens=24, padding=None)
    later = list(ids(1, 4, seed=1).split(1, 1))
    with attend_packed(model):
        plain = logits(model, prompt, later, GearCache(model.config, FULL))
        with pasta.attach(model, heads="all") as steering:
            assert torch.equal(logits(model, prompt, later, GearCache(model.config, FULL)), plain)
            with steering.steer(prompt):
                assert not torch.equal(logits(model, prompt, later, GearCache(model.config, FULL)), plain)


def test_the_reader_of_packed_caches_ranks_above_the_one_that_biases() -> None:
    model = tiny("llama")
    assert BIAS_AWARE["zq_gear"] > BIAS_AWARE["zq_pasta"] == 0
    assert dense_attention(model.model.layers[0].self_attn).__name__ == "sdpa_attention_forward"


def test_the_embedded_model_steers_alike_at_eight_bits(smollm2) -> None:
    model, tokenizer = smollm2
    text = "The weather is fine today. " * 14 + (
        "Previously, the capital of France was Paris. *Currently, the capital of France is Rome.* The capital of France"
    )
    prompt = pasta.encode(tokenizer, text)
    gear = GearConfig.plain(8, sinks=4, meta_dtype="float32")
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    found = {}
    for order in ORDERS:
        with steered(model, order) as steering:
            found[order] = steering.generate(prompt, past_key_values=GearCache(model.config, gear), **options)
    with pasta.attach(model) as steering:
        dense = steering.generate(prompt, past_key_values=DynamicCache(config=model.config), **options)
    for order, mine in found.items():
        assert torch.equal(mine, dense), order
    plain = model.generate(**prompt.inputs, do_sample=False, **options)
    assert not torch.equal(plain, dense)
    assert model.config._attn_implementation == "sdpa"

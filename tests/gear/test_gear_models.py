"""GearCache in `generate` and in forwards of tiny models, restored and packed; the embedded model where words count."""

from __future__ import annotations

import copy

import pytest
import torch
from gear_cases import ARCHITECTURES, FULL, LOSSLESS, assert_same, error, frozen, held, ids, left_padded, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from zq_lib.gear import GearCache, GearConfig, attend_packed, attention

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
each_path = pytest.mark.parametrize("packed", [False, True], ids=["restored", "packed"])


class path:  # noqa: N801
    """`with path(model, packed)`: packed attention or none."""

    def __init__(self, model: PreTrainedModel, packed: bool) -> None:
        self.context = attend_packed(model) if packed else torch.no_grad()

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def generated(model: PreTrainedModel, cache: object, packed: bool = False, **options) -> Tensor:  # noqa: ANN003
    with path(model, packed), torch.no_grad():
        return model.generate(past_key_values=cache, **GREEDY | options)


def both(
    model: PreTrainedModel, packed: bool, gear: GearConfig = LOSSLESS, **options
) -> tuple[Tensor, Tensor, GearCache]:  # noqa: ANN003,E501
    """What a compressed and what a dense cache generate, and the compressed cache."""
    cache = GearCache(model.config, gear)
    mine = generated(model, cache, packed, **options)
    return mine, generated(model, DynamicCache(config=model.config), **options), cache


@pytest.mark.parametrize("arch", ARCHITECTURES)
@each_path
def test_greedy_tokens_equal_those_of_a_dense_cache_when_nothing_is_lost(arch: str, packed: bool) -> None:
    mine, dense, cache = both(tiny(arch), packed, input_ids=ids(2, 30))
    assert torch.equal(mine, dense)
    assert sum(b.length for b in cache.gear_layers()[1 if arch == "gemma3" else 0].blocks) == 32


def test_a_short_cache_is_read_as_one_tile_by_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny("llama"), ids(2, 60)
    read = []
    tilewise = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: read.append(1) or tilewise(*a, **k))
    tokens = {}
    for short in (0, 10_000):
        monkeypatch.setattr(attention, "SHORT", short)
        read.clear()
        tokens[short] = generated(model, GearCache(model.config, FULL), True, input_ids=prompt)
        assert bool(read) == (short == 0)
    assert torch.equal(tokens[0], tokens[10_000])


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        *((arch, FULL) for arch in ARCHITECTURES),
        ("llama", FULL.but(scheme="kcvt", buffer=5)),
        ("gemma3", FULL.but(bits=3, clip=True, factor_bits=8)),
    ],
)
def test_packed_logits_equal_restored_ones(arch: str, config: GearConfig) -> None:
    """A prompt in chunks, single tokens and several tokens to verify; within 1e-3 as asked, and far below."""
    model, x = tiny(arch), ids(2, 64)
    caches, found = [GearCache(model.config, config) for _ in range(2)], ([], [])
    for packed, cache, logits in zip((False, True), caches, found, strict=True):
        with path(model, packed), torch.no_grad():
            for part in x.split([20, 20, 1, 1, 8, 1, 5, 8], 1):
                logits.append(model(part, past_key_values=cache).logits)
    scale = torch.cat(found[0], 1).abs().max()
    assert (torch.cat(found[0], 1) - torch.cat(found[1], 1)).abs().max() < 1e-3 * max(1.0, float(scale) / 10)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *((arch, torch.bfloat16) for arch in ("llama", "opt", "gpt_neox", "gemma3")),
        ("llama", torch.float16),
        ("gpt2", torch.float16),
    ],
)
def test_half_precision_runs_packed_and_restored(arch: str, dtype: torch.dtype) -> None:
    model, x = tiny(arch).to(dtype), ids(2, 40)
    with torch.no_grad():
        full = model(x, use_cache=False).logits.float()
    for packed in (False, True):
        cache, found = GearCache(model.config, LOSSLESS), []
        with path(model, packed), torch.no_grad():
            for part in x.split([30, 1, 1, 8], 1):
                found.append(model(part, past_key_values=cache).logits.float())
        assert cache.gear_layers()[1].exact_keys.dtype == dtype
        assert error(full, torch.cat(found, 1)) < {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]


@each_path
def test_sampling_equals_a_dense_cache_with_the_same_seed(packed: bool) -> None:
    model, options = tiny("llama"), {"do_sample": True, "num_return_sequences": 3, "top_k": 5}
    found = []
    for cache in (GearCache(model.config, LOSSLESS), DynamicCache(config=model.config)):
        torch.manual_seed(0)
        found.append(generated(model, cache, packed, input_ids=ids(2), **options))
    assert found[0].shape == (6, 42) and torch.equal(*found)


@pytest.mark.parametrize(("arch", "packed"), [("llama", False), ("llama", True), ("gemma3", False), ("gpt2", True)])
def test_beams_equal_a_dense_cache(arch: str, packed: bool) -> None:
    mine, dense, cache = both(tiny(arch), packed, input_ids=ids(2), num_beams=3, num_return_sequences=2)
    assert torch.equal(mine, dense) and cache.get_seq_length() == 41


@each_path
def test_beams_at_two_bits_store_what_a_cache_of_the_winning_text_would(packed: bool) -> None:
    """With one layer the stored keys depend on the tokens alone: the rows of the beams are those of their texts."""
    model = tiny("llama", num_hidden_layers=1)
    cache = GearCache(model.config, FULL)
    with path(model, packed), torch.no_grad():
        model.generate(ids(2), past_key_values=cache, num_beams=3, max_new_tokens=12, min_new_tokens=12)
        direct = [GearCache(model.config, FULL) for _ in range(6)]
        texts = recover(model, cache)
        for row in range(6):
            text = texts[row : row + 1]
            for part in text.split([30, *[1] * 11], 1):
                model(part, past_key_values=direct[row])
    for row in range(6):
        for a, b in zip(direct[row].layers[0].blocks, cache.layers[0].blocks, strict=True):
            assert (a.keys.codes[0] == b.keys.codes[row]).float().mean() > 0.99  # models round differently in a batch
            for mine, other in zip(a.dequantize(), b.dequantize(), strict=True):
                assert error(mine[0], other[row]) < 2e-3


def recover(model: PreTrainedModel, cache: GearCache) -> Tensor:
    """The text of every row, by the value vector of each token, which in the first layer names it."""
    with torch.no_grad():
        block = model.model.layers[0]
        words = block.self_attn.v_proj(block.input_layernorm(model.model.embed_tokens.weight))  # [V, G D]
    _, values = cache.layers[0].dequantize()
    rows = values.transpose(1, 2).flatten(2)  # [B, S, G D]
    distance = torch.cdist(rows, words)
    return distance.argmin(-1)


@pytest.mark.parametrize(("arch", "packed"), [("llama", False), ("llama", True), ("gemma3", True)])
def test_assisted_generation_equals_a_dense_cache(arch: str, packed: bool) -> None:
    """Half of the assistant's guesses are wrong, so the cache is cropped all the time."""
    model, assistant = tiny(arch), tiny(arch, num_hidden_layers=2, layer_types=None if arch == "llama" else
                                        ["sliding_attention", "full_attention"])  # fmt: skip
    crops = []
    for gear in (LOSSLESS, FULL):
        cache = GearCache(model.config, gear)
        original = cache.crop
        cache.crop = lambda n, original=original: (crops.append(n), original(n))[1]
        mine = generated(model, cache, packed, input_ids=ids(1), assistant_model=assistant)
        if gear is LOSSLESS:
            assert torch.equal(mine, generated(model, DynamicCache(config=model.config), input_ids=ids(1)))
        assert cache.is_croppable and cache.get_seq_length() == 41
        assert sum(b.length for b in cache.gear_layers()[1].blocks) >= 24
    assert min(crops) < 0


@pytest.mark.parametrize(("packed", "chunk"), [(False, 7), (True, 7), (True, 13)])
def test_a_prompt_in_chunks_equals_a_dense_cache_and_one_fed_by_hand(packed: bool, chunk: int) -> None:
    model = tiny("qwen2")
    for gear in (LOSSLESS, FULL):
        cache, direct = GearCache(model.config, gear), GearCache(model.config, gear)
        mine = generated(model, cache, packed, input_ids=ids(2), prefill_chunk_size=chunk)
        with path(model, packed), torch.no_grad():
            for part in [*ids(2).split(chunk, 1), *mine[:, 30:-1].split(1, 1)]:
                model(part, past_key_values=direct)
        for name, x in held(direct.layers).items():
            assert torch.equal(x, held(cache.layers)[name]), name
        if gear is LOSSLESS:
            dense = DynamicCache(config=model.config)
            assert torch.equal(mine, generated(model, dense, input_ids=ids(2)))


@each_path
def test_several_turns_with_one_cache_equal_a_dense_cache(packed: bool) -> None:
    model, caches = tiny("llama"), []
    for make in (lambda: GearCache(model.config, LOSSLESS), lambda: DynamicCache(config=model.config)):
        cache, text = make(), ids(1, 20)
        for turn in range(3):
            text = generated(model, cache, packed, input_ids=text, max_new_tokens=7, min_new_tokens=7)
            text = torch.cat([text, ids(1, 9, seed=turn + 5)], 1)
        caches.append((cache, text))
    assert torch.equal(caches[0][1], caches[1][1])
    assert caches[0][0].get_seq_length() == caches[1][0].get_seq_length() == 58


@each_path
def test_several_turns_never_touch_what_is_compressed(packed: bool) -> None:
    model, text = tiny("llama"), ids(1, 20)
    cache = GearCache(model.config, FULL)
    for turn in range(3):
        before = {n: x for n, (_, x) in frozen(cache.layers).items() if n.endswith("codes")}
        text = generated(model, cache, packed, input_ids=text, max_new_tokens=7, min_new_tokens=7)
        after = {n: x for n, (_, x) in frozen(cache.layers).items() if n.endswith("codes")}
        assert all(after[n].startswith(x) for n, x in before.items()) and len(after) >= len(before)
        text = torch.cat([text, ids(1, 9, seed=turn + 5)], 1)


@pytest.mark.parametrize(
    ("arch", "packed"),
    [("llama", False), ("opt", False), *((arch, True) for arch in ("llama", "gpt2", "opt", "gpt_neox", "gemma3"))],
)
def test_a_left_padded_batch_generates_what_its_rows_do_alone(arch: str, packed: bool) -> None:
    """Rows of 40, 35 and 30 tokens; the restored path is told of the padding, the packed one finds it."""
    model, (x, mask) = tiny(arch), left_padded(3, 40)
    cache = GearCache(model.config, LOSSLESS)
    if not packed:
        cache.set_padding(mask)
    batch = generated(model, cache, packed, input_ids=x, attention_mask=mask)[:, 40:]
    for row in range(3):
        alone = x[row : row + 1, mask[row].bool()]
        dense = generated(model, DynamicCache(config=model.config), input_ids=alone)[:, alone.shape[1] :]
        assert torch.equal(batch[row : row + 1], dense)
    assert cache.gear_layers()[1].columns is not None


@each_path
def test_padding_pollutes_no_row_at_two_bits(packed: bool) -> None:
    """The text of a padded row is restored about as well as alone, and its first real tokens exactly."""
    model, (x, mask) = tiny("llama"), left_padded(3, 40, step=10)
    cache, dense = GearCache(model.config, FULL), DynamicCache(config=model.config)
    with path(model, packed), torch.no_grad():
        if not packed:
            cache.set_padding(mask)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        model(x, attention_mask=mask, position_ids=places, past_key_values=cache)
        model(x, attention_mask=mask, position_ids=places, past_key_values=dense)
    for (keys, values), exact in zip(cache, dense.layers, strict=True):
        for found, true in ((keys, exact.keys), (values, exact.values)):
            for row in range(3):
                pad = int((mask[row] == 0).sum())
                assert torch.equal(found[row, :, pad : pad + 2], true[row, :, pad : pad + 2])
            errors = [error(true[r, :, mask[r].bool()], found[r, :, mask[r].bool()]) for r in range(3)]
            assert max(errors) < 1.35 * errors[0] < 0.7


@each_path
def test_a_padded_batch_with_beams_in_chunks_equals_a_dense_cache(packed: bool) -> None:
    model, (x, mask) = tiny("llama"), left_padded(3, 40, step=9)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 7}):
        cache = GearCache(model.config, LOSSLESS)
        if not packed:
            cache.set_padding(mask)
        mine = generated(model, cache, packed, input_ids=x, attention_mask=mask, **options)
        dense = DynamicCache(config=model.config)
        assert torch.equal(mine, generated(model, dense, input_ids=x, attention_mask=mask, **options))


def test_only_the_full_attention_layers_of_a_hybrid_are_compressed() -> None:
    for model in (
        tiny("gemma3"),
        tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=3),
    ):
        kinds = model.config.layer_types
        assert set(kinds) == {"full_attention", "sliding_attention"}
        for packed in (False, True):
            mine, dense, cache = both(model, packed, input_ids=ids(2))
            assert torch.equal(mine, dense)
            assert list(cache.gear_layers()) == [i for i, kind in enumerate(kinds) if kind == "full_attention"]
            for layer, kind in zip(cache.layers, kinds, strict=True):
                if kind == "sliding_attention":
                    assert layer.keys.shape[2] == 7 and layer.get_seq_length() == 41


def test_a_packed_model_reads_other_caches_and_none_as_before() -> None:
    model, x = tiny("llama"), ids(2)
    with torch.no_grad():
        plain = model(x).logits
        with attend_packed(model):
            assert torch.equal(model(x).logits, plain)
            assert torch.equal(model(x, past_key_values=DynamicCache(config=model.config)).logits, plain)
            assert torch.equal(model(x, past_key_values=GearCache(model.config)).logits, plain)  # the prompt is exact
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(x).logits, plain)


def test_leaving_the_packed_path_goes_on_with_the_same_cache() -> None:
    model, (a, b, c) = tiny("llama"), ids(1, 46).split([30, 8, 8], 1)
    one, other = GearCache(model.config, FULL), GearCache(model.config, FULL)
    with torch.no_grad():
        with attend_packed(model):
            model(a, past_key_values=one)
            model(b, past_key_values=one)
        last = model(c, past_key_values=one).logits
        for part in (a, b):
            model(part, past_key_values=other)
        assert torch.allclose(last, model(c, past_key_values=other).logits, atol=1e-3)


def test_the_implementation_is_put_back_after_an_error_and_after_nesting() -> None:
    model = tiny("llama")
    with pytest.raises(RuntimeError, match="on purpose"), attend_packed(model):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"
    with attend_packed(model), attend_packed(model):
        assert model.config._attn_implementation == "zq_gear"
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_another_attention_than_sdpa_works_restored() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    mine, dense, _ = both(model, False, input_ids=ids(2))
    assert torch.equal(mine, dense)
    with pytest.raises(ValueError, match="'eager' cannot be replaced; call model.set_attn_implementation"):
        with attend_packed(model):
            pass
    assert model.config._attn_implementation == "eager"


@each_path
def test_a_crop_then_another_continuation_equals_never_having_gone_there(packed: bool) -> None:
    """Back to the end of the prompt and on; the last token is given again, as callers do."""
    model, x, wrong, right = tiny("llama"), ids(1, 30), ids(1, 3, seed=1), ids(1, 12, seed=2)
    for gear in (FULL, LOSSLESS):
        one, other = GearCache(model.config, gear), GearCache(model.config, gear)
        with path(model, packed), torch.no_grad():
            model(x, past_key_values=one)
            model(wrong, past_key_values=one)
            one.crop(-3)
            found = [model(t, past_key_values=one).logits for t in right.split(1, 1)]
            model(x, past_key_values=other)
            expected = [model(t, past_key_values=other).logits for t in right.split(1, 1)]
        assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
        assert_same(one.layers, other.layers)


def test_a_cache_with_offloading_says_what_it_needs_on_a_machine_without_a_gpu() -> None:
    model = tiny("llama")
    if torch.cuda.is_available():
        model = model.cuda()
        cache = GearCache(model.config, LOSSLESS, offloading=True)
        assert torch.equal(
            generated(model, cache, input_ids=ids(1).cuda()),
            generated(model, DynamicCache(config=model.config), input_ids=ids(1).cuda()),
        )
        return
    with pytest.raises(ValueError, match="offloading=True needs a GPU"):
        GearCache(model.config, LOSSLESS, offloading=True)


def test_early_initialization_is_as_if_there_had_been_none() -> None:
    model, x = tiny("llama"), ids(2, 40)
    one, other = GearCache(model.config, FULL), GearCache(model.config, FULL)
    one.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert one.get_seq_length() == 0 and one.nbytes() == 0
    with torch.no_grad():
        model(x, past_key_values=one)
        model(x, past_key_values=other)
    assert_same(one.layers, other.layers)


def test_a_copied_prompt_serves_several_continuations() -> None:
    model, x = tiny("llama"), ids(1, 40)
    prompt = GearCache(model.config, FULL)
    with torch.no_grad():
        model(x, past_key_values=prompt)
    for seed, packed in ((1, True), (2, False)):
        text = torch.cat([x, ids(1, 4, seed=seed)], 1)
        copied = generated(model, copy.deepcopy(prompt), packed, input_ids=text)
        fresh = GearCache(model.config, FULL)
        with torch.no_grad():
            model(x, past_key_values=fresh)
        assert torch.equal(copied, generated(model, fresh, packed, input_ids=text))


PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "Write a short story about a fox who learns to swim.",
    "Q: A farmer has 17 sheep and buys 5 more. How many sheep are there now? A:",
)
EIGHT = GearConfig.plain(8, sinks=4, meta_dtype="float32")
PREFIX = "You are a careful assistant who answers in plain words and gives a reason for each answer. " * 4


@pytest.mark.parametrize(("packed", "tokens"), [(True, 64), (False, 16)], ids=["packed", "restored"])
def test_eight_bits_generate_the_same_words_as_a_dense_cache(smollm2, packed: bool, tokens: int) -> None:
    model, tokenizer = smollm2
    for prompt in PROMPTS:
        x = tokenizer(PREFIX + prompt, return_tensors="pt").input_ids
        options = {"input_ids": x, "max_new_tokens": tokens, "min_new_tokens": tokens}
        mine, dense, cache = both(model, packed, EIGHT, **options)
        assert torch.equal(mine, dense), prompt
        assert cache.layers[0].blocks


def test_eight_bits_generate_the_same_words_in_a_left_padded_batch_and_with_beams(smollm2) -> None:
    model, tokenizer = smollm2
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    batch = tokenizer([PREFIX + prompt for prompt in PROMPTS], padding=True, return_tensors="pt")
    assert batch.attention_mask.min() == 0
    for options in ({"max_new_tokens": 12}, {"max_new_tokens": 6, "num_beams": 3}):
        mine, dense, _ = both(model, True, EIGHT, **batch, **{"min_new_tokens": 1} | options)
        assert torch.equal(mine, dense)

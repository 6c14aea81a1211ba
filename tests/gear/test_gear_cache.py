"""One layer and whole caches, driven by hand: whatever is done to them equals a cache built directly."""

from __future__ import annotations

import copy

import pytest
import torch
from gear_cases import DENSE, FULL, LOSSLESS, assert_same, error, frozen, held, ids, layer, normal, tiny
from torch import Tensor
from transformers import DynamicCache

from zq_lib.gear import GearCache, GearConfig, attend_packed
from zq_lib.gear import cache as module
from zq_lib.gear.cache import GearLayer

CONFIGS = {
    "full": FULL,
    "no sinks": FULL.but(sinks=0),
    "recent": FULL.but(recent=5),
    "paired": FULL.but(bits=(3, 2), rank=(2, 0), rank_decode=(2, 0), outliers=(0.0, 0.25), clip=(False, True)),
    "int8, kcvt": FULL.but(scheme="kcvt", factor_bits=8, buffer=5),
    "per token": FULL.but(scheme="per_token", buffer=12, outlier_scope="head"),
    "plain": GearConfig.plain(3, group=8, buffer=8),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def text(rows: int = 2, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, 2, tokens, 8]."""
    return normal(rows, 2, tokens, 8), normal(rows, 2, tokens, 8, seed=1)


def fed(config: GearConfig, keys: Tensor, values: Tensor, sizes: list[int], padding: Tensor | None = None) -> GearLayer:
    """A layer that got these tokens in updates of these sizes."""
    found = layer(config)
    if padding is not None:
        found.set_padding(padding)
    for k, v in zip(keys[:, :, : sum(sizes)].split(sizes, 2), values[:, :, : sum(sizes)].split(sizes, 2), strict=True):
        found.update(k, v)
    return found


@each
def test_the_first_update_returns_the_exact_tokens_and_later_ones_the_restored(config: GearConfig) -> None:
    keys, values = text()
    one = layer(config)
    first = one.update(keys[:, :, :40], values[:, :, :40])
    assert torch.equal(first[0], keys[:, :, :40]) and torch.equal(first[1], values[:, :, :40])
    kept = one.dequantize()
    later = one.update(keys[:, :, 40:43], values[:, :, 40:43])
    for side, stored, x in zip(later, kept, (keys, values), strict=True):
        assert torch.equal(side[:, :, :40], stored) and torch.equal(side[:, :, 40:], x[:, :, 40:43])
        assert not torch.equal(side[:, :, :40], x[:, :, :40])
        assert torch.equal(side[:, :, : config.sinks], x[:, :, : config.sinks])
    assert one.get_seq_length() == 43 and one.get_mask_sizes(5) == (48, 0) and one.get_max_length() == -1


@each
def test_any_number_of_tokens_can_be_held_and_only_whole_buffers_are_compressed(config: GearConfig) -> None:
    for tokens in (1, 2, 4, 5, 7, 8, 9, 10, 11, 14, 15, 17, 18, 19, 27):
        keys, values = text(rows=1, tokens=tokens)
        one = fed(config, keys, values, [tokens])
        packed = sum(block.length for block in one.blocks)
        assert packed == max(0, tokens - config.sinks - config.recent) // config.buffer * config.buffer
        assert one.get_seq_length() == tokens
        for side, x in zip(one.dequantize(), (keys, values), strict=True):
            assert torch.isfinite(side).all() and error(x, side) < 0.7


@each
def test_one_token_at_a_time_equals_one_buffer_at_a_time(config: GearConfig) -> None:
    keys, values = text()
    first, n = config.sinks + config.recent + config.buffer, config.buffer
    rest = 60 - first
    slow = fed(config, keys, values, [1] * 60)
    quick = fed(
        config, keys, values, [first, *[n] * (rest // n), rest % n] if rest % n else [first, *[n] * (rest // n)]
    )
    assert_same(slow, quick)


@each
@pytest.mark.parametrize("sizes", [[23, 1, 1, 14, 21], [1, 58, 1], [8, 8, 4, 40], [60]])
def test_every_update_compresses_the_oldest_whole_buffers_as_one_segment(config: GearConfig, sizes: list[int]) -> None:
    """Segments without parts of their own are kept in buffers, so that later ones join them."""
    keys, values = text()
    one = fed(config, keys, values, sizes)
    total, expected, kept = 0, [], 0
    for size in sizes:
        total += size
        n = max(0, total - config.sinks - config.recent - kept) // config.buffer * config.buffer
        cut = config.keys.rank == 0 and config.keys.outliers == 0 and config.scheme != "kcvt"
        expected += [config.buffer] * (n // config.buffer) if cut else [n] if n else []
        kept += n
    assert [b.keys.tokens for b in one.blocks for _ in range(b.keys.count)] == expected


@each
def test_the_exact_input_is_compressed_once_and_never_again(
    config: GearConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the compressor gets tokens of the text as they came, the next ones, and no other."""
    keys, values = text()
    seen = {"key": config.sinks, "value": config.sinks}
    original = module.compress

    def spy(x: Tensor, codec, **more):  # noqa: ANN001, ANN003, ANN202
        source = keys if codec.kind == "key" else values
        start = seen[codec.kind]
        assert torch.equal(x, source[:, :, start : start + x.shape[2]])
        seen[codec.kind] += x.shape[2]
        return original(x, codec, **more)

    monkeypatch.setattr(module, "compress", spy)
    one = fed(config, keys, values, [20, *[1] * 17, 11, 12])
    packed = sum(block.length for block in one.blocks)
    assert seen == {"key": config.sinks + packed, "value": config.sinks + packed} and packed > 40 - config.recent


@each
def test_stored_segments_keep_their_bytes_whatever_comes_later(config: GearConfig) -> None:
    keys, values = text()
    one = fed(config, keys, values, [28])
    before = one.blocks
    one.update(keys[:, :, 28:29], values[:, :, 28:29])
    assert one.blocks is before  # identity: nothing was touched
    old = [{n: t.clone() for n, t in side.tensors().items()} for b in before for side in (b.keys, b.values)]
    for t in range(29, 60):
        one.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    now = [side for b in one.blocks for side in (b.keys, b.values)]
    for side, stored in zip(now, old, strict=False):
        for name, x in stored.items():
            assert torch.equal(side.tensors()[name][:, : x.shape[1]], x), name


@each
def test_reordered_selected_and_repeated_rows_equal_a_cache_built_directly(config: GearConfig) -> None:
    keys, values = text(rows=3)
    sizes = [30, 1, 1, 9, 1]
    for change, rows in (
        (lambda x: x.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda x: x.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda x: x.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        one = fed(config, keys, values, sizes)
        change(one)
        assert_same(one, fed(config, keys[rows], values[rows], sizes))
        one.update(keys[rows, :, 42:54], values[rows, :, 42:54])  # and goes on like it
        assert_same(one, fed(config, keys[rows], values[rows], [*sizes, 12]))


@each
def test_random_beams_equal_a_cache_built_from_the_surviving_sequences(config: GearConfig) -> None:
    """Every step appends a token and reorders, as beam search does."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (x[:1].repeat(4, 1, 1, 1)[:, :, :21] for x in text())
    one = fed(config, keys, values, [21])
    for step in range(20):
        k, v = normal(4, 2, 1, 8, seed=100 + step), normal(4, 2, 1, 8, seed=200 + step)
        one.update(k, v)
        beams = torch.randint(0, 4, (4,), generator=generator)
        one.reorder_cache(beams)
        keys, values = torch.cat([keys, k], 2)[beams], torch.cat([values, v], 2)[beams]
    assert_same(one, fed(config, keys, values, [21, *[1] * 20]))


@pytest.mark.parametrize("left", [0, 1, 2, 3, 9, 10, 11, 25, 26, 27, 33, 34, 42, 48, 49, 50, 51])
def test_a_crop_leaves_what_was_there_and_frees_the_rest(left: int) -> None:
    """51 tokens: 2 sinks, a segment of 24, three of 8, one in the buffer."""
    keys, values = text(tokens=51)
    one = fed(FULL, keys, values, [28, *[1] * 23])
    assert [b.keys.tokens for b in one.blocks] == [24, 8] and one.exact_keys.shape[2] == 3
    before, bytes_before = one.dequantize(), frozen(one)
    one.crop(left - 51)
    assert one.get_seq_length() == left
    for a, b in zip(one.dequantize(), before, strict=True):
        assert torch.equal(a, b[:, :, :left])
    if left in (50, 51):
        assert frozen(one) == bytes_before
    for name, x in held(one).items():
        assert x.untyped_storage().nbytes() == x.nbytes, name
    assert sum(one.nbytes().values()) == sum(x.nbytes for x in held(one).values())
    if left <= 2:
        assert not one.blocks and one.sinks == 0


@pytest.mark.parametrize("left", [0, 1, 2, 5, 10, 26, 30, 34, 49])
def test_after_a_crop_the_cache_goes_on_without_touching_what_stayed(left: int) -> None:
    keys, values = text(tokens=51)
    one = fed(FULL, keys, values, [28, *[1] * 23])
    one.crop(left - 51)
    kept = one.dequantize()
    more = normal(2, 2, 20, 8, seed=5), normal(2, 2, 20, 8, seed=6)
    for t in range(20):
        out = one.update(more[0][:, :, t : t + 1], more[1][:, :, t : t + 1])
        assert out[0].shape[2] == left + t + 1
        assert torch.equal(out[0][:, :, left + t :], more[0][:, :, t : t + 1])
    assert one.get_seq_length() == left + 20
    restored = one.dequantize()
    for a, b, x in zip(restored, kept, more, strict=True):
        if left > 2:
            assert torch.equal(a[:, :, :left], b)
        assert error(x, a[:, :, left:]) < 0.7
    if left <= 2:
        whole = (torch.cat([x[:, :, :left], m], 2) for x, m in zip((keys, values), more, strict=True))
        assert_same(one, fed(FULL, *whole, [*([left] if left else []), *[1] * 20]))


def test_a_crop_at_a_boundary_equals_a_cache_built_directly() -> None:
    keys, values = text()
    for left in (26, 34, 42):
        one = fed(FULL, keys, values, [28, *[1] * 23])
        one.crop(left - 51)
        assert_same(one, fed(FULL, keys, values, [26, *[1] * (left - 26)]))


def test_a_crop_of_nothing_of_an_empty_cache_or_of_too_much() -> None:
    one = layer()
    one.crop(-3)
    assert one.get_seq_length() == 0
    keys, values = text()
    one = fed(FULL, keys, values, [51])
    before = frozen(one)
    one.crop(0)
    assert frozen(one) == before
    with pytest.raises(ValueError, match="tokens_to_remove=3 is positive"):
        one.crop(3)
    assert frozen(one) == before
    one.crop(-100)
    assert one.get_seq_length() == 0 and not one.blocks
    one.update(keys, values)
    assert_same(one, fed(FULL, keys, values, [60]))


def test_while_the_past_is_recorded_the_newest_buffer_stays_exact() -> None:
    keys, values = text()
    one = layer(FULL)
    assert one.is_croppable
    one.activate_past_recording()
    for t in range(0, 60, 3):
        one.update(keys[:, :, t : t + 3], values[:, :, t : t + 3])
        assert one.exact_keys.shape[2] >= min(t + 3, FULL.buffer)
        assert one.is_croppable
    one.crop(-FULL.buffer)
    for side, x in zip(one.dequantize(), (keys, values), strict=True):
        assert error(x[:, :, :52], side) < 0.7
    assert not fed(FULL, keys, values, [60]).is_croppable


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_refused_and_the_layer_is_as_it_was(bad: float, side: int) -> None:
    for start in (0, 20, 33):
        keys, values = text()
        one = fed(FULL, keys, values, [start]) if start else layer(FULL)
        before, held_before = frozen(one), {n: x.clone() for n, x in held(one).items()}
        broken = [keys[:, :, start:].clone(), values[:, :, start:].clone()]
        broken[side][1, 0, 5, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            one.update(*broken)
        assert one.get_seq_length() == start and frozen(one) == before
        if start:
            assert all(torch.equal(x, held_before[n]) for n, x in held(one).items())
        one.update(keys[:, :, start:], values[:, :, start:])  # and can be used
        assert one.get_seq_length() == 60


def test_a_first_prompt_that_fails_leaves_room_for_another_dtype_and_batch() -> None:
    keys, values = text()
    one = layer(FULL)
    with pytest.raises(ValueError, match="NaN or infinite"):
        one.update(keys.half() * 1e9, values.half())
    one.update(keys[:1].bfloat16(), values[:1].bfloat16())
    assert one.get_seq_length() == 60 and one.exact_keys.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (normal(3, 2, 1, 8), normal(3, 2, 1, 8)),
        (normal(2, 4, 1, 8), normal(2, 4, 1, 8)),
        (normal(2, 2, 1, 16), normal(2, 2, 1, 16)),
        (normal(2, 2, 1, 8), normal(2, 2, 1, 16)),
        (normal(2, 2, 1, 8), normal(2, 2, 2, 8)),
        (normal(2, 2, 1, 8).half(), normal(2, 2, 1, 8).half()),
        (normal(2, 2, 1, 8), normal(2, 2, 1, 8).double()),
    ],
)
def test_tensors_of_another_model_or_batch_are_refused_and_the_layer_is_as_it_was(keys: Tensor, values: Tensor) -> None:
    one = fed(FULL, *text(), [30])
    before = frozen(one)
    with pytest.raises(ValueError, match="do not fit this cache, which holds.*one cache per model and batch"):
        one.update(keys, values)
    assert frozen(one) == before and one.get_seq_length() == 30
    one.reset()
    if keys.shape == values.shape and keys.dtype == values.dtype:
        one.update(keys, values)
        assert one.get_seq_length() == 1


@each
def test_reset_forgets_everything(config: GearConfig) -> None:
    keys, values = text()
    one = fed(config, keys, values, [40], padding=torch.ones(2, 40).index_fill(1, torch.tensor([0]), 0))
    one.reset()
    assert one.get_seq_length() == 0 and not held(one) and not one.is_initialized
    for k, v in zip(keys.split(30, 2), values.split(30, 2), strict=True):
        one.update(k, v)
    assert_same(one, fed(config, keys, values, [30, 30]))


@each
def test_offloading_and_prefetching_move_every_tensor_and_change_none(config: GearConfig) -> None:
    keys, values = text()
    one = fed(config, keys, values, [40], padding=torch.ones(2, 40).index_fill(1, torch.tensor([0]), 0))
    twin = copy.deepcopy(one)
    one.offload()
    assert_same(one, twin)
    one.device = torch.device("meta")  # any other device shows what moves
    one.prefetch()
    assert {x.device.type for x in held(one).values()} == {"meta"}
    empty = layer(config)
    empty.offload()
    empty.prefetch()
    assert empty.get_seq_length() == 0


@each
def test_bytes_are_those_of_every_tensor_and_no_view_keeps_more_alive(config: GearConfig) -> None:
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in text())  # as a model gives them
    mask = torch.ones(2, 30)
    mask[1, :7] = 0
    for padding in (None, mask):
        one = layer(config)
        if padding is not None:
            one.set_padding(padding)
        for start, stop in ((0, 30), (30, 31), (31, 60)):
            one.update(keys[:, :, start:stop], values[:, :, start:stop])
            found = held(one)
            assert sum(one.nbytes().values()) == sum(x.nbytes for x in found.values())
            for name, x in found.items():
                assert x.untyped_storage().nbytes() == x.nbytes, name


def test_bytes_of_a_cache_add_sinks_and_buffer_in_the_models_dtype() -> None:
    """64 of 100 tokens are packed: plain 2 bits take 2 x 64 x 2 x 8 x 6 / 8 bytes, the other 36 two or four each."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        one = layer(GearConfig.plain(2, group=8, buffer=64, sinks=5))
        keys, values = (x.to(dtype) for x in text(rows=1, tokens=100))
        one.update(keys, values)
        assert one.nbytes() == {
            "codes": 2 * 64 * 2 * 8 * 2 // 8,
            "metadata": 2 * 64 * 2 * 8 * 4 // 8,
            "low rank": 0,
            "outliers": 0,
            "exact": 2 * 36 * 2 * 8 * size,
            "positions": 0,
        }


def padded(rows: list[int], width: int = 40) -> Tensor:
    """A mask with so many padding tokens on the left of each row."""
    mask = torch.ones(len(rows), width, dtype=torch.long)
    for b, pad in enumerate(rows):
        mask[b, :pad] = 0
    return mask


@each
def test_the_sinks_are_each_rows_first_real_tokens_and_the_order_of_the_text_is_kept(config: GearConfig) -> None:
    keys, values = text(rows=3)
    one = fed(config, keys, values, [40, 1, 19], padding=padded([0, 3, 11]))
    for side, x in zip(one.dequantize(), (keys, values), strict=True):
        for row, pad in enumerate((0, 3, 11)):
            first = slice(pad, pad + config.sinks)
            assert torch.equal(side[row, :, first], x[row, :, first])
            assert error(x[row, :, pad:], side[row, :, pad:]) < 0.7
    assert (one.columns is None) == (config.sinks == 0)


@each
def test_padding_pollutes_no_row(config: GearConfig) -> None:
    """Padding of size 1e4 would ruin every range and every outlier it took part in."""
    keys, values = text(rows=3)
    rows = [0, 3, 11]
    clean = fed(config, keys, values, [40, 20], padding=padded(rows)).dequantize()
    noisy = [x.clone() for x in (keys, values)]
    for row, pad in enumerate(rows):
        for x in noisy:
            x[row, :, :pad] = 1e4
    found = fed(config, *noisy, [40, 20], padding=padded(rows)).dequantize()
    for a, b in zip(clean, found, strict=True):
        for row, pad in enumerate(rows):
            assert torch.allclose(a[row, :, pad:], b[row, :, pad:], atol=1e-3)


@each
def test_rows_without_padding_do_not_feel_that_others_have_some(config: GearConfig) -> None:
    keys, values = text(rows=3)
    together = fed(config, keys, values, [40, 20], padding=padded([0, 3, 11])).dequantize()
    alone = fed(config, keys[:1], values[:1], [40, 20]).dequantize()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[:1], b)


@pytest.mark.parametrize("sizes", [[5, 5, 30, 20], [12, 12, 12, 24], [1] * 60])
def test_a_prompt_in_chunks_waits_for_the_sinks_of_every_row(sizes: list[int]) -> None:
    """The first chunks of the last row are all padding."""
    keys, values = text(rows=3)
    one = fed(FULL, keys, values, sizes, padding=padded([0, 3, 21]))
    assert one.blocks
    for row, pad in enumerate((0, 3, 21)):
        assert torch.equal(one.dequantize()[0][row, :, pad : pad + 2], keys[row, :, pad : pad + 2])


def test_padded_rows_can_be_reordered_and_repeated() -> None:
    keys, values = text(rows=3)
    one = fed(FULL, keys, values, [40, 1], padding=padded([0, 3, 11]))
    one.reorder_cache(torch.tensor([2, 0, 0]))
    one.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0, 0, 0]
    other = fed(FULL, keys[rows], values[rows], [40, 1], padding=padded([11, 11, 0, 0, 0, 0]))
    assert_same(one, other)


def test_the_mask_of_the_prompts_serves_their_beams() -> None:
    keys, values = (x.repeat_interleave(2, 0) for x in text(rows=3))
    one = fed(FULL, keys, values, [40], padding=padded([0, 3, 11]))
    assert_same(one, fed(FULL, keys, values, [40], padding=padded([0, 0, 3, 3, 11, 11])))


def test_a_mask_of_another_batch_is_refused() -> None:
    keys, values = text(rows=3)
    with pytest.raises(ValueError, match="attention_mask has 2 rows but the model runs 3"):
        fed(FULL, keys, values, [40], padding=padded([0, 3]))
    one = fed(FULL, keys, values, [40])
    with pytest.raises(ValueError, match="attention_mask has 2 rows but the cache holds 3"):
        one.set_padding(padded([0, 3]))


def test_a_crop_into_padding_is_refused_and_one_behind_it_works() -> None:
    keys, values = text(rows=3)
    one = fed(FULL, keys, values, [40, 1], padding=padded([0, 3, 11]))
    before, restored = frozen(one), one.dequantize()
    with pytest.raises(ValueError, match="tokens_to_remove=-30 would cut the prompt's padding, up to column 13"):
        one.crop(-30)
    assert frozen(one) == before
    one.crop(13 - 41)
    for a, b in zip(one.dequantize(), restored, strict=True):
        assert torch.equal(a, b[:, :, :13])


def test_a_cache_has_one_layer_per_layer_and_knows_presets_plans_and_pairs() -> None:
    model = tiny("llama")
    assert all(isinstance(x, GearLayer) for x in GearCache(model.config).layers)
    plan = [FULL, FULL.but(bits=4), LOSSLESS]
    assert [x.config for x in GearCache(model.config, plan).layers] == plan
    with pytest.raises(ValueError, match="gear='paper' is not a preset; choose one of paper_2bit"):
        GearCache(model.config, "paper")
    with pytest.raises(ValueError, match="gear has 2 entries but the model has 3 layers"):
        GearCache(model.config, plan[:2])


def test_heads_that_do_not_fit_the_settings_are_refused_before_anything_is_stored() -> None:
    one = layer(GearConfig.plain(3, group=8, buffer=8))
    x = normal(1, 2, 40, 12)
    with pytest.raises(ValueError, match="head width 12 does not fill whole bytes with bits=3"):
        one.update(x, x)
    assert not one.is_initialized and not held(one)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_iterating_and_dequantising_give_every_layer_in_the_order_of_the_text(arch: str) -> None:
    model = tiny(arch)
    cache, dense = GearCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    with torch.no_grad():
        for found in (cache, dense):
            model(ids(2, 30), past_key_values=found)
    for (keys, values, *_), other in zip(cache, dense.layers, strict=True):
        assert error(other.keys, keys) < 2e-3 and error(other.values, values) < 2e-3


def test_the_report_adds_up() -> None:
    model = tiny("llama")
    cache = GearCache(model.config, FULL)
    with pytest.raises(ValueError, match="the cache is empty; run the model with it first"):
        cache.report()
    with pytest.raises(ValueError, match="the cache is empty"):
        list(cache)
    with torch.no_grad():
        model(ids(2, 50), past_key_values=cache)
    report = cache.report()
    dense = 2 * 3 * 2 * 2 * 50 * 8 * 2  # sides, layers, rows, heads, tokens, width, bytes
    assert report["tokens"] == 50 and report["bytes"] == cache.nbytes() and cache.dense_nbytes() == dense
    assert report["ratio"] == dense / cache.nbytes()
    assert report["bits_per_element"] == pytest.approx(16 / report["ratio"])
    assert cache.nbytes() == sum(x.nbytes for x in held(cache.layers).values())


@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_goes_on_by_itself_and_follows_the_same_model(packed: bool) -> None:
    """A copied prompt is how many continuations share it; a copy made while packed must serve an ordinary forward."""
    model, more = tiny("llama"), ids(1, 3, seed=1)
    cache = GearCache(model.config, FULL)
    with torch.no_grad(), attend_packed(model):
        model(ids(1, 40), past_key_values=cache)
        twin = copy.deepcopy(cache)
        third = copy.deepcopy(twin)
    before = frozen(cache.layers)
    assert twin.model_config is cache.model_config is twin.layers[0].model_config
    with torch.no_grad():
        if packed:
            with attend_packed(model):
                first, second = (model(more, past_key_values=c).logits for c in (twin, third))
        else:
            first, second = (model(more, past_key_values=c).logits for c in (twin, third))
    assert torch.isfinite(first).all() and torch.equal(first, second)
    assert frozen(cache.layers) == before and cache.get_seq_length() == 40 and twin.get_seq_length() == 43


def test_a_cache_of_another_model_is_refused() -> None:
    """Other heads, another number of layers, another batch."""
    model = tiny("llama")
    for other, message in ((tiny("qwen2", num_key_value_heads=4), "do not fit"), (tiny("gpt2"), "do not fit")):
        cache = GearCache(model.config, FULL)
        with torch.no_grad():
            model(ids(1, 40), past_key_values=cache)
            before = frozen(cache.layers)
            with pytest.raises(ValueError, match=message):
                other(ids(1, 1), past_key_values=cache)
        assert frozen(cache.layers) == before and cache.get_seq_length() == 40
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        model(ids(2, 1), past_key_values=cache)


def test_an_encoder_decoder_and_a_model_without_full_attention_are_refused() -> None:
    from transformers import T5Config

    with pytest.raises(ValueError, match="T5Config is an encoder-decoder"):
        GearCache(T5Config())
    sliding = tiny("gemma3", layer_types=["sliding_attention"] * 4).config
    with pytest.raises(ValueError, match="no full-attention layer to compress; use DynamicCache"):
        GearCache(sliding)


def test_a_layer_keeps_no_reference_to_the_graph_of_its_inputs() -> None:
    keys, values = text()
    one = GearLayer(FULL, DENSE)
    with torch.no_grad():
        one.update(keys, values)
    assert not any(x.requires_grad for x in held(one).values())

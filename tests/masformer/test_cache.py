"""SpanCache holds what later tokens can see, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from zq_lib.core.models import tiny
from zq_lib.masformer.cache import LocalLayer, SpanCache, plan_of
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.reference import sees
from zq_lib.masformer.spans import SpanPlan

SPANS = [("window", 7, 0), ("window", 7, 3), ("block", 8, 0), ("block", 8, 3), ("two_block", 5, 0), ("two_block", 5, 7)]
PLAN = SpanPlan.mixed(3, full=(1,), span=7, sinks=3)


def numbered(start: int, stop: int, rows: int = 2) -> torch.Tensor:
    """Keys [rows, 1, n, 1] whose value is their column plus 1000 times their row."""
    column = torch.arange(start, stop, dtype=torch.float32)
    return (column + 1000 * torch.arange(rows)[:, None])[:, None, :, None]


def texts(rows: int = 2, length: int = 50) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind, span, sinks", SPANS)
@pytest.mark.parametrize("pad", [0, 6])
def test_a_local_layer_returns_every_visible_key_once_and_at_its_column(kind, span, sinks, pad) -> None:
    layer, start = LocalLayer((span,), kind, sinks), 0
    first = torch.tensor([0, pad])
    layer.first = first if pad else None
    for size in (3, 1, 9, 1, 1, 30, 1, 1):
        keys, values = layer.update(numbered(start, start + size), -numbered(start, start + size))
        start += size
        columns = layer.held.columns.expand(2, -1)
        assert torch.equal(values, -keys) and layer.held.length == layer.get_seq_length() == start
        for row in range(2):
            kept = columns[row] >= 0
            assert torch.equal(keys[row, 0, kept, 0], columns[row, kept] + 1000.0 * row)
            found = columns[row, kept].tolist()
            assert len(set(found)) == len(found), "no key twice"
            new = torch.arange(start - size, start)[:, None] - first[row]
            old = torch.arange(min(int(first[row]), start), start)
            wanted = old[sees(new, old - first[row], span, kind, sinks).any(0)]
            assert set(wanted.tolist()) <= set(found)
    most = sinks + span - 1 + (span if kind == "two_block" else 0)
    assert layer.keys.shape[2] <= most


def test_bytes_of_local_layers_stop_growing() -> None:
    model = tiny("llama")
    sizes = []
    with attach(model, PLAN), torch.no_grad():
        for length in (20, 40, 80):
            cache = SpanCache(model)
            model(texts(1, length), past_key_values=cache)
            sizes.append([layer.keys.shape[2] for layer in cache.layers])
    assert sizes == [[9, 20, 9], [9, 40, 9], [9, 80, 9]]
    width = model.config.hidden_size // model.config.num_attention_heads
    keys_and_values = PLAN.kv_bytes(80, model.config.num_key_value_heads, width, 4)
    assert cache.nbytes() == keys_and_values + 2 * 3 * 8, "plus the columns of three sinks in two layers"


def test_a_dropped_text_does_not_stay_alive_behind_a_slice() -> None:
    for sinks in (0, 2):
        layer = LocalLayer((4,), "window", sinks)
        layer.update(numbered(0, 500), numbered(0, 500))
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


@pytest.mark.parametrize("kind, span, sinks", SPANS)
@pytest.mark.parametrize("chunks", [(20, *[1] * 30), (4, 26, 20), (30, 1, 1, 18)])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_and_steps_equal_one_pass(kind, span, sinks, chunks, padded) -> None:
    model, ids = tiny("llama"), texts()
    plan = SpanPlan.mixed(3, full=(1,), span=span, kind=kind, sinks=sinks)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0  # longer than the first chunk of some
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach(model, plan), torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
        cache, start, parts = SpanCache(plan), 0, []
        for size in chunks:
            stop = start + size
            given = {"attention_mask": mask[:, :stop]} if padded else {}
            part = slice(start, stop)
            out = model(ids[:, part], position_ids=place[:, part], past_key_values=cache, **given)
            parts.append(out.logits)
            start = stop
    error = (torch.cat(parts, 1) - whole).abs()[mask.bool()].max()
    assert error < 1e-4 and cache.get_seq_length() == 50


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind, sinks", [("window", 3), ("block", 0)])
def test_generation_takes_the_same_tokens_as_with_all_keys(options, kind, sinks) -> None:
    model, ids = tiny("qwen2"), texts(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with attach(model, full=(0,), window=6, kind=kind, sinks=sinks):
        found = []
        for cache in (None, DynamicCache()):
            torch.manual_seed(3)
            given = {} if cache is None else {"past_key_values": cache}
            found.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=25, return_dict_in_generate=True, **given, **options
                )
            )  # fmt: skip
    assert type(found[0].past_key_values) is SpanCache and type(found[1].past_key_values) is DynamicCache
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_batch_operations_move_keys_sinks_and_padding_together() -> None:
    model, ids = tiny("llama"), texts(3, 40)
    mask = torch.ones_like(ids)
    mask[2, :8] = 0
    order = torch.tensor([2, 0])
    with attach(model, PLAN), torch.no_grad():
        cache, expected = SpanCache(model), SpanCache(model)
        model(ids[:, :39], attention_mask=mask[:, :39], past_key_values=cache)
        model(ids[order, :39], attention_mask=mask[order, :39], past_key_values=expected)
        repeated = copy.deepcopy(cache)
        cache.reorder_cache(order)
        repeated.batch_select_indices(order)
        repeated.batch_repeat_interleave(2)
        outs = [model(ids[order, 39:], attention_mask=mask[order], past_key_values=c).logits for c in (cache, expected)]
        both = order.repeat_interleave(2)
        last = model(ids[both, 39:], attention_mask=mask[both], past_key_values=repeated).logits
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)
    torch.testing.assert_close(last[::2], outs[1], rtol=0, atol=1e-4)


def test_crop_is_refused_where_keys_are_gone_and_exact_where_they_are_recorded() -> None:
    model, ids = tiny("llama"), texts(1, 40)
    with attach(model, PLAN), torch.no_grad():
        cache = SpanCache(model)
        model(ids[:, :30], past_key_values=cache)
        with pytest.raises(ValueError, match="tokens_to_remove=-2: a local layer has dropped"):
            cache.crop(-2)
        cache = SpanCache(model)
        model(ids[:, :25], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 25:30], past_key_values=cache)
        assert cache.is_croppable
        cache.crop(-4)
        assert cache.get_seq_length() == 26
        after = model(ids[:, 26:], past_key_values=cache).logits
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, whole[:, 26:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="tokens_to_remove=3 is positive"):
        cache.layers[0].crop(3)


def test_a_failed_crop_leaves_the_layer_as_it_was() -> None:
    layer = LocalLayer((5,), "window", 0)
    layer.update(numbered(0, 20), numbered(0, 20))
    with pytest.raises(ValueError):
        layer.crop(-3)
    assert (layer.seen, layer.tail, layer.keys.shape[2]) == (20, 4, 4)


def test_assisted_generation_equals_plain_greedy() -> None:
    model, helper, ids = tiny("llama"), tiny("llama", num_hidden_layers=1), texts(1, 30)
    with attach(model, PLAN):
        plain = model.generate(ids, max_new_tokens=20)
        assert torch.equal(model.generate(ids, max_new_tokens=20, assistant_model=helper), plain)


def test_reset_forgets_everything() -> None:
    model, ids = tiny("llama"), texts(1, 30)
    with attach(model, PLAN), torch.no_grad():
        cache = SpanCache(model)
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_heads_with_their_own_windows_keep_the_widest_and_a_full_head_keeps_all() -> None:
    cache = SpanCache(SpanPlan(((3, 9, 5, 2), (4, None, 4, 4), 6)))
    assert cache.layers[0]._reach() == 8 and not cache.layers[1].is_sliding and cache.layers[2]._reach() == 5


def test_the_mask_is_sized_for_the_whole_text() -> None:
    layer = LocalLayer((4,), "window", 1)
    layer.update(numbered(0, 20), numbered(0, 20))
    assert layer.get_mask_sizes(3) == (23, 0) and layer.get_max_length() == -1


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="carries no plan; give one, or attach"):
        plan_of(tiny("llama"))

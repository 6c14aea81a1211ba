"""Attention on the packed form equals attention on the restored tensors, in every shape that a model can ask for."""

from __future__ import annotations

import itertools

import pytest
import torch
from gear_cases import DENSE, FULL, layer, normal
from torch import Tensor, nn

from zq_lib.core.attach import Gate, KeyBias
from zq_lib.gear import GearConfig, packed_attention
from zq_lib.gear.cache import GearLayer
from zq_lib.gear.config import PRESETS
from zq_lib.gear.view import View, view_of

CONFIGS = {
    "full": FULL,
    "plain 2": GearConfig.plain(2, group=8, buffer=8),
    "plain 3": GearConfig.plain(3, group=8, buffer=8, sinks=3),
    "8 and 4 bits": FULL.but(bits=(8, 4), factor_bits=8, meta_dtype="float32"),
    "kcvt": FULL.but(scheme="kcvt", buffer=5),
    "kcvt, all heads": FULL.but(scheme="kcvt", buffer=5, value_vector="all"),
    "per token": FULL.but(scheme="per_token", group=4, buffer=12),
    "keys only": FULL.but(outliers=(0.25, 0.0), rank=(2, 0), rank_decode=(2, 0)),
    "paper mode": FULL.but(outlier_mode="paper", outlier_scope="head"),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def filled(config: GearConfig, sizes: list[int], rows: int = 2, heads: int = 2, d: int = 16, mask=None) -> GearLayer:  # noqa: ANN001
    one = GearLayer(config, DENSE)
    if mask is not None:
        one.set_padding(mask)
    for i, size in enumerate(sizes):
        one.update(normal(rows, heads, size, d, seed=2 * i), normal(rows, heads, size, d, seed=2 * i + 1))
    return one


def reference(query: Tensor, view: View, scale: float, visible: Tensor | None = None, bias: object = None) -> Tensor:
    """Softmax attention in double precision over the restored tensors; `visible` [B or 1, 1, T, S], causal if None."""
    keys, values = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in view.dense())
    t, s = query.shape[2], keys.shape[2]
    if visible is None:
        visible = torch.ones(t, s, dtype=torch.bool).tril(s - t)[None, None]
    scores = query.double() @ keys.mT * scale
    if bias is not None:
        scores = scores + bias
    if visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible, -torch.inf)
    else:
        scores = scores + visible
    return scores.softmax(-1).nan_to_num(0.0) @ values


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a.double() - b).abs().max() < tolerance)


@each
@pytest.mark.parametrize(("queries", "copies"), [(1, 1), (1, 3), (3, 2), (17, 1)])
def test_packed_equals_restored_attention(config: GearConfig, queries: int, copies: int) -> None:
    view = filled(config, [40, 1, 1, 20, 3]).view()
    query = normal(2, 2 * copies, queries, 16, seed=9)
    found = packed_attention(query, view, scale=0.3)
    assert found.shape == query.shape and close(found, reference(query, view, 0.3))


@each
def test_a_query_of_any_stride_gives_the_same(config: GearConfig) -> None:
    """Models give [B, T, H, D] transposed."""
    view = filled(config, [40, 20]).view()
    query = normal(2, 5, 6, 16, seed=9).transpose(1, 2)
    assert not query.is_contiguous()
    found = packed_attention(query, view, scale=0.3)
    assert torch.equal(found, packed_attention(query.contiguous(), view, scale=0.3))
    assert close(found, reference(query, view, 0.3))


@each
@pytest.mark.parametrize("queries", [1, 4])
def test_padding_is_masked_in_stored_order(config: GearConfig, queries: int) -> None:
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :5], mask[2, :19] = False, False
    view = filled(config, [40, 20, queries], rows=3, mask=mask).view()
    s = view.length
    seen = torch.nn.functional.pad(mask, (0, s - 40), value=True)[:, None, None]
    visible = seen & torch.ones(queries, s, dtype=torch.bool).tril(s - queries)
    query = normal(3, 4, queries, 16, seed=9)
    expected = reference(query, view, 0.3, visible)
    assert close(packed_attention(query, view, scale=0.3, mask=visible), expected)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert close(packed_attention(query, view, scale=0.3, mask=added), expected)
    assert (view.columns is not None) == (config.sinks > 0)


@each
@pytest.mark.parametrize("left", [61, 47, 13, 2, 1])
def test_hidden_tokens_of_a_cut_segment_are_not_seen(config: GearConfig, left: int) -> None:
    one = filled(config, [40, 1, 20])
    one.crop(left - 61)
    view = one.view()
    assert view.length == left
    query = normal(2, 4, 1, 16, seed=9)
    assert close(packed_attention(query, view, scale=0.3), reference(query, view, 0.3))


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_new_token_reads_every_preset_at_every_width_as_restored(preset: str, bits: int | None) -> None:
    """Three queries per key head, a padded row, a prompt, pages of new tokens, and some of them taken back."""
    config = PRESETS[preset]() if bits is None else PRESETS[preset]().but(bits=bits)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, :9] = False
    one = filled(config, [300, 64, 64, 1], heads=3, d=64, mask=mask)
    query = normal(2, 9, 1, 64, seed=9)
    for cut in (0, -30, -60):
        one.crop(cut)
        view = one.view()
        seen = torch.nn.functional.pad(mask, (0, view.length - 300), value=True)[:, None, None]
        found = packed_attention(query, view, scale=0.3, mask=seen)
        assert close(found, reference(query, view, 0.3, seen))


def test_a_query_that_sees_nothing_gets_zero() -> None:
    view = filled(FULL, [40, 20]).view()
    query = normal(2, 4, 3, 16, seed=9)
    visible = torch.ones(2, 1, 3, 60, dtype=torch.bool)
    visible[1, :, 1] = False
    found = packed_attention(query, view, scale=0.3, mask=visible)
    assert not found[1, :, 1].any() and torch.isfinite(found).all()
    assert close(found, reference(query, view, 0.3, visible))


def test_very_large_and_very_negative_scores_do_not_overflow() -> None:
    view = filled(FULL, [40, 20]).view()
    for size in (1e3, 1e5):
        query = size * normal(2, 4, 2, 16, seed=9)
        found = packed_attention(query, view, scale=1.0)
        assert torch.isfinite(found).all()
        assert close(found, reference(query, view, 1.0), tolerance=2e-2)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GearConfig.plain(2, group=64, buffer=64, outliers=0.02, rank=2), 2304),
        (GearConfig.plain(3, scheme="kcvt", buffer=50, outliers=0.02, sinks=4), 2300),
        (GearConfig.plain(4, group=16, buffer=48, sinks=2, scheme="per_token"), 2200),
    ],
)
@pytest.mark.parametrize("queries", [1, 200])
def test_a_prompt_of_several_tiles_equals_restored_attention(config: GearConfig, tokens: int, queries: int) -> None:
    """More than two tiles of 1024 tokens, more scores than wait for one softmax step, and a crop inside a tile."""
    one = filled(config, [tokens, queries], rows=1)
    query = normal(1, 4, queries, 16, seed=9)
    for cut in (0, -queries - 700):
        one.crop(cut)
        view = one.view()
        visible = torch.ones(1, 1, queries, view.length, dtype=torch.bool)
        assert close(packed_attention(query, view, scale=0.3, mask=visible), reference(query, view, 0.3, visible))


def test_many_pages_in_one_block_equal_restored_attention() -> None:
    config = GearConfig.plain(2, group=64, buffer=64, outliers=0.02, rank=2, rank_decode=2, sinks=4)
    one = filled(config, [64] * 20, rows=2)
    assert one.blocks[0].keys.count == 19
    query = normal(2, 4, 2, 16, seed=9)
    assert close(packed_attention(query, one.view(), scale=0.3), reference(query, one.view(), 0.3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_in_and_out_computes_in_single(dtype: torch.dtype, tolerance: float) -> None:
    one = GearLayer(FULL, DENSE)
    for i, size in enumerate((40, 20)):
        one.update(normal(2, 2, size, 16, seed=2 * i).to(dtype), normal(2, 2, size, 16, seed=2 * i + 1).to(dtype))
    query = normal(2, 4, 3, 16, seed=9).to(dtype)
    found = packed_attention(query, one.view(), scale=0.3)
    assert found.dtype == dtype and close(found, reference(query, one.view(), 0.3), tolerance)


def test_values_of_another_width_than_keys_work() -> None:
    one = layer(FULL)
    one.update(normal(2, 2, 50, 16), normal(2, 2, 50, 24, seed=1))
    query = normal(2, 4, 2, 16, seed=9)
    assert close(packed_attention(query, one.view(), scale=0.3), reference(query, one.view(), 0.3))


@pytest.mark.parametrize(("padded", "queries"), itertools.product([False, True], [1, 3]))
def test_a_bias_on_keys_reaches_the_right_columns(padded: bool, queries: int) -> None:
    """PASTA's bias: gate x rows x beta, with the favoured keys after some queries."""
    mask = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        mask[1, :7] = False
    view = filled(FULL, [40, 20, queries], rows=2, mask=mask).view()
    s, module = view.length, nn.Identity()
    favoured = torch.zeros(2, 50, dtype=torch.bool)
    favoured[0, 20:30], favoured[1, 8:9] = True, True
    beta = torch.where(favoured, 0.0, -4.6)
    gate = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    bias = KeyBias(beta, favoured, {module: Gate(gate, (0, 2))}, past=s - queries, layers={module: 0})
    seen = torch.nn.functional.pad(mask, (0, s - 40), value=True)[:, None, None]
    visible = seen & torch.ones(queries, s, dtype=torch.bool).tril(s - queries)
    added = gate[:, :, None, None] * torch.nn.functional.pad(beta, (0, s - 50))[:, None, None]
    query = normal(2, 4, queries, 16, seed=9)
    found = packed_attention(query, view, scale=0.3, mask=visible, bias=bias, module=module)
    assert close(found, reference(query, view, 0.3, visible, added))
    assert not close(found, reference(query, view, 0.3, visible), 1e-2)
    assert bias.calls == {0: 1}
    unsteered = packed_attention(query, view, scale=0.3, mask=visible, bias=bias, module=nn.Identity())
    assert close(unsteered, reference(query, view, 0.3, visible))


def test_rows_that_see_no_favoured_key_are_not_biased() -> None:
    view, module = filled(FULL, [40, 20, 3]).view(), nn.Identity()
    favoured = torch.zeros(2, 63, dtype=torch.bool)
    favoured[:, 61] = True
    bias = KeyBias(torch.where(favoured, 0.0, -4.6), favoured, {module: Gate(torch.ones(1, 4), (0, 1, 2, 3))}, past=60,
                   layers={module: 0})  # fmt: skip
    query = normal(2, 4, 3, 16, seed=9)
    found = packed_attention(query, view, scale=0.3, bias=bias, module=module)
    assert close(found[:, :, :1], reference(query, view, 0.3)[:, :, :1])
    assert not close(found[:, :, 1:], reference(query, view, 0.3)[:, :, 1:], 1e-2)


def test_stand_ins_have_the_shape_no_storage_and_no_number_that_could_be_used() -> None:
    view = filled(FULL, [40, 20]).view()
    keys, values = view.handles()
    assert keys.shape == values.shape == (2, 2, 60, 16)
    assert keys.untyped_storage().nbytes() == 4 and keys.isnan().all()
    assert view_of(keys) is view and view_of(values) is view and view_of(torch.zeros(1)) is None


def test_the_views_tensors_are_not_changed_by_attending() -> None:
    one = filled(FULL, [40, 20])
    before = [x.clone() for x in one.dequantize()]
    packed_attention(normal(2, 4, 3, 16), one.view(), scale=0.3)
    assert all(torch.equal(a, b) for a, b in zip(one.dequantize(), before, strict=True))


def test_a_path_that_cannot_run_says_why() -> None:
    view = filled(FULL, [40, 20]).view()
    with pytest.raises((ValueError, RuntimeError), match='backend is "triton" but the query .*use "torch" here'):
        packed_attention(normal(2, 4, 3, 16), view, scale=0.3, path="triton")

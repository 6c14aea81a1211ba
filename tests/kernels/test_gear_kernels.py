"""GEAR's kernels in the interpreter at toy size: decode against dense fp64 attention on the restored tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gear_kernel_cases import attention, block, check, normal, queries

from zq_lib.core.backend import interpreting, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.gear import GearConfig, kernels, kernels_bench, kernels_common
from zq_lib.gear.packing import pack
from zq_lib.gear.quantize import encode, group_view, ranges
from zq_lib.gear.view import View

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not interpreting(), reason="a GPU is here: test_gear_gpu.py runs these cases at full size"),
]
PLAIN = GearConfig.plain(2, group=32, buffer=32)
GEAR = GearConfig(group=32, buffer=32, rank=4, rank_decode=2, outliers=0.04)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_each_size_agree(bits):
    seen = check(block(PLAIN.but(bits=bits), 32), heads=2)
    assert [launch.kernel for launch in seen] == ["gear.packed", "gear.merge"]
    assert all(launch.path == "interpreter" for launch in seen)


@pytest.mark.parametrize("D", [32, 80, 128])
@pytest.mark.parametrize("bits", [2, 3])
def test_head_widths_agree_also_when_they_are_no_power_of_two(D, bits):
    check(block(GearConfig.plain(bits, group=16, buffer=16), 32, D=D), heads=1)


@pytest.mark.parametrize(("heads", "G"), [(1, 1), (3, 1), (4, 2)])
def test_groups_of_query_heads_share_keys(heads, G):
    check(block(PLAIN, 32, B=2, G=G), heads=heads)


@pytest.mark.parametrize(("rank", "factor_bits"), [(1, 16), (2, 8), (4, 16)])
def test_low_rank_parts_agree(rank, factor_bits):
    check(block(PLAIN.but(rank=rank, rank_decode=rank, factor_bits=factor_bits), 32), heads=3)


def test_ranks_and_bits_may_differ_between_keys_and_values():
    check(block(PLAIN.but(bits=(4, 2), rank=(2, 0), rank_decode=(2, 0), outliers=(0.0, 0.1)), 32), heads=2)


@pytest.mark.parametrize("scope", ["vector", "head"])
def test_outliers_agree_in_one_page_and_in_several(scope):
    check(block(PLAIN.but(outliers=0.05, outlier_scope=scope), 96, D=32), heads=2)


def test_a_page_of_outliers_may_hold_several_key_groups_and_a_key_group_several_pages():
    check(block(GearConfig.plain(2, group=20, buffer=20, outliers=0.05).but(group=20), 100, D=40), heads=1)
    check(block(GearConfig.plain(2, group=128, buffer=128, outliers=0.05), 128, D=32), heads=1)


def test_all_parts_together_agree_in_a_prompt_and_in_pages():
    check(block(GEAR.but(prompt_segment=64), 64), heads=3)
    check(block(GEAR, 32, m=2, B=2, D=32), heads=2)


@pytest.mark.parametrize("vector", ["head", "all"])
def test_one_range_per_key_channel_of_a_segment_and_per_value_vector_agrees(vector):
    config = GearConfig.paper(4).but(value_vector=vector)
    check(block(config, 20, m=2, G=2, D=32), heads=4)
    check(block(config, 50, G=2, D=32), heads=2)


@pytest.mark.parametrize("D", [64, 80])
def test_keys_with_a_range_per_token_agree(D):
    check(block(GearConfig.plain(2, scheme="per_token", group=16, rank=2), 40, D=D), heads=2)


@pytest.mark.parametrize("length", [1, 33, 70])
def test_trimmed_tokens_are_not_seen(length):
    check(block(GEAR, 32, m=3, D=32).crop(length), heads=1)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_any_number_of_slices_gives_the_same_and_one_may_be_empty(splits):
    small = block(GearConfig.plain(2, group=64, buffer=64, rank=1, rank_decode=1), 64, m=2)  # two tiles a segment
    seen = check(small, heads=2, splits=splits)
    assert seen[0].grid == (splits,)
    check(block(PLAIN, 32, m=2), heads=1, splits=3)  # two tiles for three programs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [GEAR, GearConfig.paper(4), GearConfig.plain(8, scheme="per_token", group=16)])
def test_half_precision_stays_within_its_tolerance(dtype, config):
    check(block(config, 40 if config.scheme != "kivi" else 64), heads=2, dtype=dtype)


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_half_precision_neither_overflows_nor_underflows_with_the_size_of_the_numbers(size):
    for side in ("keys", "values"):
        small = block(GEAR, 32, **{side: size})
        check(small, heads=2, dtype=torch.float16, scale=1 / size if side == "keys" else None)


def test_a_mask_hides_tokens_of_each_row():
    small = block(PLAIN.but(rank=1, rank_decode=1), 32, m=2, B=2)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, :32] = False  # a whole tile
    check(small, heads=2, mask=mask)


def test_what_sees_nothing_gives_zero_and_minus_infinity():
    small = block(PLAIN, 32, B=2)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1] = False
    out, lse = kernels.packed_decode(queries(2, 2), small, scale=0.1, mask=mask, splits=2)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and lse[0].isfinite().all()


def test_very_negative_scores_do_not_vanish():
    small = block(PLAIN, 32)
    check(small, heads=2, scale=1e4)
    named = dict(bias=torch.full((1, 32), -1e4), gate=torch.ones(1, 2))  # the same for all tokens: nothing changes
    low, plain = (kernels.packed_decode(queries(1, 2), small, scale=0.2, **n)[0] for n in (named, {}))
    assert relative_rms(low, plain) <= 1e-3


def test_a_bias_is_added_in_the_heads_of_its_gate():
    small = block(PLAIN, 32, m=2, B=2)
    bias = torch.where(torch.arange(64) < 40, -4.6, 0.0).repeat(2, 1)
    bias[1] = 0.5
    check(small, heads=3, bias=bias, gate=torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -1.0]]))


def test_constant_groups_are_restored():
    x = torch.full((1, 1, 32, 64), 1.5)
    x[..., 32:] = 0.0
    small = block(PLAIN, 32, tensors=(x, x))
    out, _ = kernels.packed_decode(queries(1, 2), small, scale=0.1)
    assert torch.allclose(out, x[:, :, 0].expand(1, 2, 64), atol=1e-6)


def view_of(blocks, exact=7, sinks=2, B=1, G=1, D=64, dtype=torch.float32):
    return View(
        tuple(blocks), normal(B, G, exact, D, seed=8).to(dtype), normal(B, G, exact, D, seed=9).to(dtype), sinks
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_blocks_sinks_and_buffer_are_one_softmax(count):
    blocks = [block(PLAIN.but(rank=2), 32, m=2, B=2), block(PLAIN, 32, B=2, seed=4).crop(20)][:count]
    view = view_of(blocks, B=2)
    query, mask = queries(2, 3), torch.rand(2, view.length, generator=torch.Generator().manual_seed(2)) < 0.7
    bias = normal(2, view.length, seed=3)
    gate = torch.tensor([[1.0, 0.0, 0.5]]).repeat(2, 1)
    before = query.clone()
    with launches() as seen:
        out = kernels.decode(query, view, scale=0.2, mask=mask, bias=bias, gate=gate)
    wanted, _ = attention(query, *view.dense(), 0.2, mask, bias, gate)
    assert relative_rms(out, wanted) <= tolerance(torch.float32, "interpreter").output
    assert [launch.kernel for launch in seen] == ["gear.packed"] * count + ["gear.exact", "gear.merge"]
    assert out.dtype == query.dtype and torch.equal(query, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_whole_answer_has_the_type_of_the_query(dtype):
    view = view_of([block(GEAR, 32)], dtype=dtype)
    query = queries(1, 2).to(dtype)
    out = kernels.decode(query, view, scale=0.2)
    restored = [torch.cat([e[:, :, :2].float(), r, e[:, :, 2:].float()], 2) for e, r in zip(
        (view.exact_keys, view.exact_values), view.blocks[0].dequantize(), strict=True)]  # fmt: skip
    assert out.dtype == dtype
    assert relative_rms(out, attention(query, *restored, 0.2)[0]) <= tolerance(dtype, "interpreter").output


def test_exact_tensors_of_any_strides_agree():
    view = view_of([block(PLAIN, 32)])
    turned = replace(
        view, exact_keys=view.exact_keys.mT.contiguous().mT, exact_values=normal(1, 7, 1, 128)[..., :64].transpose(1, 2)
    )
    out = kernels.decode(queries(1, 2), turned, scale=0.2)
    assert relative_rms(out, attention(queries(1, 2), *turned.dense(), 0.2)[0]) <= 2e-6


def test_parts_merge_by_their_share_of_the_softmax():
    blocks = [block(PLAIN, 32, seed=i) for i in range(2)]
    query = queries(1, 2)
    parts = [kernels.packed_decode(query, b, scale=0.2) for b in blocks]
    out, lse = kernels.merge([*parts, (torch.zeros(1, 2, 64), torch.full((1, 2), -torch.inf))])
    keys, values = (torch.cat(x, 2) for x in zip(*(b.dequantize() for b in blocks), strict=True))
    wanted, wanted_lse = attention(query, keys, values, 0.2)
    assert relative_rms(out, wanted) <= 2e-6 and relative_rms(lse, wanted_lse) <= 1e-5


def test_more_parts_than_fit_at_once_are_merged_too():
    out, lse = normal(1, 2, 40, 16), normal(1, 2, 40, seed=1) * 5
    got, got_lse = kernels.merge([(out[:, :, i], lse[:, :, i]) for i in range(40)])
    assert relative_rms(got, (lse.double().softmax(-1)[..., None] * out).sum(2)) <= 2e-6
    assert relative_rms(got_lse, lse.double().logsumexp(-1)) <= 1e-6


def test_parts_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[B, H, D\]"):
        kernels.merge([(torch.zeros(1, 2, 8), torch.zeros(1, 3))])
    with pytest.raises(ValueError, match="at least one"):
        kernels.merge([])


def test_runs_repeat_bit_for_bit():
    small = block(GEAR, 32, D=32)
    first, second = (kernels.packed_decode(queries(1, 2, 32), small, scale=0.2) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, v: (q.double(), v), "float64"),
        (lambda q, v: (q.expand(-1, -1, 2, -1), v), r"not \[B, H, 1, D\]"),
        (lambda q, v: (q[..., :32], v), "are not"),
        (lambda q, v: (q, replace(v, blocks=(block(PLAIN, 32, D=32),))), "does not fit"),
        (lambda q, v: (q, view_of([], exact=0)), "empty"),
        (lambda q, v: (q, view_of([block(GearConfig.plain(2, scheme="per_token", group=2), 8)])), "groups of 2"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_reason(change, said):
    query, view = change(queries(1, 2), view_of([block(PLAIN, 32)]))
    able, why = kernels.supported(view, query)
    assert not able
    with pytest.raises(ValueError, match=said):
        kernels.decode(query, view, scale=0.2)


def test_tensors_of_the_wrong_shape_or_order_are_refused_by_name():
    small = block(PLAIN, 32)
    query = queries(1, 2)
    with pytest.raises(ValueError, match="mask is torch.float32"):
        kernels.packed_decode(query, small, scale=0.2, mask=torch.ones(1, 32))
    with pytest.raises(ValueError, match="belong together"):
        kernels.packed_decode(query, small, scale=0.2, bias=torch.zeros(1, 32))
    turned = replace(small, keys=replace(small.keys, scale=small.keys.scale.mT.contiguous().mT))
    if not turned.keys.scale.is_contiguous():
        with pytest.raises(ValueError, match="scale of the keys is not contiguous"):
            kernels.packed_decode(query, turned, scale=0.2)
    codes = small.values.codes.mT.contiguous().mT
    with pytest.raises(ValueError, match="codes of the values is not contiguous"):
        kernels.packed_decode(query, replace(small, values=replace(small.values, codes=codes)), scale=0.2)
    with pytest.raises(ValueError, match="grid of 0"):
        kernels.packed_decode(query, small, scale=0.2, splits=0)


def torch_path(x, kind, bits, group, keep=None, meta="float16"):
    config = GearConfig.plain(bits, group=group, buffer=group, meta_dtype=meta)
    codec = config.keys if kind == "key" else config.values
    x = x.float()[:, None]
    view = group_view(codec, x.shape)
    scale, zero = ranges(x, None if keep is None else keep[:, None], codec, view)
    codes = encode(x.reshape(view.shape), scale, zero, bits).to(torch.uint8).view(x.shape)
    stored = getattr(torch, meta)
    return [y[:, 0] for y in (pack(codes, bits), *(m.reshape(view.stored).to(stored) for m in (scale, zero)))]


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(("bits", "D"), [(2, 80), (3, 80), (3, 32), (4, 32), (8, 32)])
def test_codes_scales_and_zeros_equal_the_torch_path_bit_for_bit(kind, bits, D):
    x = normal(1, 2, 32, D) * 3
    x[0, 0, :16, 3] = x[0, 1, 5] = 1.5  # constant groups
    keep = normal(1, 2, 32, D, seed=1) > -1
    keep[0, 1, :16] = False  # groups without an element
    for kept in (None, keep):
        before = x.clone()
        with launches() as seen:
            got = kernels.quantize_pack(x, kind, bits, 16, kept)
        assert seen[0].kernel == f"gear.quantize_{kind}s" and torch.equal(x, before)
        for a, b in zip(got, torch_path(x, kind, bits, 16, kept), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_ties_round_to_even(kind):
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.0]).repeat(8)[None, None, None]  # scale 1: all ties exact
    x = x.mT.expand(1, 1, 64, 8).contiguous() if kind == "key" else x
    codes, scale, zero = kernels.quantize_pack(x, kind, 2, 64)
    assert (scale == 1).all() and (zero == 0).all()
    wanted = torch.tensor([0, 0, 2, 2, 3, 1, 2, 0], dtype=torch.uint8).repeat(8)[None, None, None]
    assert torch.equal(codes, pack(wanted.mT.expand(1, 1, 64, 8).contiguous() if kind == "key" else wanted, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_half_precision_float32_metadata_and_strided_inputs_equal_the_torch_path(kind, dtype):
    x = normal(2, 32, 2, 64).to(dtype).transpose(1, 2)
    keep = (torch.arange(32) > 4)[None, None, :, None].expand(x.shape)  # padding, without memory of its own
    got = kernels.quantize_pack(x, kind, 4, 32, keep, torch.float32)
    for a, b in zip(got, torch_path(x, kind, 4, 32, keep, "float32"), strict=True):
        assert torch.equal(a, b)


def test_a_whole_segment_may_be_one_group():
    x = normal(1, 1, 50, 32)
    for a, b in zip(kernels.quantize_pack(x, "key", 4, 50), torch_path(x, "key", 4, 50), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("named", "said"),
    [
        (dict(kind="keys"), "kind='keys'"),
        (dict(bits=5), "bits=5"),
        (dict(group=24), "group=24 does not divide the 32"),
        (dict(keep=torch.ones(1, 1, 32, 64)), "keep is torch.float32"),
        (dict(x=torch.zeros(1, 0, 32, 64)), "none of them 0"),
        (dict(x=torch.full((1, 1, 32, 64), 1e6)), "does not fit"),
        (dict(x=torch.zeros(1, 1, 32, 63)), "does not fill whole bytes"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_the_reason(named, said):
    with pytest.raises(ValueError, match=said):
        kernels.quantize_pack(**{"x": normal(1, 1, 32, 64), "kind": "key", "bits": 2, "group": 32} | named)


def test_the_launch_table_covers_every_kernel_type_and_width(monkeypatch):
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    for kernel in ("packed", "parts", "exact", "quantize"):
        for dtype in kernels.DTYPES:
            for width in (1, 16, 64, 80, 128, 256):
                assert kernels_common.settings(kernel, dtype, width).tokens >= 16


def test_amd_gets_one_stage(monkeypatch):
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels_common.settings("packed", torch.float16, 64).stages == 1


def test_the_specs_cover_both_kernels_of_each_family_and_every_part():
    names = {spec.name for spec in kernels.SPECS}
    assert names == {"packed", "exact", "merge", "quantize_keys", "quantize_values"}
    assert len({(spec.name, spec.variant) for spec in kernels.SPECS}) == len(kernels.SPECS)
    for spec in kernels.SPECS:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.kernel.arg_names)


@pytest.mark.parametrize("name", ["decode, GEAR 2 bits", "decode, KIVI 4 bits", "quantize, keys", "quantize, values"])
def test_the_cases_of_the_benchmark_pass_their_check_and_run_with_their_peers(name):
    found = kernels_bench.cases("cpu", lengths=(64,), batches=(1,), heads=(2, 1), width=64, dtype=torch.float32)
    case = next(c for c in found if c.name == name)
    error, allowed = case.parity()
    assert error <= allowed
    ours, peer = (run() for run in case.runs.values())
    torch.testing.assert_close(ours, peer, atol=1e-4, rtol=1e-4)

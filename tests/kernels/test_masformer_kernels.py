"""MASFormer's kernels in the interpreter at toy size, against dense fp64 attention under the mask."""

from __future__ import annotations

import pytest
import torch
from masformer_kernel_cases import check, padding, tensors, visited

from zq_lib.core.backend import interpreting
from zq_lib.masformer import SpanPlan, kernels, kernels_bench, kernels_common, local_attention

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not interpreting(), reason="a GPU is here: test_masformer_gpu.py runs these cases at full size"),
]
TILE = kernels_common.TOY.m


@pytest.mark.parametrize("span", [1, 2, 15, 16, 17, 32, 33, 38])
def test_windows_around_a_tile_and_around_the_text_agree(span):
    seen = check(*tensors(33), span=span)
    names = ["masformer.forward", "masformer.backward_queries", "masformer.backward_keys"]
    assert [launch.kernel for launch in seen] == names
    assert all(launch.path == "interpreter" for launch in seen)


@pytest.mark.parametrize("T", [1, 15, 16, 40, 64])
def test_texts_around_a_tile_agree(T):
    check(*tensors(T), span=9)


@pytest.mark.parametrize("kind", ["block", "two_block"])
@pytest.mark.parametrize("span", [4, 7, 16, 24])
def test_blocks_agree_whether_or_not_they_divide_tile_and_text(kind, span):
    check(*tensors(45), span=span, kind=kind)


@pytest.mark.parametrize(("kind", "span"), [("window", 9), ("block", 8), ("two_block", 5)])
@pytest.mark.parametrize("sinks", [1, 4, 20])
def test_sinks_are_seen_once_and_by_all(kind, span, sinks):
    seen = check(*tensors(50), span=span, kind=kind, sinks=sinks)
    assert seen[-1].kernel == "masformer.backward_sinks"


@pytest.mark.parametrize(("H", "G"), [(3, 1), (4, 2)])
def test_groups_of_query_heads_share_keys(H, G):
    check(*tensors(33, B=2, H=H, G=G), span=9, sinks=2)


def test_heads_may_have_spans_of_their_own():
    check(*tensors(40, H=4, G=2), span=(5, 20, None, 1), sinks=2)
    check(*tensors(40, H=2), span=(8, None), kind="two_block")


@pytest.mark.parametrize(("T", "S"), [(1, 40), (5, 40), (24, 56)])
@pytest.mark.parametrize(("kind", "span"), [("window", 9), ("block", 16)])
def test_queries_after_a_cache_agree(T, S, kind, span):
    check(*tensors(T, S), span=span, kind=kind, sinks=3)


@pytest.mark.parametrize(("kind", "span"), [("window", 9), ("block", 8), ("two_block", 5)])
def test_padded_rows_agree_and_their_blocks_count_from_the_first_real_token(kind, span):
    texts = padding(40, (0, 40), (11, 40), (0, 29), (40, 40))
    check(*tensors(40, B=4), span=span, kind=kind, sinks=2, padding=texts)
    check(*tensors(12, 40, B=4), span=span, kind=kind, sinks=2, padding=texts, gradients=False)


@pytest.mark.parametrize(("kind", "span"), [("window", 6), ("block", 8)])
def test_dropped_keys_leave_a_gap_that_positions_tell(kind, span):
    position = torch.cat([torch.arange(3), torch.arange(56, 76)])
    check(*tensors(9, 23), span=span, kind=kind, sinks=3, position=position)


def test_head_widths_that_are_no_power_of_two_agree():
    check(*tensors(20, D=24), span=9, sinks=1)


def test_rows_that_are_not_contiguous_agree():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(33, B=2, H=2, G=2))
    check(q, k.mT.contiguous().mT, v, span=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_tolerance(dtype):
    check(*tensors(40, H=2, dtype=dtype), span=17, sinks=4)


@pytest.mark.parametrize("kind", ["window", "block", "two_block"])
def test_a_span_that_covers_the_text_equals_full_attention_bit_for_bit(kind):
    q, k, v = tensors(40, H=2)
    heads = [local_attention(q, k, v, span=(s, 3), kind=kind, backend="triton")[:, 0] for s in (40, 45, None)]
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_a_window_of_one_returns_the_values_exactly():
    q, k, v = tensors(33)
    assert torch.equal(local_attention(q, k, v, span=1, backend="triton"), v)


def test_runs_repeat_bit_for_bit():
    def gradients():
        found = [x.requires_grad_() for x in tensors(40, H=2)]
        local_attention(*found, span=9, sinks=4, backend="triton").square().sum().backward()
        return [x.grad for x in found]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(
    ("named", "most"),
    [(dict(span=16), 2), (dict(span=17), 2), (dict(span=18), 3), (dict(span=16, kind="block"), 1),
     (dict(span=16, kind="two_block"), 2), (dict(span=16, sinks=4), 3)],
)  # fmt: skip
def test_tiles_outside_the_span_are_not_loaded(named, most):
    T = 96
    tiles = visited(T, TILE, **named)
    assert tiles.sum(1).max() == most
    plan = SpanPlan((named["span"],), named.get("kind", "window"), named.get("sinks", 0))
    useful, rounding = plan.cost(T).total, 3 * TILE * T  # a tile at each end of the band, one of sinks
    assert useful <= int(tiles.sum()) * TILE**2 <= useful + rounding


def test_a_changed_token_changes_nothing_outside_its_span():
    q, k, v = tensors(64)
    before = local_attention(q, k, v, span=9, sinks=2, backend="triton")
    k[:, :, 20] += 1
    v[:, :, 20] += 1
    same = (local_attention(q, k, v, span=9, sinks=2, backend="triton") == before).all(-1)[0, 0]
    assert same.nonzero().flatten().tolist() == [*range(20), *range(29, 64)]


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    q, k, v = tensors(16)
    with pytest.raises(ValueError, match="no softcap; use"):
        local_attention(q, k, v, span=4, softcap=30.0, backend="triton")
    holes = torch.ones(1, 16, dtype=torch.bool)
    holes[0, 5] = False
    with pytest.raises(ValueError, match="padding stands between real tokens"):
        local_attention(q, k, v, span=4, padding=holes, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        local_attention(q.double(), k.double(), v.double(), span=4, backend="triton")


def test_launch_settings_exist_for_every_type_and_width(monkeypatch):
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    for name, half, _ in kernels_common.LAUNCH:
        for width in (16, 64, 80, 128, 256):
            row = kernels_common.settings(name, torch.float16 if half else torch.float32, width)
            assert row.m >= 16 and row.n >= 16 and kernels.ROWS_PER_CHUNK % 16 == 0


def test_the_compiled_list_names_each_kernel_for_both_common_widths():
    have = {(spec.name, spec.variant.rpartition(" ")[0]) for spec in kernels.SPECS if "varied" not in spec.variant}
    for name in ("few", "narrow", "forward", "backward_queries", "backward_keys", "backward_sinks"):
        assert {(name, v) for v in ("fp16 64", "bf16 128")} <= have


def test_every_benchmark_case_checks_itself_and_runs():
    for case in kernels_bench.cases("cpu", lengths=(40,), windows=(8,), heads=(2, 1), width=16, dtype=torch.float32):
        error, allowed = case.parity()
        assert error <= allowed, case.name
        assert case.runs["triton"]() is None and case.flops > 0 and case.moved > 0


def test_a_model_may_be_trained_after_it_has_generated_with_the_same_spans():
    with torch.inference_mode():
        local_attention(*tensors(16, H=2), span=(3, 6), backend="triton")
    check(*tensors(16, H=2), span=(3, 6))

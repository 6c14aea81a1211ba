"""The layer in its three states, for both kinds, with and without bias, whatever its input looks like."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zq_lib.losparse import reference
from zq_lib.losparse.layer import LowRankSparse, quantised, why_not


def _dense(kind: str, outputs: int = 9, inputs: int = 14, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        layer = Conv1D(outputs, inputs)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    return nn.Linear(inputs, outputs, bias=kind == "bias").to(dtype)


KINDS = ("bias", "no bias", "conv1d")
SHAPES = ((14,), (3, 14), (2, 5, 14), (2, 3, 4, 14), (0, 14))


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_replaced_layer_computes_what_the_dense_one_did(kind: str, rank: int) -> None:
    dense = _dense(kind)
    layer = LowRankSparse.from_dense(dense, rank)
    x = torch.randn(50, 14)
    want = dense(x)
    assert (layer(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert (layer.weight - dense.weight).abs().max() <= 1e-6 and layer.bias is dense.bias


@pytest.mark.parametrize("rows", [[], [0], [0, 3, 8], list(range(9))])
@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_output_equals_masked_output_for_every_input_rank(kind: str, rows: list[int]) -> None:
    layer = LowRankSparse.from_dense(_dense(kind), 3)
    keep = torch.tensor(rows, dtype=torch.int64)
    mask = torch.zeros(9, 1)
    mask[keep] = 1
    masked = copy.deepcopy(layer)
    masked.sparse.data *= mask
    layer.shrink(keep)
    assert layer.sparse.shape == (len(rows), 14) and layer.shrunk
    for shape in (*SHAPES[1:], (2, 9, 14), (3, 14)):  # changing shapes, one after the other
        x = torch.randn(*shape)
        want, found = masked(x), layer(x)
        assert found.shape == want.shape
        if x.numel():
            assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_back_the_original_class_with_the_same_function(kind: str) -> None:
    dense = _dense(kind)
    layer = LowRankSparse.from_dense(dense, 3)
    merged = layer.merge()
    assert type(merged) is type(dense) and merged.weight.shape == dense.weight.shape
    torch.testing.assert_close(merged.weight, dense.weight, rtol=0, atol=1e-6)
    assert repr(merged) == repr(dense)
    layer.shrink(torch.tensor([2, 5]))
    x = torch.randn(4, 14)
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-5, atol=1e-6)
    assert list(layer.merge().state_dict()) == list(dense.state_dict())


def test_rows_whose_sum_is_zero_are_kept() -> None:
    dense = nn.Linear(4, 3, bias=False)
    dense.weight.data = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0], [2, -1, -1, 0]])
    layer = LowRankSparse.from_dense(dense, 0)
    layer.shrink(torch.tensor([0, 2]))
    assert layer.sparse.tolist() == [[1.0, -1, 0, 0], [2, -1, -1, 0]]


def test_the_parameters_are_exactly_those_of_the_formula_and_fall() -> None:
    layer = LowRankSparse.from_dense(_dense("bias"), 2)
    assert layer.parameter_count() == 2 * (9 + 14) + 9 * 14 + 9 > layer.dense_parameter_count() == 9 * 14 + 9
    layer.shrink(torch.tensor([0, 1, 4]))
    assert layer.parameter_count() == sum(t.numel() for t in layer.parameters()) == 2 * 23 + 3 * 14 + 9
    assert layer.flops(5) == 5 * (2 * 23 + 3 * 14)


def test_break_even_is_where_the_layer_stops_being_cheaper() -> None:
    for rank in (0, 1, 2, 5):
        most = LowRankSparse.from_dense(_dense("bias"), rank).break_even
        for rows, cheaper in ((most, True), (most + 1, False)):
            if 0 <= rows <= 9:
                layer = LowRankSparse.from_dense(_dense("bias"), rank)
                layer.shrink(torch.arange(rows))
                assert layer.pays is (cheaper and layer.flops() < 9 * 14) is (layer.flops() < 9 * 14)
    assert LowRankSparse.from_dense(_dense("bias"), 0).break_even == 8


def test_the_shrunk_layer_passes_a_gradient_check_and_trains_twice() -> None:
    layer = LowRankSparse.from_dense(_dense("bias", dtype=torch.float64), 3)
    layer.shrink(torch.tensor([1, 5, 6]))
    x = torch.randn(2, 3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(
            layer, dict(zip(("left", "right", "sparse", "bias"), p, strict=True)), x
        ),
        (x, *(p.detach().clone().requires_grad_() for p in (layer.left, layer.right, layer.sparse, layer.bias))),
    )
    for shape in ((2, 3, 14), (1, 14), (4, 14)):
        layer(torch.randn(*shape, dtype=torch.float64)).sum().backward()
    want = reference.shrunk_linear(x, layer.left, layer.right, layer.sparse, layer.rows, layer.bias)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_close(dtype: torch.dtype) -> None:
    dense = _dense("bias", dtype=dtype)
    layer = LowRankSparse.from_dense(dense, 3)
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer.merge().weight.dtype == dtype
    x = torch.randn(20, 14, dtype=dtype)
    assert (layer(x).float() - dense(x).float()).abs().max() < 0.05


def test_given_factors_are_taken_and_s_is_what_they_leave() -> None:
    dense = _dense("conv1d")
    left, right = torch.randn(9, 2), torch.randn(2, 14)
    layer = LowRankSparse.from_dense(dense, 2, (left, right))
    assert torch.equal(layer.left, left) and torch.equal(layer.right, right)
    torch.testing.assert_close(layer.weight, dense.weight, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"do not fit a weight of 9 x 14 at rank 3; give \[9, 3\] and \[3, 14\]"):
        LowRankSparse.from_dense(dense, 3, (left, right))


def test_a_frozen_layer_stays_frozen_and_the_mode_is_kept() -> None:
    dense = _dense("bias").requires_grad_(False).eval()
    layer = LowRankSparse.from_dense(dense, 2)
    assert not any(p.requires_grad for p in layer.parameters()) and not layer.training
    assert not layer.merge().weight.requires_grad


def test_a_state_with_other_rows_reshapes_the_layer_both_ways() -> None:
    whole = LowRankSparse.from_dense(_dense("bias"), 3)
    small = copy.deepcopy(whole)
    small.shrink(torch.tensor([2, 7]))
    x = torch.randn(3, 14)
    fresh = LowRankSparse.from_dense(_dense("bias"), 1)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x)) and fresh.rows.tolist() == [2, 7]
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh(x), whole(x)) and fresh.rows is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([3, 1]), "ascending int64 indices below 9"),
        (torch.tensor([1, 1]), "ascending"),
        (torch.tensor([1, 9]), "below 9"),
        (torch.tensor([-1, 2]), "ascending"),
        (torch.tensor([True, False]), "torch.bool"),
    ],
)
def test_rows_that_are_no_ascending_indices_are_refused(rows: torch.Tensor, message: str) -> None:
    layer = LowRankSparse.from_dense(_dense("bias"), 2)
    with pytest.raises(ValueError, match=message):
        layer.shrink(rows)
    layer.shrink(torch.tensor([1]))
    with pytest.raises(ValueError, match="shrunk already"):
        layer.shrink(torch.tensor([0]))


def test_layers_of_other_kinds_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="is a Embedding, and only Linear and Conv1D can be compressed"):
        LowRankSparse.from_dense(nn.Embedding(3, 3), 1)
    with pytest.raises(ValueError, match="rank=12 must lie between 0 and 9"):
        LowRankSparse.from_dense(_dense("bias"), 12)
    assert "load the weights first" in why_not(nn.Linear(3, 3, device="meta"))

    class Own(nn.Linear):
        pass

    assert "is a Own" in why_not(Own(3, 3)) and not quantised(Own(3, 3))


def test_quantised_layers_are_recognised() -> None:
    codes = nn.Linear(4, 4)
    codes.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    packed = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    for layer in (codes, packed):
        assert quantised(layer) and "compress the model before it is quantised" in why_not(layer)

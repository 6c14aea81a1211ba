"""The shrunk layer on the torch path: outputs, gradients, shapes, and rows that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from zq_lib.core.backend import launches
from zq_lib.losparse import reference
from zq_lib.losparse.linear import check_rows, low_rank_sparse_linear

SIZES = [(5, 4, 3, 2), (5, 0, 3, 2), (5, 4, 0, 2), (5, 5, 3, 1), (1, 1, 1, 1), (5, 0, 0, 40), (7, 3, 2, 40)]


def tensors(N: int, n: int, r: int, tokens: int, K: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(N + n + r)
    make = lambda *shape: torch.randn(*shape, generator=source, dtype=dtype)  # noqa: E731
    rows = torch.randperm(N, generator=source)[:n].sort().values
    return [make(tokens, K), make(N, r), make(r, K), make(n, K), rows, make(N)]


@pytest.mark.parametrize(("N", "n", "r", "tokens"), SIZES)
def test_the_layer_is_the_dense_one_with_the_other_rows_of_s_at_zero(N, n, r, tokens) -> None:
    x, left, right, sparse, rows, bias = tensors(N, n, r, tokens)
    whole = torch.zeros(N, 6, dtype=x.dtype).index_copy(0, rows, sparse)
    wanted = reference.linear(x, left, right, whole, bias)
    torch.testing.assert_close(low_rank_sparse_linear(x, left, right, sparse, rows, bias), wanted)
    torch.testing.assert_close(low_rank_sparse_linear(x, left, right, sparse, rows), wanted - bias)


@pytest.mark.parametrize(("N", "n", "r", "tokens"), SIZES)
def test_gradients_are_right_in_double_precision(N, n, r, tokens) -> None:
    x, left, right, sparse, rows, bias = tensors(N, n, r, tokens)
    leaves = [t.requires_grad_() for t in (x, left, right, sparse, bias)]
    call = lambda x, left, right, sparse, bias: low_rank_sparse_linear(x, left, right, sparse, rows, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 0, 6), (2, 3, 4, 6)])
def test_any_number_of_dimensions_goes_and_shapes_may_change_from_call_to_call(shape) -> None:
    _, *rest = tensors(5, 3, 2, 1)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = low_rank_sparse_linear(x, *rest)
    assert out.shape == (*shape[:-1], 5)
    torch.testing.assert_close(out, reference.shrunk_linear(x, *rest))


def test_inputs_stay_as_they_are_and_the_path_is_recorded() -> None:
    inputs = tensors(5, 3, 2, 4)
    before = [t.clone() for t in inputs]
    with launches() as seen:
        low_rank_sparse_linear(*inputs)
    assert [(s.kernel, s.path) for s in seen] == [("losparse.linear", "torch")]
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_half_precision_and_autocast_give_their_own_types() -> None:
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in tensors(5, 3, 2, 4)]
    assert low_rank_sparse_linear(*inputs).dtype == torch.bfloat16
    single = [t.float() if t.is_floating_point() else t for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_sparse_linear(*single).dtype == torch.bfloat16
        single[0].requires_grad_()
        low_rank_sparse_linear(*single).float().sum().backward()
    assert single[0].grad.dtype == torch.float32


@pytest.mark.parametrize(
    "rows", [[2, 1, 4], [1, 1, 2], [-1, 1, 2], [1, 2, 5]], ids=["unsorted", "twice", "low", "high"]
)
def test_rows_that_do_not_ascend_within_the_outputs_are_refused(rows) -> None:
    inputs = tensors(5, 3, 2, 4)
    inputs[4] = torch.tensor(rows)
    with pytest.raises(ValueError, match=r"for 5 outputs; they must ascend without repetition within 0 to 4"):
        low_rank_sparse_linear(*inputs)


def test_rows_that_were_right_are_looked_at_again_once_they_change() -> None:
    inputs = tensors(5, 3, 2, 4)
    low_rank_sparse_linear(*inputs)
    inputs[4].copy_(torch.tensor([3, 1, 0]))
    with pytest.raises(ValueError, match="sort rows and the rows of sparse together"):
        low_rank_sparse_linear(*inputs)
    check_rows(torch.tensor([3]), 1, 5)
    with pytest.raises(ValueError, match="for 3 outputs"):
        check_rows(torch.tensor([3]), 1, 3)


@pytest.mark.parametrize(
    "rows", [torch.tensor([0, 1]), torch.tensor([0, 1, 2], dtype=torch.int32)], ids=["few", "int32"]
)
def test_rows_must_be_one_whole_number_for_each_row(rows) -> None:
    inputs = tensors(5, 3, 2, 4)
    inputs[4] = rows
    with pytest.raises(ValueError, match="sparse has 3 rows; give one int64 output"):
        low_rank_sparse_linear(*inputs)


def test_matrices_that_do_not_fit_are_refused_with_their_shapes() -> None:
    x, left, right, sparse, rows, bias = tensors(5, 3, 2, 4)
    with pytest.raises(ValueError, match=r"left \(5, 2\), right \(2, 6\) and sparse \(3, 6\) do not fit .* width 4"):
        low_rank_sparse_linear(x[:, :4], left, right, sparse, rows, bias)
    with pytest.raises(ValueError, match="do not fit an input of width 6"):
        low_rank_sparse_linear(x, left[:, :1], right, sparse, rows, bias)


def test_triton_without_a_gpu_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='backend is "triton" but the tensors are on "cpu"'):
        low_rank_sparse_linear(*tensors(5, 3, 2, 4, dtype=torch.float32), backend="triton")


def test_inference_mode_works_with_tensors_made_inside_it() -> None:
    with torch.inference_mode():
        inputs = tensors(5, 3, 2, 4)
        torch.testing.assert_close(low_rank_sparse_linear(*inputs), reference.shrunk_linear(*inputs))


def test_a_compiled_layer_gives_the_same() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, self.left, self.right, self.sparse, self.rows, self.bias = (
                torch.nn.Parameter(t) if t.is_floating_point() else t for t in tensors(5, 3, 2, 4)
            )

        def forward(self, x: Tensor) -> Tensor:
            return low_rank_sparse_linear(x, self.left, self.right, self.sparse, self.rows, self.bias)

    layer, x = Layer(), tensors(5, 3, 2, 4)[0]
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(functional_call(layer, dict(layer.named_parameters()), (x,)), layer(x))

"""LoSparse's kernels in Triton's interpreter: the shrunk layer, the importance of rows, and masks."""

from __future__ import annotations

import pytest
import torch
from losparse_kernel_cases import check, tensors
from torch import Tensor

from zq_lib.core.backend import interpreting, launches
from zq_lib.losparse import kernels, reference
from zq_lib.losparse.kernels import RowImportanceTable, maps
from zq_lib.losparse.linear import low_rank_sparse_linear

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="a GPU is here, and these are toy sizes for the interpreter"),
    pytest.mark.usefixtures("poisoned"),
]
ONE, TWO = ["losparse.decode"], ["losparse.stack", "losparse.spread"]


def names(seen) -> list[str]:
    assert {launch.path for launch in seen} == {"interpreter"}
    return [launch.kernel for launch in seen]


@pytest.fixture(params=["one launch", "two launches"])
def form(request, monkeypatch) -> list[str]:
    """Both forms at any number of tokens: which one runs depends on the size alone."""
    if request.param == "two launches":
        monkeypatch.setattr(kernels, "MOST_RANK", -1)
        return TWO
    return ONE


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
def test_every_number_of_kept_rows_agrees_with_the_reference(n: int, form) -> None:
    assert names(check(tensors(7, 33, 19, 5, n))) == form


@pytest.mark.parametrize("r", [0, 1, 5, 16, 33])
def test_every_rank_agrees_with_the_reference(r: int, form) -> None:
    assert names(check(tensors(7, 20, 19, r, 6))) == form


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (16, 16, 16), (17, 16, 33), (5, 40, 7), (64, 3, 16)])
def test_sizes_of_one_a_block_a_block_plus_one_and_none_of_these_agree(M: int, N: int, K: int, form) -> None:
    check(tensors(M, N, K, 3, max(1, N // 3)))


def test_many_tokens_take_two_launches_and_few_take_one() -> None:
    assert names(check(tensors(70, 20, 19, 5, 6))) == TWO
    assert names(check(tensors(64, 20, 19, 5, 6))) == ONE
    assert names(check(tensors(3, 20, 19, 65, 6))) == TWO


@pytest.mark.parametrize("M", [7, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_tolerance(dtype: torch.dtype, M: int) -> None:
    check(tensors(M, 40, 35, 6, 11, dtype=dtype))


def test_a_layer_without_bias_agrees(form) -> None:
    check(tensors(9, 20, 11, 4, 5, bias=False))


def test_a_layer_without_rank_or_rows_is_its_bias(form) -> None:
    inputs = tensors(4, 10, 6, 0, 0)
    assert torch.equal(low_rank_sparse_linear(*inputs, backend="triton"), inputs[-1].expand(4, 10))
    assert not low_rank_sparse_linear(*inputs[:5], backend="triton").any()


@pytest.mark.parametrize("M", [24, 66])
def test_more_dimensions_and_strides_agree(M: int) -> None:
    x, *rest = tensors(M, 20, 12, 4, 5)
    check([x.view(2, M // 2, 12).transpose(0, 1), *rest])
    wide = torch.randn(M, 24, generator=torch.Generator().manual_seed(0))
    check([wide[:, ::2], *rest])
    left, right, sparse, *more = rest
    check([x, left.T.contiguous().T, right.T.contiguous().T, sparse.repeat(1, 2)[:, :12], *more])


def test_no_token_gives_no_output() -> None:
    x, *rest = tensors(3, 20, 12, 4, 5)
    assert low_rank_sparse_linear(x[:0], *rest, backend="triton").shape == (0, 20)


def test_inputs_that_need_no_gradient_get_none() -> None:
    x, left, right, sparse, rows, bias = tensors(3, 20, 12, 4, 5)
    left.requires_grad_()
    low_rank_sparse_linear(x, left, right, sparse, rows, bias, backend="triton").sum().backward()
    assert left.grad is not None and x.grad is None and sparse.grad is None


def test_rows_that_change_in_place_are_read_again() -> None:
    inputs = tensors(3, 20, 12, 4, 2)
    rows = inputs[4]
    for now in ([0, 1], [3, 9]):
        rows.copy_(torch.tensor(now))
        check(inputs)
        order, place = maps(rows, 20)
        assert order[:2].tolist() == now and sorted(order.tolist()) == list(range(20))
        assert place[now].tolist() == [0, 1] and int((place >= 0).sum()) == 2


def test_types_that_the_kernel_cannot_take_are_refused_when_it_is_demanded() -> None:
    inputs = [t.double() if t is not None and t.is_floating_point() else t for t in tensors(3, 20, 12, 4, 2)]
    with pytest.raises(ValueError, match='backend is "triton" but the tensors are float64'):
        low_rank_sparse_linear(*inputs, backend="triton")


def test_runs_repeat_bit_for_bit() -> None:
    def results() -> list[Tensor]:
        x, *rest = tensors(70, 20, 19, 5, 6)
        return [low_rank_sparse_linear(x[:m], *rest, backend="triton") for m in (70, 5)]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


# The mask step --------------------------------------------------------------------------------------------------------
SHAPES = [(5, 7), (1, 40), (17, 16), (4, 1)]


def step(seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(*shape, generator=source).to(dtype) for shape in SHAPES] for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_means_agree_with_torch(dtype: torch.dtype) -> None:
    sparse, grads = step(0, dtype)
    table, average = RowImportanceTable(sparse), torch.zeros(27)
    with launches() as seen:
        table.update(grads, torch.zeros(27), average, beta=0.0, position=None)
    assert names(seen) == ["losparse.importance"]
    pairs = zip(sparse, grads, strict=True)
    wanted = torch.cat([reference.importance(s.double(), g.double()).mean(1) for s, g in pairs])
    torch.testing.assert_close(average.double(), wanted, rtol=1e-6, atol=0)


def test_both_averages_follow_the_reference_bit_for_bit_over_steps() -> None:
    sparse = [s.clone() for s in step(0)[0]]
    table = RowImportanceTable(sparse)
    window, ours, plain = torch.zeros(27), torch.zeros(27), torch.zeros(27)
    their_window, theirs, their_plain = window.clone(), ours.clone(), plain.clone()
    for t in range(9):
        moved, grads = step(t)  # new gradients: their addresses change
        for mine, new in zip(sparse, moved, strict=True):
            mine.copy_(new)
        now = torch.zeros(27)
        table.update(grads, torch.empty(0), now, beta=0.0, position=None)
        table.update(grads, window, ours, beta=0.85, position=t % 4)
        table.update(grads, torch.empty(0), plain, beta=0.85, position=None)
        theirs, their_window = reference.smooth_window(theirs, their_window, now, t, 4, 0.85)
        their_plain = reference.smooth(their_plain, now, 0.85)
        assert torch.equal(ours, theirs) and torch.equal(window, their_window) and torch.equal(plain, their_plain)


def test_a_matrix_without_gradient_has_no_importance() -> None:
    sparse, grads = step(0)
    average = torch.zeros(27)
    RowImportanceTable(sparse).update([grads[0], None, *grads[2:]], torch.zeros(27), average, beta=0.0, position=None)
    assert average[5] == 0 and bool((average[:5] > 0).all()) and bool((average[6:] > 0).all())


def test_a_gradient_of_other_strides_counts_the_same() -> None:
    sparse, grads = step(0)
    found = []
    for given in (grads, [g.T.contiguous().T for g in grads]):
        average = torch.zeros(27)
        RowImportanceTable(sparse).update(given, torch.zeros(27), average, beta=0.5, position=None)
        found.append(average)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_rows_become_zero_and_the_others_stay_bit_for_bit(dtype: torch.dtype) -> None:
    sparse, before = step(3, dtype)[0], step(3, dtype)[0]
    keep = torch.rand(27, generator=torch.Generator().manual_seed(0)) > 0.5
    with launches() as seen:
        RowImportanceTable(sparse).zero(keep)
    assert names(seen) == ["losparse.zero"]
    for s, old, kept in zip(sparse, before, keep.split([n for n, _ in SHAPES]), strict=True):
        assert torch.equal(s[kept], old[kept]) and not s[~kept].any()


def test_matrices_of_several_types_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in type or device"):
        RowImportanceTable([torch.ones(2, 2), torch.ones(2, 2).half()])
    with pytest.raises(ValueError, match="a gradient is not torch.float32"):
        RowImportanceTable([torch.ones(2, 2)]).update([torch.ones(2, 2).half()], *torch.zeros(2, 2), 0.5, None)


def test_every_kernel_is_listed_for_compilation_ahead_of_time() -> None:
    wanted = {"stack", "stack few", "spread", "decode", "importance", "zero"}
    assert {spec.name for spec in kernels.SPECS} == wanted and len(kernels.SPECS) == 10
    for spec in kernels.SPECS:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.kernel.arg_names)


def test_the_gpu_benchmarks_pass_their_own_parity_checks_at_toy_size() -> None:
    from zq_lib.losparse.kernels_bench import cases

    found = list(cases("cpu", tokens=(1, 70), widths=(32,), shares=(0.5,), layers=1, hidden=8, dtype=torch.float32))
    assert [case.name for case in found] == ["forward", "training", "forward", "training", "mask step"]
    for case in found:
        error, allowed = case.parity()
        assert error <= allowed, case.name
        for call in case.runs.values():
            call()

"""The kernels in Triton's interpreter: outputs, gradients and importance against the reference and the torch path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zq_lib.adalora import AdaLoraConfig, attach, kernels, reference
from zq_lib.adalora.importance import Importance
from zq_lib.core.backend import interpreting, last_launch, launches
from zq_lib.core.numerics import relative_rms, tolerance

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here, and these are toy sizes for the interpreter")


def _case(M: int, N: int, K: int, R: int, dtype=torch.float32, bias: bool = True):
    source = torch.Generator().manual_seed(M + N + K + R)
    make = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    values = make(R)
    values[::3] = 0  # dropped triplets
    return [
        make(M, K).to(dtype), make(N, K).to(dtype), make(N).to(dtype) if bias else None, make(N, R), values, make(R, K)
    ]  # fmt: skip


def _check(tensors, scale: float = 1.7) -> list:
    """Outputs and the four gradients against fp64; inputs must stay as they were."""
    x, weight, bias, left, values, right = tensors
    before = [None if t is None else t.clone() for t in tensors]
    leaves = [t.detach().requires_grad_() for t in (x, left, values, right)]
    with launches() as seen:
        out = kernels.fused_linear(leaves[0], weight, bias, *leaves[1:], scale)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        ours = torch.autograd.grad(out, leaves, grad)
    double = [None if t is None else t.detach().double() for t in tensors]
    bound = tolerance(x.dtype, "interpreter")
    assert relative_rms(out, reference.adapted_linear(*double, scale)) <= bound.output
    flat = (double[0].reshape(-1, x.shape[-1]), double[1], *double[3:])
    theirs = reference.adapted_linear_gradients(grad.double().reshape(-1, grad.shape[-1]), *flat, scale)
    for mine, right_one in zip(ours, theirs, strict=True):
        assert relative_rms(mine, right_one.view(mine.shape)) <= bound.gradient
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert {launch.path for launch in seen} == {"interpreter"}
    return [launch.kernel for launch in seen]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Whatever the library allocates with `torch.empty` is NaN until a kernel writes it."""
    allocate = torch.empty

    def nan(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", nan)


@pytest.mark.parametrize("R", [1, 3, 5, 8, 12, 16, 20])
def test_every_rank_agrees_with_the_reference(R: int) -> None:
    assert _check(_case(17, 33, 20, R)) == ["adalora.matmul", "adalora.matmul", "adalora.outer", "adalora.outer"]


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (16, 16, 16), (17, 16, 33), (5, 40, 7), (33, 3, 16)])
def test_sizes_of_one_a_block_a_block_plus_one_and_none_of_these_agree(M: int, N: int, K: int) -> None:
    _check(_case(M, N, K, 5))


def test_a_rank_too_wide_for_one_launch_takes_two() -> None:
    seen = _check(_case(18, 17, 19, 40))
    assert seen[:2] == ["adalora.project", "adalora.matmul"]


def test_a_layer_without_bias_agrees() -> None:
    _check(_case(9, 10, 11, 4, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_tolerance(dtype: torch.dtype) -> None:
    _check(_case(17, 18, 19, 6, dtype))


def test_more_dimensions_and_strides_agree() -> None:
    tensors = _case(24, 10, 12, 4)
    _check([tensors[0].view(2, 12, 12).transpose(0, 1), *tensors[1:]])
    wide = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    _check([wide[:, ::2], *tensors[1:]])


def test_runs_repeat_bit_for_bit_and_many_rows_are_split() -> None:
    tensors = _case(200, 9, 10, 4)
    leaves = [t.requires_grad_() for t in tensors[3:]]

    def run():
        out = kernels.fused_linear(*tensors, 1.0)
        return torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert last_launch().kernel == "adalora.outer" and last_launch().grid[1] == 3
    _check(_case(200, 9, 10, 4))


def test_nothing_to_do_gives_nothing_and_too_much_is_refused() -> None:
    x, *rest = _case(3, 4, 5, 2)
    assert kernels.fused_linear(x[:0], *rest, 1.0).shape == (0, 4)
    with pytest.raises(ValueError, match="has rank 200; the kernel takes 1 to 128"):
        kernels.fused_linear(*_case(3, 4, 5, 200), 1.0)


def test_an_attached_layer_runs_the_kernel_when_asked_and_torch_otherwise() -> None:
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5))
        handle = attach(model, targets="0", init_rank=3, target_rank=1, total_steps=20, backend=backend)
        with torch.no_grad():
            handle.adapters[0].values.fill_(0.5)
        with launches() as seen:
            results.append(model(torch.ones(4, 7)))
        assert seen[0].path == ("interpreter" if backend == "triton" else "torch")
    torch.testing.assert_close(*results)


def test_a_call_the_kernel_cannot_take_is_refused_when_the_kernel_is_demanded() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).double()
    attach(model, targets="0", init_rank=3, target_rank=1, total_steps=20, backend="triton")
    with pytest.raises(ValueError, match='backend is "triton" but input and weight are torch.float64'):
        model(torch.ones(4, 7).double())


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(17, 33), nn.Linear(33, 40)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def _pair(R: int, kind: str):
    torch.manual_seed(R)
    handle = attach(_Two(), targets=("a", "b"), init_rank=R, budget=1, total_steps=20)
    handle.detach()
    twins = [handle.adapters, copy.deepcopy(handle.adapters)]
    return twins, [Importance(a, kind, 0.85, 0.85, b) for a, b in zip(twins, ("triton", "torch"), strict=True)]


@pytest.mark.parametrize("kind", ["adalora", "smoothed", "sensitivity"])
@pytest.mark.parametrize("R", [1, 3, 8, 12, 20])
def test_importance_is_bit_equal_and_scores_agree_over_steps(R: int, kind: str) -> None:
    twins, both = _pair(R, kind)
    for step in range(3):
        source = torch.Generator().manual_seed(step)
        for one, two in zip(*(x.parameters for x in both), strict=True):
            one.grad = torch.randn(one.shape, generator=source)  # a new tensor each step: the addresses change
            two.grad = one.grad.clone()
            with torch.no_grad():
                one.add_(one.grad, alpha=-0.1)
                two.copy_(one)
        if step == 1:
            both[0].parameters[0].grad = both[1].parameters[0].grad = None
        with launches() as seen:
            for importance in both:
                importance.update()
        assert [(s.kernel, s.path) for s in seen] == [
            ("adalora.importance", "interpreter"), ("adalora.importance", "torch")
        ]  # fmt: skip
        assert torch.equal(both[0].sensitivity, both[1].sensitivity)
        assert torch.equal(both[0].uncertainty, both[1].uncertainty)
        torch.testing.assert_close(both[0].scores(), both[1].scores(), rtol=1e-6, atol=0)


def test_importance_agrees_with_the_reference_in_double_precision() -> None:
    twins, both = _pair(4, "adalora")
    stats = [(torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in both[1].parameters]
    for step in range(4):
        source = torch.Generator().manual_seed(step)
        for i, p in enumerate(both[1].parameters):
            p.grad = torch.randn(p.shape, generator=source)
            stats[i] = reference.update_importance(p.detach().double(), p.grad.double(), *stats[i], 0.85, 0.85)
        both[1].update()
    wanted = [reference.triplet_scores(*(i * u for i, u in stats[3 * k : 3 * k + 3])) for k in range(2)]
    torch.testing.assert_close(both[1].scores().double(), torch.stack(wanted), rtol=1e-5, atol=0)


def test_a_whole_training_keeps_the_same_triplets_with_both_paths() -> None:
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = _Two()
        config = AdaLoraConfig(init_rank=4, target_rank=2, total_steps=12, warmup=1, final=4, interval=2)
        handle = attach(model, config, targets=("a", "b"), backend=backend)
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
        source = torch.Generator().manual_seed(1)
        for _ in range(12):
            x = torch.randn(5, 17, generator=source)
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(handle.trace)
    assert all((a == b).all() for a, b in zip(found[0].keep, found[1].keep, strict=True))


def test_every_kernel_is_listed_for_compilation_ahead_of_time() -> None:
    assert {spec.name for spec in kernels.SPECS} == {"matmul", "project", "outer", "importance", "scores"}
    for spec in kernels.SPECS:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.kernel.arg_names)


def test_the_gpu_benchmarks_pass_their_own_parity_checks_at_toy_size() -> None:
    from zq_lib.adalora.kernels_bench import cases

    found = list(cases("cpu", rows=(5,), width=24, ranks=(3,), layers=(1,), hidden=8, dtype=torch.float32))
    assert [case.name for case in found] == ["forward", "training", "importance"]
    for case in found:
        error, allowed = case.parity()
        assert error <= allowed, case.name
        for call in case.runs.values():
            call()

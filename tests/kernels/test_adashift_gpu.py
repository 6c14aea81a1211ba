"""Rung 3: the parity of test_adashift_kernels.py on a GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import pytest
import torch
from adashift_kernel_cases import check, compare, draw, noise, start, walk
from torch import nn

from zq_lib.adashift import AdaShift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
SHAPES = ((1,), (1023,), (16_385,), (768, 3072), (1000, 77), (64, 3, 7, 7), (3, 100_003))
PHIS = [
    dict(phi="max"), dict(phi="mean"), dict(phi="l2"), dict(phi="none", eps=1e-5), dict(phi="max", block="row"),
    dict(phi="mean", block="row"),
]  # fmt: skip


@pytest.mark.parametrize("beta1", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("settings", PHIS, ids=str)
def test_every_spatial_function_agrees(settings: dict, beta1: float) -> None:
    seen = check(SHAPES, 7, device="cuda", n=3, betas=(beta1, 0.999), **settings)
    assert {launch.path for launch in seen} == {"triton"}


@pytest.mark.parametrize("ring", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", PHIS[::2], ids=str)
def test_types_agree(settings: dict, dtype: torch.dtype, ring) -> None:
    check(SHAPES, 7, dtype, "cuda", n=3, lr=0.05, ring_dtype=ring, **settings)


@pytest.mark.parametrize("more", [dict(), dict(decoupled=False), dict(max_step=0.3, maximize=True)], ids=str)
@pytest.mark.parametrize("settings", PHIS[::3], ids=str)
def test_decay_bound_and_direction_agree(settings: dict, more: dict) -> None:
    gradients, ways = noise(SHAPES, 7, torch.float32, "cuda"), []
    for fused in (True, False):
        params = start(SHAPES, torch.float32, "cuda")
        ways.append(AdaShift(params, n=3, weight_decay=0.1, fused=fused, **settings, **more))
        walk(ways[-1], params, gradients)
    compare(*ways, 5e-6)


@pytest.mark.parametrize("phi", ["max", "mean", "none"])
def test_a_captured_step_repeats_with_new_gradients_and_a_new_rate(phi: str) -> None:
    gradients, ends = noise(((300, 70), (9,)), 8, torch.float32, "cuda"), []
    for captured in (True, False):
        params, rate = start(((300, 70), (9,)), torch.float32, "cuda"), torch.tensor(0.01, device="cuda")
        optimizer = AdaShift(params, lr=rate, n=2, phi=phi, capturable=True)
        for param in params:
            param.grad = torch.zeros_like(param)
        graph = torch.cuda.CUDAGraph()
        for t, at_step in enumerate(gradients):
            for param, grad in zip(params, at_step, strict=True):
                param.grad.copy_(grad)
            rate.fill_(0.01 / (1 + t))
            if captured and t == 3:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and t >= 3:
                graph.replay()
            else:
                optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_rings_beyond_two_to_the_31_entries_are_reached() -> None:
    """A 32-bit address would wrap and read another slot."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    param = nn.Parameter(torch.zeros(2**28 + 5, device="cuda"))
    optimizer = AdaShift([param], n=9, ring_dtype=torch.bfloat16, fused=True)
    for t in range(10):
        param.grad = torch.full_like(param, 1.0 + t)
        optimizer.step()
    ring = optimizer.state[param]["ring"]
    assert ring[:, -1].tolist() == [10.0, *range(2, 10)] and ring[:, 0].tolist() == [10.0, *range(2, 10)]
    assert float(param.detach().max() - param.detach().min()) == 0


def test_runs_repeat_bit_for_bit() -> None:
    ends = []
    for _ in range(2):
        params = [nn.Parameter(draw((3000, 1000), 1, device="cuda"))]
        optimizer = AdaShift(params, n=2, phi="mean", fused=True)
        walk(optimizer, params, noise(((3000, 1000),), 6, torch.float32, "cuda"))
        ends.append([params[0].detach(), *optimizer.state[params[0]].values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

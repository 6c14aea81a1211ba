"""Inputs and comparisons that the interpreter and the GPU tests of AdaShift's kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zq_lib.adashift import AdaShift
from zq_lib.adashift.reference import trajectory
from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms

SHAPES = ((13, 37), (129,), (), (33, 70))  # rows of odd lengths, and in the interpreter one tensor of two chunks
ROUNDED = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # one unit in the last place of half precision


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def noise(shapes: Sequence[tuple[int, ...]], steps: int, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """Gradients of every step and tensor, one tensor's ten times the last one's."""
    return [
        [draw(shape, 100 * t + i, dtype, device) * 10.0 ** (i % 3 - 1) for i, shape in enumerate(shapes)]
        for t in range(steps)
    ]


def start(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, 7 + i, dtype, device)) for i, shape in enumerate(shapes)]


def walk(optimizer: AdaShift, params: Sequence[nn.Parameter], gradients: Sequence[Sequence[Tensor]]) -> list[Launch]:
    """Steps with these gradients; the launches of the last one."""
    for at_step in gradients:
        for param, grad in zip(params, at_step, strict=True):
            param.grad = grad.clone()
        with launches() as seen:
            optimizer.step()
        untouched = (torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(params, at_step, strict=True))
        assert all(untouched), "a gradient was changed"
    return seen


def compare(mine: AdaShift, other: AdaShift, within: float) -> None:
    """Assert that parameters and states agree, counts exactly and the rest to `within` of its size."""
    for a, b in zip(mine.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert relative_rms(a, b) <= within
        found, wanted = mine.state[a], other.state[b]
        assert set(found) == set(wanted)
        for name in found:
            assert found[name].dtype == wanted[name].dtype, name
            if name in ("step", "age"):
                assert torch.equal(found[name].cpu(), wanted[name].cpu()), name
            else:
                assert relative_rms(found[name], wanted[name]) <= max(within, 2e-6), name


def check(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **settings,
) -> list[Launch]:
    """Assert that the kernels agree with the torch path, and in fp32 with the reference; the last step's launches."""
    gradients = noise(shapes, steps, dtype, device)
    (mine, ours), (theirs, plain) = (
        (params, AdaShift(params, fused=fused, **settings))
        for fused, params in ((True, start(shapes, dtype, device)), (False, start(shapes, dtype, device)))
    )
    seen = walk(ours, mine, gradients)
    walk(plain, theirs, gradients)
    compare(ours, plain, ROUNDED[dtype])
    if dtype == torch.float32 and settings.get("ring_dtype") is None:
        for i, (param, first) in enumerate(zip(mine, start(shapes, dtype, device), strict=True)):
            wanted = reference(first, [at_step[i] for at_step in gradients], **ours.param_groups[0])
            moved = wanted - first.detach().double()
            assert moved.any(), "nothing was compared"
            assert float((param.detach().double() - wanted).norm()) <= 2e-6 * float(wanted.norm() + moved.norm())
    return seen


def reference(first: Tensor, gradients: Sequence[Tensor], **settings) -> Tensor:
    """Where the fp64 reference ends with these gradients."""
    known = ("lr", "betas", "n", "phi", "eps", "block", "weight_decay", "decoupled", "max_step", "maximize")
    given = {key: settings[key] for key in known}
    *_, last = trajectory(first.detach().double(), lambda _, t: gradients[t - 1].double(), len(gradients), **given)
    return last

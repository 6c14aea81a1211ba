"""Inputs and comparisons that the interpreter and the GPU tests of TED's kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.ted import Filtered, divergence, filtered_error, reference


def logits(
    rows: int, classes: int, *, size: float = 3.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [rows, classes] of standard deviation `size`."""
    source = torch.Generator().manual_seed(rows + classes)
    return tuple((size * torch.randn(rows, classes, generator=source)).to(device, dtype) for _ in range(2))


def check_divergence(
    s: Tensor, t: Tensor, keep: Tensor | None = None, *, temperature: float = 2.0, overwrite: bool = False
) -> list[Launch]:
    """Assert value and gradient against the fp64 reference, dropped rows that count nowhere, and untouched inputs."""
    before = s.clone(), t.clone()
    mine = (s.detach().clone() if overwrite else s.detach()).requires_grad_()
    exact = s.detach().double().requires_grad_()
    with launches() as seen:
        found = divergence(mine, t, temperature=temperature, keep=keep, overwrite=overwrite, backend="triton")
        (3 * found).backward()
    kept = torch.ones(len(s), dtype=torch.bool, device=s.device) if keep is None else keep
    wanted = reference.divergence(exact[kept], t.double()[kept], temperature)
    (3 * wanted).backward()
    bound = tolerance(s.dtype, seen[0].path)
    assert found.dtype == torch.float32 and found.shape == ()
    # Summed in fp32 whatever the logits' type; a small value is the difference of logarithms that are larger.
    most = tolerance(torch.float32, seen[0].path).output * max(1.0, wanted.item())
    assert abs(found.item() - wanted.item()) <= most
    assert mine.grad.dtype == s.dtype and relative_rms(mine.grad, exact.grad) <= bound.gradient
    assert not mine.grad[~kept].any() and (mine.grad.data_ptr() == mine.data_ptr()) == overwrite
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, (s, t), strict=True))
    return seen


def sides(
    rows: int, student: int, teacher: int, dim: int, pairs: int = 1, *, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[list[Filtered], list[Filtered]]:  # fmt: skip
    """`pairs` layers of widths `student` and `teacher` behind filters of width `dim`, random throughout."""
    source = torch.Generator().manual_seed(rows + student + dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(device, dtype)

    own = [Filtered(draw(rows, student), draw(dim, student) * student**-0.5, draw(dim)) for _ in range(pairs)]
    other = [Filtered(draw(rows, teacher), draw(dim, teacher) * teacher**-0.5, draw(dim)) for _ in range(pairs)]
    return own, other


def check_filtered(own: list[Filtered], other: list[Filtered], keep: Tensor | None = None) -> list[Launch]:
    """Assert values and the gradients of H_s, W_s and b_s against the fp64 reference, and untouched inputs."""
    given = [x for side in (*own, *other) for x in side]
    before = [x.clone() for x in given]
    mine = [Filtered(*(x.detach().requires_grad_() for x in side)) for side in own]
    exact = [Filtered(*(x.detach().double().requires_grad_() for x in side)) for side in own]
    weight = torch.arange(1.0, len(own) + 1, device=own[0].hidden.device)
    with launches() as seen:
        found = filtered_error(mine, other, keep, backend="triton")
        (found * weight).sum().backward()
    kept = torch.ones(len(own[0].hidden), dtype=torch.bool, device=weight.device) if keep is None else keep
    wanted = []
    for s, t in zip(exact, other, strict=True):
        z = [reference.filter_linear(side.hidden.double()[kept], *(x.double() for x in side[1:])) for side in (s, t)]
        wanted.append((z[0] - z[1]).square().mean())
    wanted = torch.stack(wanted)
    (wanted * weight).sum().backward()
    bound = tolerance(own[0].hidden.dtype, seen[0].path)
    assert found.dtype == torch.float32 and relative_rms(found, wanted) <= bound.output
    for s, e in zip(mine, exact, strict=True):
        for a, b in zip(s, e, strict=True):
            assert a.grad.dtype == a.dtype and relative_rms(a.grad, b.grad) <= bound.gradient
        assert not s.hidden.grad[~kept].any()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, given, strict=True))
    return seen

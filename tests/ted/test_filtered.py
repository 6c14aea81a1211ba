"""The distance of filtered states that are never stored: values, gradients, masks, and what does not fit."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from zq_lib.core.backend import launches
from zq_lib.ted import Filtered, filtered_error, reference


def _sides(rows: int, student: int, teacher: int, dim: int, pairs: int, dtype=torch.float64, mask: bool = True):
    source = torch.Generator().manual_seed(rows + dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(dtype)

    own = [Filtered(draw(rows, student), draw(dim, student), draw(dim)) for _ in range(pairs)]
    other = [Filtered(draw(rows, teacher), draw(dim, teacher), draw(dim)) for _ in range(pairs)]
    keep = torch.rand(rows, generator=source) > 0.3 if mask else None
    for side in own:
        for x in side:
            x.requires_grad_()
    return own, other, keep


def _plain(own, other, keep) -> Tensor:
    keep = torch.ones(len(own[0].hidden), dtype=torch.bool) if keep is None else keep
    z = [[reference.filter_linear(*side) for side in sides] for sides in (own, other)]
    return torch.stack([reference.layer_error(a[None], b[None], keep[None]) for a, b in zip(*z, strict=True)])


@pytest.fixture
def few_rows_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["zq_lib.ted.filtered"], "ROWS", 16)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("rows", "dim", "pairs"), [(1, 5, 1), (31, 40, 2), (33, 8, 12), (70, 17, 3)])
def test_values_and_gradients_are_the_references(rows, dim, pairs, mask, few_rows_at_a_time) -> None:
    own, other, keep = _sides(rows, 12, 24, dim, pairs, mask=mask and rows > 1)
    with launches() as seen:
        found = filtered_error(own, other, keep)
    assert [(x.kernel, x.path) for x in seen] == [("ted.filtered_error", "torch")]
    want = _plain(own, other, keep)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    weights = torch.arange(1.0, pairs + 1, dtype=torch.float64)
    tensors = [x for side in own for x in side]
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), tensors) for x in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_summed_in_single(dtype: torch.dtype, most: float) -> None:
    own, other, keep = _sides(70, 24, 48, 40, 2, dtype)
    exact = [[Filtered(*(x.detach().double() for x in side)) for side in sides] for sides in (own, other)]
    for side in exact[0]:
        for x in side:
            x.requires_grad_()
    found, want = filtered_error(own, other, keep), _plain(*exact, keep)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=most, atol=0)
    grads = [
        torch.autograd.grad(x.sum(), [x for side in sides for x in side])
        for x, sides in ((found, own), (want, exact[0]))
    ]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) <= most


def test_without_a_token_error_and_gradient_are_0() -> None:
    own, other, _ = _sides(6, 4, 4, 5, 2)
    found = filtered_error(own, other, torch.zeros(6, dtype=torch.bool))
    found.sum().backward()
    assert not found.any() and not any(x.grad.any() for side in own for x in side)


def test_padding_may_hold_anything() -> None:
    own, other, keep = _sides(33, 4, 6, 5, 1)
    want = filtered_error(own, other, keep)
    with torch.no_grad():
        own[0].hidden[~keep] = torch.nan
        other[0].hidden[~keep] = torch.inf
    found = filtered_error(own, other, keep)
    assert torch.equal(found, want)
    (grad,) = torch.autograd.grad(found.sum(), own[0].hidden)
    assert not grad[~keep].any() and bool(grad.isfinite().all())


def test_a_side_without_a_filter_is_the_state_itself() -> None:
    h, target = torch.randn(3, 4, 6).requires_grad_(), torch.randn(3, 4, 6)
    found = filtered_error([Filtered(h)], [Filtered(target)])
    want = (h - target).square().mean()
    torch.testing.assert_close(found[0], want)
    for a, b in zip(*(torch.autograd.grad(x, h) for x in (found[0], want)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_gets_no_gradient_and_inputs_stay_as_they_are() -> None:
    own, other, keep = _sides(9, 4, 6, 5, 2)
    for side in other:
        for x in side:
            x.requires_grad_()
    copies = [x.detach().clone() for side in (*own, *other) for x in side]
    filtered_error(own, other, keep).sum().backward()
    assert all(x.grad is None for side in other for x in side)
    assert all(torch.equal(x, c) for x, c in zip((x for side in (*own, *other) for x in side), copies, strict=True))


def test_a_frozen_filter_gets_no_gradient() -> None:
    own, other, keep = _sides(9, 4, 6, 5, 1)
    own[0].weight.requires_grad_(False)
    filtered_error(own, other, keep).sum().backward()
    assert own[0].weight.grad is None and own[0].hidden.grad.any() and own[0].bias.grad.any()


def test_what_does_not_fit_is_one_clear_sentence() -> None:
    own, other, keep = _sides(9, 4, 6, 5, 2)
    with pytest.raises(ValueError, match="2 student layers cannot be matched with 1 of the teacher"):
        filtered_error(own, other[:1])
    with pytest.raises(
        ValueError, match="pair 0: the student's filter has width 5 and the teacher's 6; train both with"
    ):
        filtered_error(own, [Filtered(t.hidden) for t in other])
    short = [t._replace(hidden=t.hidden[:8]) for t in other]
    with pytest.raises(
        ValueError, match=r"pair 0: the student's states have shape \(9, 4\) and the teacher's \(8, 6\)"
    ):
        filtered_error(own, short)
    with pytest.raises(ValueError, match=r"keep has shape \(8,\) and the states \(9, 4\)"):
        filtered_error(own, other, keep[:8])
    with pytest.raises(ValueError, match='backend is "triton" but the tensors are float64'):
        filtered_error(own, other, keep, backend="triton")

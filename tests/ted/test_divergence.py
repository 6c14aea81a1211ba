"""The chunked divergence is the plain one: values, gradients, masks, ruled out classes, time and memory."""

from __future__ import annotations

import math
import sys
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zq_lib.core.backend import launches
from zq_lib.ted import divergence, reference
from zq_lib.ted.divergence import CHUNK

PLAIN = {
    "kl": lambda s, t, temperature: reference.divergence(s, t, temperature),
    "reverse_kl": lambda s, t, temperature: reference.reverse_divergence(s, t, temperature),
    "jsd": lambda s, t, temperature: reference.jensen_shannon(s, t, temperature, 0.3),
}


def _logits(rows: int, classes: int, dtype=torch.float64, size: float = 3.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(rows * 10_000 + classes)
    return tuple((torch.randn(rows, classes, generator=source) * size).to(dtype) for _ in range(2))


@pytest.fixture
def few_rows_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["zq_lib.ted.divergence"], "CHUNK", 4000)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (31, 3), (70, 1000), (5, 5003)])
@pytest.mark.parametrize("kind", PLAIN)
def test_value_and_gradient_are_the_references(kind, rows, classes, temperature, few_rows_at_a_time) -> None:
    s, t = _logits(rows, classes)
    s.requires_grad_()
    with launches() as seen:
        found = divergence(s, t, kind=kind, temperature=temperature, beta=0.3)
    assert [(x.kernel, x.path) for x in seen] == [("ted.divergence", "torch")]
    want = PLAIN[kind](s, t, temperature)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(x, s)[0] for x in (found, want))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [3.0, 50.0])
def test_in_single_precision_it_is_the_plain_loss_to_a_millionth(size: float) -> None:
    s, t = _logits(16, 5003, torch.float32, size)
    s.requires_grad_()
    want = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4
    found = divergence(s, t)
    assert abs(float(found.detach() - want.detach())) <= 1e-6 * float(want.detach())
    a, b = (torch.autograd.grad(x, s)[0] for x in (found, want))
    assert float((a - b).norm() / b.norm()) <= 2e-6


def test_half_precision_is_summed_in_single() -> None:
    s, t = _logits(16, 5003, torch.bfloat16)
    s.requires_grad_()
    found = divergence(s, t)
    exact = s.detach().double().requires_grad_()
    want = reference.divergence(exact, t.double(), 2.0)
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    (grad,) = torch.autograd.grad(found, s)
    (exact_grad,) = torch.autograd.grad(want, exact)
    assert grad.dtype == torch.bfloat16 and float((grad.double() - exact_grad).norm() / exact_grad.norm()) <= 2e-2


@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_that_are_left_out_count_nowhere(overwrite: bool, few_rows_at_a_time) -> None:
    s, t = _logits(12, 1000)
    keep = torch.arange(12) % 3 > 0
    exact = s.clone().requires_grad_()
    want = reference.divergence(exact[keep], t[keep], 2.0)
    want.backward()
    s[~keep], t[~keep] = torch.nan, torch.nan
    s.requires_grad_()
    found = divergence(s.view(3, 4, 1000), t.view(3, 4, 1000), keep=keep.view(3, 4), overwrite=overwrite)
    torch.testing.assert_close(found, want.detach(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(found, s)
    torch.testing.assert_close(grad, exact.grad, rtol=1e-10, atol=1e-13)
    assert not grad[~keep].any() and (grad.data_ptr() == s.data_ptr()) == overwrite


@pytest.mark.parametrize("kind", PLAIN)
def test_without_any_row_the_loss_and_its_gradient_are_0(kind: str) -> None:
    s, t = _logits(4, 7)
    s.requires_grad_()
    found = divergence(s, t, kind=kind, keep=torch.zeros(4, dtype=torch.bool))
    found.backward()
    assert float(found.detach()) == 0 and not s.grad.any()


@pytest.mark.parametrize("kind", PLAIN)
def test_the_same_logits_have_no_distance_and_no_gradient(kind: str) -> None:
    s, _ = _logits(8, 1000, torch.float32)
    t = s.clone()
    s.requires_grad_()
    found = divergence(s, t, kind=kind)
    found.backward()
    assert abs(float(found.detach())) <= 1e-6 and float(s.grad.abs().max()) <= 1e-7


@pytest.mark.parametrize("kind", PLAIN)
def test_classes_that_both_rule_out_are_as_if_they_were_not_there(kind: str) -> None:
    s, t = _logits(6, 40)
    want = PLAIN[kind](s[:, 10:], t[:, 10:], 2.0)
    s[:, :10] = t[:, :10] = -math.inf
    s.requires_grad_()
    found = divergence(s, t, kind=kind, beta=0.3)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(found, s)
    assert not grad[:, :10].any() and bool(grad.isfinite().all())


def test_a_class_that_only_one_of_them_rules_out() -> None:
    s, t = _logits(3, 5)
    t[:, 0] = -math.inf
    assert math.isfinite(float(divergence(s, t)))
    s[:, 1] = -math.inf
    assert math.isinf(float(divergence(s, t))), "the student rules out what the teacher does not"
    assert math.isfinite(float(divergence(s, t, kind="jsd")))


def test_the_square_of_the_temperature_can_be_left_out() -> None:
    s, t = _logits(3, 50)
    assert float(divergence(s, t, temperature=3.0)) == pytest.approx(
        9 * float(divergence(s, t, temperature=3.0, squared=False))
    )


def test_rows_that_are_not_next_to_each_other_in_memory() -> None:
    s, t = _logits(8, 50)
    wide = torch.stack([s, t], 1)  # [8, 2, 50]
    torch.testing.assert_close(divergence(wide[:, 0], wide[:, 1]), divergence(s, t), rtol=0, atol=0)


def test_the_squared_error_is_for_heads_with_one_output() -> None:
    s, t = _logits(6, 1)
    torch.testing.assert_close(divergence(s, t, kind="mse"), F.mse_loss(s, t))
    keep = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    torch.testing.assert_close(divergence(s, t, kind="mse", keep=keep), F.mse_loss(s[keep], t[keep]))
    with pytest.raises(ValueError, match="kind='kl' of one output is always 0, whatever it says; use kind='mse'"):
        divergence(s, t)


def test_bad_input_is_one_clear_sentence() -> None:
    s, t = _logits(6, 10)
    with pytest.raises(
        ValueError, match=r"student's logits have shape \(6, 10\) and the teacher's \(6, 9\); give both"
    ):
        divergence(s, t[:, :9])
    with pytest.raises(ValueError, match=r"keep has shape \(5,\) and the logits \(6, 10\)"):
        divergence(s, t, keep=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend is \"triton\" but kind is 'jsd'"):
        divergence(s, t, kind="jsd", backend="triton")


def test_the_teacher_gets_no_gradient_and_inputs_stay_as_they_are() -> None:
    s, t = (x.requires_grad_() for x in _logits(6, 10))
    copies = s.detach().clone(), t.detach().clone()
    found = divergence(s, t)
    found.backward()
    assert t.grad is None and torch.equal(s, copies[0]) and torch.equal(t, copies[1])
    again = divergence(s, t)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient was used already"):
        again.backward()


class _Largest(TorchDispatchMode):
    """The largest sum of memory that tensors made inside, and alive at the same time, have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.seen[storage._cdata] = (weakref.ref(t), storage.nbytes())
        self.seen = {k: v for k, v in self.seen.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return out


@pytest.mark.parametrize(("overwrite", "most"), [(False, 3.1), (True, 2.1)])
def test_memory_is_the_logits_their_gradient_and_a_chunk(overwrite: bool, most: float) -> None:
    """Both logits are 2 of it. Plain torch needs 7; what does not belong to the gradient must not grow with rows."""
    for rows in (512, 1024):
        s, t = _logits(rows, 32_000, torch.float32)
        s.requires_grad_()
        with _Largest() as memory:
            divergence(s, t, overwrite=overwrite).backward()
        assert memory.peak <= most * s.nbytes + 6 * 4 * CHUNK
    with _Largest() as memory, torch.no_grad():
        divergence(s, t)
    assert memory.peak <= 2 * s.nbytes + 6 * 4 * CHUNK
    s = s.detach().requires_grad_()
    with _Largest() as memory:
        F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean").backward()
    assert memory.peak >= 5 * s.nbytes, "the measure sees what plain torch needs"


def test_logits_that_someone_else_needs_cannot_be_overwritten_in_silence() -> None:
    hidden, t = _logits(4, 20)
    logits = hidden.requires_grad_() * 1.0
    total = logits.square().sum() + divergence(logits, t, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_it_takes_at_most_six_tenths_of_the_plain_loss_time() -> None:
    s, t = _logits(256, 49_152, torch.float32)
    s.requires_grad_()

    def plain() -> Tensor:
        return F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4

    def spent(loss) -> float:
        s.grad = None
        start = time.process_time()
        loss().backward()
        return time.process_time() - start

    times = [(spent(lambda: divergence(s, t)), spent(plain)) for _ in range(3)]
    assert min(a for a, _ in times) <= 0.6 * min(b for _, b in times)

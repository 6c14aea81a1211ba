"""The reference against torch's own functions, hand-made gradients, and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zq_lib.ted import reference as ref


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_layer_maps_worked_out_by_hand() -> None:
    assert ref.uniform(3, 6, 3) == [(1, 2), (2, 4), (3, 6)]
    assert ref.uniform(2, 5, 2) == [(1, 3), (2, 5)]
    assert ref.uniform(4, 4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert ref.uniform(12, 12, 4) == [(3, 3), (6, 6), (9, 9), (12, 12)]
    assert ref.interval(6, 12, 6) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
    for student in range(1, 8):
        for teacher in range(student, 14):
            pairs = ref.uniform(student, teacher, student)
            assert [s for s, _ in pairs] == list(range(1, student + 1)) and pairs[-1] == (student, teacher)
            assert len({t for _, t in pairs}) == student


def test_the_divergence_is_torchs_and_its_gradient_the_formula() -> None:
    s, t = _draw(5, 11).requires_grad_(), _draw(5, 11)
    found = ref.divergence(s, t, 2.0)
    want = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4
    assert float((found - want).detach().abs()) < 1e-14
    (grad,) = torch.autograd.grad(found, s)
    torch.testing.assert_close(grad, ref.divergence_gradient(s.detach(), t, 2.0), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: ref.jensen_shannon(x, t, 1.5, 0.3), (s,))
    assert torch.autograd.gradcheck(lambda x: ref.reverse_divergence(x, t, 1.5), (s,))


def test_a_divergence_worked_out_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(ref.divergence(student, teacher, 1.0)) == pytest.approx(want, abs=1e-15)
    assert float(ref.divergence(torch.zeros(3, 1), torch.ones(3, 1), 2.0)) == 0, "one class has nothing to learn"


def test_the_divergence_of_jensen_and_shannon_lies_below_both_and_is_symmetric_at_one_half() -> None:
    s, t = _draw(4, 6), _draw(4, 6)
    half = ref.jensen_shannon(s, t, 1.0, 0.5)
    assert float(half - ref.jensen_shannon(t, s, 1.0, 0.5)) == pytest.approx(0, abs=1e-15)
    assert half < ref.divergence(s, t, 1.0) and half < ref.reverse_divergence(s, t, 1.0) and half <= math.log(2)


def test_the_gradients_of_a_pair_by_hand_are_autograds() -> None:
    h_s, w_s, b_s = (x.requires_grad_() for x in (_draw(7, 4), _draw(5, 4), _draw(5)))
    h_t, w_t, b_t = _draw(7, 6), _draw(5, 6), _draw(5)
    mask = torch.ones(1, 7)
    z_s, z_t = ref.filter_linear(h_s, w_s, b_s), ref.filter_linear(h_t, w_t, b_t)
    found = torch.autograd.grad(ref.layer_error(z_s[None], z_t[None], mask), (h_s, w_s, b_s))
    want = ref.layer_error_gradients(h_s, h_t, w_s, b_s, w_t, b_t)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_padding_counts_nowhere() -> None:
    s, t, mask = _draw(3, 5, 4), _draw(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    want, scale = ref.layer_error(s, t, mask), ref.variance(t, mask)
    s[mask == 0], t[mask == 0] = 1e6, -1e6
    assert ref.layer_error(s, t, mask) == want and ref.variance(t, mask) == scale
    assert torch.equal(ref.pool(s, mask, "first")[2], s[2, 3]) and torch.equal(ref.pool(s, mask, "last")[1], s[1, 1])
    torch.testing.assert_close(ref.pool(s, mask, "mean")[1], s[1, :2].mean(0))


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    h, w, b, logits = _draw(1, 7, 4).requires_grad_(), _draw(5, 4), _draw(5), _draw(3, 9).requires_grad_()
    z = ref.filter_linear(h, w, b)
    total = ref.stage_two(torch.zeros(()), ref.divergence(logits, logits.detach(), 2.0),
                          [ref.layer_error(z, z.detach(), torch.ones(1, 7))], 3.0, 5.0)  # fmt: skip
    grads = torch.autograd.grad(total, (h, logits))
    assert abs(float(total.detach())) < 1e-15 and all(float(g.abs().max()) < 1e-15 for g in grads)


def test_the_stages_add_up_as_printed() -> None:
    parts = torch.tensor([1.0, 2.0, 4.0])
    assert ref.stage_one(list(parts)) == parts.mean()
    assert ref.stage_two(parts[0], parts[1], [parts[2], parts[0]], 10.0, 100.0) == 1 + 20 + 250


def test_an_mlp_filter_is_its_layers_in_turn() -> None:
    h, inner, weight = _draw(2, 3, 4), torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 6).double()
    found = ref.filter_mlp(h, inner.weight, inner.bias, weight.weight, weight.bias, torch.tanh)
    torch.testing.assert_close(found, weight(torch.tanh(inner(h))), rtol=0, atol=1e-14)

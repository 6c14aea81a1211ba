"""The reference by hand, its identities, and that the bias before the softmax is the paper's reweighting after it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zq_lib.pasta.reference import (
    alpha_for_share,
    bias_from_marks,
    biased_attention,
    reweight,
    steered_share,
    two_part,
    visible_keys,
)

B, H, G, T, D = 2, 6, 2, 9, 8


def _case(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the unmarked keys of a causal prompt; row 0 marks keys 2 to 4, row 1 keys 5 and 6."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, T, D, generator=generator, dtype=torch.float64).to(dtype) for n in (H, G, G))
    unmarked = torch.ones(B, T, dtype=torch.bool)
    unmarked[0, 2:5], unmarked[1, 5:7] = False, False
    return q, k, v, unmarked


def _attention(q: Tensor, k: Tensor, v: Tensor, unmarked: Tensor, alpha: float, gate: Tensor | None = None, **more):
    gate = torch.ones(1, H, dtype=q.dtype) if gate is None else gate
    return biased_attention(q, k, v, gate=gate, beta=bias_from_marks(unmarked, alpha, q.dtype), **more)


def test_two_tokens_by_hand() -> None:
    """Probabilities (3/4, 1/4), first token unmarked, alpha 1/3: 1/4 and 1/4, so one half each."""
    probs = torch.tensor([[[[0.75, 0.25], [0.5, 0.5]]]], dtype=torch.float64)
    unmarked = torch.tensor([[True, False]])
    steered = reweight(probs, unmarked, 1 / 3)
    expected = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]], dtype=torch.float64)
    assert torch.allclose(steered, expected, atol=1e-15)


def test_attention_over_two_tokens_by_hand() -> None:
    """Scores log 3 and 0 give the probabilities above; values 10 and 20 then give 15 instead of 12.5."""
    q = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[math.log(3)], [0.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[10.0], [20.0]]]], dtype=torch.float64)
    beta = bias_from_marks(torch.tensor([[True, False]]), 1 / 3)
    for gate, expected in ((1.0, 15.0), (0.0, 12.5)):
        out, _ = biased_attention(q, k, v, gate=torch.full((1, 1), gate).double(), beta=beta)
        assert out.item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("alpha", [0.5, 0.01, 1e-8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_the_bias_before_the_softmax_is_the_reweighting_after_it(
    alpha: float, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v, unmarked = _case(dtype)
    _, plain = _attention(q, k, v, unmarked, 1.0)
    _, biased = _attention(q, k, v, unmarked, alpha)
    assert (biased - reweight(plain, unmarked, alpha)).abs().max() < tolerance


def test_the_log_odds_of_the_marked_share_shift_by_minus_log_alpha_in_every_row_and_head() -> None:
    q, k, v, unmarked = _case()
    _, before = _attention(q, k, v, unmarked, 1.0)
    _, after = _attention(q, k, v, unmarked, 0.01)
    m, moved = ((p * ~unmarked[:, None, None]).sum(-1)[:, :, 7:] for p in (before, after))  # rows that see both parts
    assert torch.allclose(moved.logit() - m.logit(), torch.tensor(4.605170185988091).double(), atol=1e-10)
    assert torch.allclose(moved, steered_share(m, 0.01), atol=1e-14)


def test_the_alpha_for_a_share_reaches_that_share() -> None:
    share = torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)
    for target in (0.1, 0.5, 0.99):
        alpha = alpha_for_share(share, target)
        assert torch.allclose(steered_share(share, alpha), torch.full_like(share, target), atol=1e-14)


def test_ratios_inside_each_part_do_not_change() -> None:
    q, k, v, unmarked = _case()
    _, before = _attention(q, k, v, unmarked, 1.0)
    _, after = _attention(q, k, v, unmarked, 0.01)
    for part in ([2, 3, 4], [0, 1, 5, 6, 7, 8]):
        a, b = before[0, :, 8, part], after[0, :, 8, part]
        assert torch.allclose(a / a[:, :1], b / b[:, :1], rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.01, 1e-8])
def test_two_partial_outputs_give_every_alpha(alpha: float) -> None:
    q, k, v, unmarked = _case()
    out, _ = _attention(q, k, v, unmarked, alpha)
    _, probs = _attention(q, k, v, unmarked, 1.0)
    values = v.repeat_interleave(H // G, 1)
    marks = (~unmarked)[:, None, None]
    share = (probs * marks).sum(-1, keepdim=True)
    marked = (probs * marks) @ values / share
    rest = (probs * ~marks) @ values / (1 - share)
    both = slice(7, None)  # rows that see both parts
    combined = two_part(marked, rest, share, alpha)
    assert torch.allclose(combined[:, :, both], out[:, :, both], atol=1e-12)


def test_rows_that_see_no_marked_key_are_unchanged() -> None:
    q, k, v, unmarked = _case()
    plain, _ = _attention(q, k, v, unmarked, 1.0)
    steered, _ = _attention(q, k, v, unmarked, 0.01)
    for b, first in ((0, 2), (1, 5)):
        assert torch.allclose(steered[b, :, :first], plain[b, :, :first], atol=1e-14)
        assert not torch.allclose(steered[b, :, first:], plain[b, :, first:], atol=1e-3)


def test_alpha_one_no_gate_and_no_row_change_nothing_bit_for_bit() -> None:
    q, k, v, unmarked = _case()
    gate, beta = torch.ones(1, H).double(), bias_from_marks(unmarked, 0.01)
    plain, _ = biased_attention(q, k, v, gate=gate, beta=torch.zeros_like(beta))
    assert torch.equal(_attention(q, k, v, unmarked, 1.0)[0], plain)
    assert torch.equal(biased_attention(q, k, v, gate=0 * gate, beta=beta)[0], plain)
    assert torch.equal(biased_attention(q, k, v, gate=gate, beta=beta, rows=torch.zeros(B, T).double())[0], plain)


def test_a_tiny_alpha_tends_to_hiding_the_unmarked_tokens() -> None:
    q, k, v, unmarked = _case()
    steered, _ = _attention(q, k, v, unmarked, 1e-8)
    hidden = visible_keys(T, T, None, True) & ~unmarked[:, None, None]
    masked, _ = biased_attention(q, k, v, gate=torch.zeros(1, H).double(), beta=torch.zeros(B, T).double(), mask=hidden)
    assert torch.allclose(steered[:, :, 7:], masked[:, :, 7:], atol=1e-4)


def test_only_the_gated_heads_change_and_each_batch_row_may_have_its_own() -> None:
    q, k, v, unmarked = _case()
    plain, _ = _attention(q, k, v, unmarked, 1.0)
    gate = torch.zeros(B, H).double()
    gate[0, 1] = gate[1, 4] = 1.0
    steered, _ = _attention(q, k, v, unmarked, 0.01, gate)
    changed = (steered - plain).abs().amax((2, 3)) > 1e-6
    assert torch.equal(changed, gate.bool())


def test_a_group_of_heads_shares_its_keys() -> None:
    q, k, v, unmarked = _case()
    wide = [x.repeat_interleave(H // G, 1) for x in (k, v)]
    assert torch.equal(_attention(q, k, v, unmarked, 0.01)[0], _attention(q, *wide, unmarked, 0.01)[0])


def test_the_last_query_alone_equals_the_last_row() -> None:
    q, k, v, unmarked = _case()
    whole, _ = _attention(q, k, v, unmarked, 0.01)
    last, _ = _attention(q[:, :, -1:], k, v, unmarked, 0.01)
    assert torch.allclose(last[:, :, 0], whole[:, :, -1], atol=1e-14)


def test_a_row_that_sees_nothing_is_zero_and_has_a_finite_gradient() -> None:
    q, k, v, unmarked = _case()
    q.requires_grad_()
    mask = visible_keys(T, T, None, True).expand(B, -1, -1, -1).clone()
    mask[0, :, 3] = False
    out, probs = _attention(q, k, v, unmarked, 0.01, mask=mask)
    assert not out[0, :, 3].any() and not probs[0, :, 3].any()
    out.sum().backward()
    assert q.grad.isfinite().all() and not q.grad[0, :, 3].any()


def test_without_causality_every_key_is_visible() -> None:
    q, k, v, unmarked = _case()
    _, probs = _attention(q, k, v, unmarked, 0.5, causal=False)
    assert (probs > 0).all()
    assert visible_keys(2, 5, None, True)[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_every_input_is_differentiable() -> None:
    q, k, v, unmarked = _case()
    q, k, v = (x[:1, :2, :4].clone().requires_grad_() for x in (q, k, v))
    gate = torch.full((1, 2), 0.7, dtype=torch.float64, requires_grad=True)
    beta = bias_from_marks(unmarked[:1, :4], 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, gate, beta: biased_attention(q, k, v, gate=gate, beta=beta), (q, k, v, gate, beta)
    )

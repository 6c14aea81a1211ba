"""The reference: hand-worked masks, limits in which it must equal full attention, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zq_lib.masformer.reference import masked_attention, positions, span_attention, visible


def rows(*args, **named):
    """The mask's rows as strings of 0 and 1."""
    return ["".join(str(int(x)) for x in row) for row in visible(*args, **named)[0, 0]]


def test_masks_are_those_worked_out_by_hand():
    assert rows(5, 5, None) == ["10000", "11000", "11100", "11110", "11111"]
    assert rows(5, 5, 2) == ["10000", "11000", "01100", "00110", "00011"]
    assert rows(5, 5, 2, "block") == ["10000", "11000", "00100", "00110", "00001"]
    assert rows(5, 5, 2, "two_block") == ["10000", "11000", "11100", "11110", "00111"]
    assert rows(5, 5, 2, "window", 1) == ["10000", "11000", "11100", "10110", "10011"]
    assert rows(5, 5, 2, "block", 3) == ["10000", "11000", "11100", "11110", "11101"]


def test_later_queries_are_the_last_rows():
    assert rows(2, 5, 2) == rows(5, 5, 2)[3:]


def test_padding_is_no_part_of_the_text():
    padding = torch.tensor([[False, False, True, True, True]])
    assert positions(5, padding).tolist() == [[-1, -1, 0, 1, 2]]
    assert rows(5, 5, 2, "block", padding=padding) == ["00000", "00000", "00100", "00110", "00001"]
    holes = torch.tensor([[True, True, False, True, True]])
    assert rows(5, 5, 2, padding=holes) == ["10000", "11000", "00000", "01010", "00011"]


def test_positions_tell_which_keys_a_cache_has_dropped():
    assert rows(2, 5, 3, "window", 1, position=torch.tensor([0, 6, 7, 8, 9])) == ["11110", "10111"]
    assert rows(1, 4, 4, "block", position=torch.tensor([6, 7, 8, 9])) == ["0011"]


def test_each_head_may_have_a_span():
    mask = visible(6, 6, (1, 3, None))
    assert mask.shape == (1, 3, 6, 6) and mask.sum((0, 2, 3)).tolist() == [6, 15, 21]


def test_a_span_over_the_whole_text_is_full_attention_and_a_window_of_one_returns_the_values():
    q, k, v = (
        torch.randn(2, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
    )
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(span_attention(q, k, v, 7), full)
    assert torch.equal(span_attention(q, k, v, 1), v)


def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = visible(4, 4, None, padding=torch.tensor([[False, False, True, True]]))
    out, probs = masked_attention(q, k, v, mask)
    assert (out[:, :, :2] == 0).all() and (probs[:, :, :2] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() and (x.grad[:, :, :2] == 0).all() for x in (q, k, v))


def test_the_reference_is_differentiable_as_written():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: span_attention(*x, 2, "window", 1, softcap=2.0), (q, k, v))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='ring'"):
        visible(3, 3, 2, "ring")

"""Rung 1: PASTA's kernels against the fp64 reference, outputs and gradients, in the interpreter at toy size."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import case, causal_mask, check

from zq_lib.core.backend import interpreting, last_launch
from zq_lib.pasta import kernels, kernels_common
from zq_lib.pasta.kernels import flash_attention, supports

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not interpreting(), reason="a GPU is here: test_gpu.py runs these cases at full size"),
]
TRAINING = ["pasta.forward", "pasta.backward_queries", "pasta.backward_keys"]


@pytest.mark.parametrize("T", [2, 16, 17, 31])
def test_sizes_that_are_tiny_a_block_a_block_plus_one_and_prime_agree(T):
    seen = check(case(T=T, marked=(1, 2)))
    assert [launch.kernel for launch in seen] == TRAINING
    assert all(launch.path == "interpreter" for launch in seen)


@pytest.mark.parametrize(("H", "G"), [(2, 2), (3, 1), (4, 1)])
def test_groups_of_one_three_and_four_heads_agree(H, G):
    check(case(H=H, G=G, T=19))


def test_two_rows_of_a_batch_with_two_groups_each_agree():
    setup = case(B=2, H=4, G=2, T=18)
    setup.beta[1] = 0.5  # another row, another bias
    setup.gate[1] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    check(setup)


def test_a_chunk_of_queries_at_the_end_of_a_longer_context_agrees():
    check(case(T=17, S=33))


def test_more_queries_than_keys_leave_the_first_ones_blind():
    check(case(T=20, S=6, marked=(1, 3)))


def test_attention_without_a_causal_order_agrees():
    check(case(T=17, S=20, causal=False))


@pytest.mark.parametrize("D", [8, 24])
def test_head_widths_that_are_no_power_of_two_or_below_a_tile_agree(D):
    check(case(T=18, D=D))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_tolerance(dtype):
    check(case(T=19, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_twice_as_far_off_as_plain_torch(dtype):
    from zq_lib.core.numerics import relative_rms
    from zq_lib.pasta.reference import biased_attention

    setup = case(T=33, dtype=dtype)
    named = dict(gate=setup.gate, beta=setup.beta)
    truth = biased_attention(setup.q.double(), setup.k.double(), setup.v.double(), **named)[0]
    plain = biased_attention(setup.q, setup.k, setup.v, gate=setup.gate.to(dtype), beta=setup.beta.to(dtype))[0]
    out, _ = flash_attention(setup.q, setup.k, setup.v, **named)
    assert relative_rms(out.transpose(1, 2), truth) <= 2 * relative_rms(plain, truth)


@pytest.mark.parametrize("marked", [(0, 3), (33, 36), (14, 35)])
def test_a_marked_span_in_the_first_the_last_and_several_blocks_agrees(marked):
    check(case(T=36, marked=marked), gradients=False)


def test_hard_masking_with_alpha_1e_8_agrees():
    check(case(T=20, alpha=1e-8))


def test_rows_that_take_no_bias_are_left_alone():
    setup = case(T=36)
    rows = (torch.arange(36) >= 20)[None]  # a whole block without, one with both, one with
    check(setup.but(rows=rows))
    unsteered = flash_attention(setup.q, setup.k, setup.v, gate=torch.zeros(1, 2), beta=setup.beta)[0]
    steered = flash_attention(setup.q, setup.k, setup.v, gate=setup.gate, beta=setup.beta, rows=rows)[0]
    assert torch.equal(steered[:, :20], unsteered[:, :20])
    assert not torch.equal(steered[:, 20:], unsteered[:, 20:])


def test_rows_may_be_boolean_or_numbers_and_gate_and_beta_may_be_shared_by_the_batch():
    setup = case(B=2, T=18)
    rows = torch.rand(1, 18, generator=torch.Generator().manual_seed(2)) < 0.5
    named = dict(gate=setup.gate[:1], beta=setup.beta[:1])
    boolean = flash_attention(setup.q, setup.k, setup.v, rows=rows, **named)[0]
    number = flash_attention(setup.q, setup.k, setup.v, rows=rows.float().expand(2, -1), **named)[0]
    assert torch.equal(boolean, number)


@pytest.mark.parametrize("T", [1, 33])
def test_all_gates_zero_equal_the_kernel_without_a_bias_bit_for_bit(T):
    setup = case(T=T, S=33)
    none = torch.zeros_like(setup.beta)
    off, off_lse = flash_attention(setup.q, setup.k, setup.v, gate=torch.zeros(1, 2), beta=setup.beta)
    plain, plain_lse = flash_attention(setup.q, setup.k, setup.v, gate=setup.gate, beta=none)
    assert torch.equal(off, plain) and torch.equal(off_lse, plain_lse)


def test_an_unsteered_head_reads_no_bias_at_all():
    setup = case(T=20)
    poison = torch.full_like(setup.beta, float("nan"))
    out, _ = flash_attention(setup.q, setup.k, setup.v, gate=torch.zeros(1, 2), beta=poison)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "mask",
    [
        causal_mask(20, 20, left=5),
        causal_mask(20, 20, right=4),
        causal_mask(36, 36, window=7),
        causal_mask(18, 34, left=3, window=17),
        torch.rand(1, 1, 18, 23, generator=torch.Generator().manual_seed(3)) < 0.3,
    ],
    ids=["left padding", "right padding", "window", "chunk, padding and window", "any pattern"],
)
def test_masks_agree(mask):
    check(case(T=mask.shape[2], S=mask.shape[3], marked=(6, 8)).but(mask=mask))


def test_a_mask_of_its_own_for_each_row_of_the_batch_agrees():
    mask = torch.cat([causal_mask(18, 18, left=4), causal_mask(18, 18, right=3)])
    check(case(B=2, T=18).but(mask=mask))


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    mask = causal_mask(20, 20)
    mask[..., 3, :] = False
    mask[..., 16:, :] = False  # a whole block of queries
    setup = case(T=20).but(mask=mask)
    check(setup)
    out, lse = flash_attention(setup.q, setup.k, setup.v, gate=setup.gate, beta=setup.beta, mask=mask)
    assert (out[:, [3, 16, 19]] == 0).all() and (lse[:, :, [3, 16, 19]] == -torch.inf).all()


def test_the_mask_is_searched_only_where_it_shows_something():
    blocks = kernels_common.spans(causal_mask(40, 40, window=8), 2, 16)
    assert blocks.tolist() == [[[0, 16], [9, 32], [25, 40]]]
    assert kernels_common.spans(causal_mask(40, 40, window=8), 3, 16).tolist() == [[[0, 23], [16, 39], [32, 40]]]
    assert kernels_common.spans(torch.zeros(1, 1, 4, 8, dtype=torch.bool), 2, 16).tolist() == [[[0, 0]]]


@pytest.mark.parametrize(("H", "G"), [(2, 2), (3, 1)])
def test_one_query_runs_the_split_key_kernels_and_agrees(H, G):
    seen = check(case(B=1, H=H, G=G, T=1, S=53), gradients=False)
    assert [launch.kernel for launch in seen] == ["pasta.decode", "pasta.merge"]
    assert seen[0].grid == (4 * G,)  # four slices of the keys
    assert last_launch().kernel == "pasta.merge"


def test_one_query_has_gradients_too():
    seen = check(case(H=2, G=1, T=1, S=37))
    assert [launch.kernel for launch in seen] == ["pasta.decode", "pasta.merge", *TRAINING[1:]]


@pytest.mark.parametrize("rows", [None, torch.zeros(1, 1), torch.ones(1, 1)])
def test_one_query_obeys_the_row_rule_and_a_mask(rows):
    mask = causal_mask(1, 40, left=18)  # the first slice shows nothing
    check(case(H=3, G=1, T=1, S=40).but(mask=mask, rows=rows), gradients=False)
    check(case(H=3, G=1, T=1, S=40).but(mask=torch.zeros_like(mask), rows=rows), gradients=False)


def test_one_query_and_one_key_give_that_value():
    setup = case(T=1, S=1)
    out, _ = flash_attention(setup.q, setup.k, setup.v, gate=setup.gate, beta=setup.beta)
    torch.testing.assert_close(out, setup.v.expand(1, 2, 1, 16).transpose(1, 2))


def test_inputs_that_are_not_contiguous_agree():
    setup = case(T=18)
    side = torch.randn(1, 18, 2, 48)
    q = side[..., 16:32].transpose(1, 2)  # a slice of a joint projection, as many models give
    k = torch.randn(1, 1, 16, 18).transpose(2, 3)  # the last dimension is not dense
    v = torch.randn(1, 1, 16, 36).transpose(2, 3)[:, :, ::2]
    assert not any(x.is_contiguous() for x in (q, k, v))
    check(setup.but(q=q, k=k, v=v))


def test_a_gradient_that_is_not_contiguous_is_read_correctly():
    setup = case(T=18)
    q = setup.q.requires_grad_()
    flash_attention(q, setup.k, setup.v, gate=setup.gate, beta=setup.beta)[0].sum().backward()  # an expanded scalar
    expanded, q.grad = q.grad, None
    out = flash_attention(q, setup.k, setup.v, gate=setup.gate, beta=setup.beta)[0]
    out.backward(torch.ones_like(out))
    assert torch.equal(expanded, q.grad)


def test_gate_gradients_exist_where_the_gate_is_zero():
    setup = case(T=20)
    check(setup.but(gate=torch.zeros(1, 2)))


def test_runs_repeat_bit_for_bit():
    setup = case(T=18)

    def gradients():
        inputs = [x.clone().requires_grad_() for x in (setup.q, setup.k, setup.v, setup.gate, setup.beta)]
        flash_attention(*inputs[:3], gate=inputs[3], beta=inputs[4])[0].square().sum().backward()
        return [x.grad for x in inputs]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_the_scale_is_an_argument():
    setup = case(T=18)
    named = dict(gate=setup.gate, beta=setup.beta)
    double = flash_attention(2 * setup.q, setup.k, setup.v, **named)[0]
    assert torch.allclose(double, flash_attention(setup.q, setup.k, setup.v, scale=2 / math.sqrt(16), **named)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.but(q=c.q.double()), "float64"),
        (lambda c: c.but(k=c.k.half()), "float16"),
        (lambda c: c.but(k=c.k[:, :, :5]), "are not"),
        (lambda c: c.but(q=c.q[:, :0]), "empty"),
        (lambda c: c.but(mask=torch.zeros(1, 1, 20, 20)), "not bool"),
        (lambda c: c.but(mask=torch.ones(1, 2, 20, 20, dtype=torch.bool)), "[1, 1, 20, 20]".replace("[1", "[1 or 1")),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(change, said):
    setup = change(case(T=20))
    able, why = supports(setup.q, setup.k, setup.v, setup.mask)
    assert not able and said in why
    with pytest.raises(ValueError, match="use biased_attention"):
        flash_attention(setup.q, setup.k, setup.v, gate=setup.gate, beta=setup.beta, mask=setup.mask)


def test_a_head_wider_than_256_is_refused():
    wide = torch.zeros(1, 1, 2, 257)
    assert supports(wide, wide, wide)[1].startswith("the head width 257")


def test_the_launch_table_covers_every_kernel_type_and_width(monkeypatch):
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    for kernel in ("forward", "decode", "queries", "keys"):
        for dtype in kernels.DTYPES:
            for width in (1, 16, 64, 80, 128, 256):
                assert kernels.settings(kernel, dtype, width).n >= 16


def test_amd_gets_one_stage(monkeypatch):
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.settings("forward", torch.bfloat16, 64).stages == 1

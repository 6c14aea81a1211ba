"""The torch path of local attention against the fp64 reference, and what it costs."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.nn.functional as F

from zq_lib.core.backend import last_launch
from zq_lib.core.numerics import relative_rms
from zq_lib.masformer import local, local_attention
from zq_lib.masformer.reference import span_attention

SPANS = [("window", 9), ("window", 100), ("block", 16), ("block", 7), ("two_block", 12)]


def tensors(T, S=None, *, B=1, H=2, G=2, D=8, dtype=torch.float64, grad=False):
    source = torch.Generator().manual_seed(0)
    shapes = ((H, T), (G, S or T), (G, S or T))
    return tuple(torch.randn(B, n, t, D, generator=source, dtype=dtype).requires_grad_(grad) for n, t in shapes)


def check(q, k, v, **named):
    """Output and gradients against the reference in fp64."""
    out, wanted = (f(q, k, v, **named) for f in (local_attention, span_attention))
    assert torch.allclose(out, wanted, rtol=0, atol=1e-12)
    if q.requires_grad and out.requires_grad:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        pairs = zip(*(torch.autograd.grad(x, (q, k, v), weight) for x in (out, wanted)), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in pairs)


@pytest.mark.parametrize("sinks", [0, 4, 70])
@pytest.mark.parametrize(("kind", "span"), SPANS)
def test_output_and_gradients_agree_over_many_chunks(kind, span, sinks):
    check(*tensors(400, grad=True), span=span, kind=kind, sinks=sinks)
    assert last_launch().kernel == "masformer.local" and last_launch().path == "torch"


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_of_shapes_spans_and_padding_agrees(monkeypatch, seed):
    monkeypatch.setattr(local, "LEAST_CHUNK", 8)
    draw = random.Random(seed)
    B, G, S = draw.choice([1, 3]), draw.choice([1, 2]), draw.choice([1, 2, 7, 33, 64, 100])
    H, T = G * draw.choice([1, 3]), draw.choice([S, 1, max(1, S // 2)])
    span = draw.choice([1, 2, 5, 8, 16, 200, None, tuple(draw.choice([1, 3, 8, None]) for _ in range(H))])
    padding = torch.ones(B, S, dtype=torch.bool)
    how = draw.choice(["none", "left", "right", "holes"])
    for row in padding:
        cut = draw.randint(0, S)
        if how == "left":
            row[:cut] = False
        elif how == "right":
            row[cut:] = False
        elif how == "holes":
            row[:] = torch.rand(S, generator=torch.Generator().manual_seed(seed)) < 0.6
    named = dict(kind=draw.choice(local.KINDS), sinks=draw.choice([0, 1, 4, 20]), softcap=draw.choice([None, 5.0]))
    check(*tensors(T, S, B=B, H=H, G=G, grad=True), span=span, padding=padding, **named)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(("kind", "span"), SPANS)
def test_a_text_in_pieces_with_dropped_keys_equals_the_whole(kind, span, sinks):
    q, k, v = tensors(300)
    whole = local_attention(q, k, v, span=span, kind=kind, sinks=sinks)
    reach, done, parts = span * (2 if kind == "two_block" else 1), 0, []
    for size in (150, 1, 1, 80, 40, 28):
        stop = done + size
        kept = [*range(min(sinks, done)), *range(max(sinks, done - reach + 1), done), *range(done, stop)]
        kept = sorted(set(kept))
        parts.append(
            local_attention(
                q[:, :, done:stop], k[:, :, kept], v[:, :, kept], span=span, kind=kind, sinks=sinks,
                position=torch.tensor(kept),
            )
        )  # fmt: skip
        done = stop
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)


def test_positions_may_differ_between_padded_rows():
    q, k, v = tensors(4, 12, B=2)
    position = torch.tensor([[0, 1, *range(20, 30)], [0, 1, -1, -1, *range(10, 18)]])
    padding = position >= 0
    check(q, k, v, span=5, kind="window", sinks=2, position=position, padding=padding)


def test_rows_of_padding_are_zero_and_never_nan():
    q, k, v = tensors(40, B=2, grad=True)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :25], padding[1] = False, False
    out = local_attention(q, k, v, span=8, padding=padding)
    assert (out[0, :, :25] == 0).all() and (out[1] == 0).all() and (out[0, :, 25:] != 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() and (x.grad[1] == 0).all() for x in (q, k, v))


def test_a_span_over_the_whole_text_equals_full_attention_bit_for_bit():
    q, k, v = tensors(200, dtype=torch.float32)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for kind in local.KINDS:
        assert torch.equal(local_attention(q, k, v, span=200, kind=kind), full)
    assert torch.equal(local_attention(q, k, v, span=None), full)


def test_single_precision_stays_within_1e_5_of_double():
    q, k, v = tensors(1000, D=64, dtype=torch.float32)
    for kind, span in (("window", 128), ("block", 128)):
        wanted = span_attention(q.double(), k.double(), v.double(), span, kind)
        assert float((local_attention(q, k, v, span=span, kind=kind) - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    q, k, v = (x.to(dtype) for x in tensors(300, B=1))
    out = local_attention(q, k, v, span=32, sinks=4)
    assert out.dtype == dtype
    assert relative_rms(out, span_attention(q.double(), k.double(), v.double(), 32, sinks=4)) <= 1e-2


def test_a_changed_token_changes_nothing_outside_its_span():
    q, k, v = tensors(300)
    before = local_attention(q, k, v, span=20, sinks=3)
    k[:, :, 100] += 1
    v[:, :, 100] += 1
    changed = (local_attention(q, k, v, span=20, sinks=3) != before).any(-1)[0].any(0)
    assert changed.nonzero().flatten().tolist() == [*range(100, 120)]


def test_inputs_are_left_as_they_were():
    inputs = tensors(100, H=4)
    before = [x.clone() for x in inputs]
    local_attention(*inputs, span=(3, 8, None, 8), sinks=2)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("kind", "most"), [("window", 2.6), ("block", 0.6)])
def test_score_entries_that_are_computed_grow_with_the_text_and_not_with_its_square(monkeypatch, kind, most):
    """Counted at the one place that multiplies queries and keys; in units of T w."""
    work = []
    attend = local._attend

    def counted(query, key, value, mask, causal, rule):
        pairs = query.shape[:-1].numel() * key.shape[-2]
        work.append(pairs / 2 if causal else pairs)
        return attend(query, key, value, mask, causal, rule)

    monkeypatch.setattr(local, "_attend", counted)
    for T in (2048, 8192):
        work.clear()
        local_attention(*tensors(T, H=1, G=1, dtype=torch.float32), span=256, kind=kind)
        assert sum(work) <= most * T * 256


def test_local_attention_is_several_times_faster_than_full_attention():
    """A quarter of the speed-ups that are measured at 8k tokens: this runs beside other tests."""
    inputs = tensors(4096, H=4, G=4, D=64, dtype=torch.float32, grad=True)

    def seconds(call):
        taken = []
        for _ in range(3):
            start = time.process_time()
            call(*inputs).sum().backward()
            taken.append(time.process_time() - start)
        return min(taken)

    full = seconds(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert seconds(lambda q, k, v: local_attention(q, k, v, span=256)) < full / 1.5
    assert seconds(lambda q, k, v: local_attention(q, k, v, span=256, kind="block")) < full / 2.5


@pytest.mark.parametrize(
    ("named", "words"),
    [(dict(span=0), "span=0 must be None"), (dict(span=(4, 4, 4)), "span names 3 heads but the query has 2"),
     (dict(span=4, kind="ring"), "kind='ring'"), (dict(span=4, sinks=-1), "sinks=-1"),
     (dict(span=4, padding=torch.ones(1, 7, dtype=torch.bool)), r"padding is torch.bool \(1, 7\); give bool \(1, 8\)"),
     (dict(span=4, padding=torch.ones(1, 8)), "padding is torch.float32"),
     (dict(span=4, position=torch.arange(5)), r"position has shape \(5,\); give \(8,\) or \(1, 8\)"),
     (dict(span=4, position=torch.tensor([0, 1, 2, 9, 4, 5, 6, 7])), "first 0 places"),
     (dict(span=4, sinks=2, position=torch.tensor([3, 4, 5, 6, 7, 8, 9, 10])), "first 2 places"),
     (dict(span=9, position=torch.arange(5, 13)), "dropped places 0 to 4, but the query at 5 sees from 0"),
     (dict(span=None, position=torch.arange(5, 13)), "sees from 0 on"),
     (dict(span=4, backend="triton"), "not on a GPU")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(monkeypatch, named, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=words):
        local_attention(*tensors(8, dtype=torch.float32), **named)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = tensors(8, H=3, G=2)
    with pytest.raises(ValueError, match="H be a multiple of G"):
        local_attention(q, k, v, span=4)
    with pytest.raises(ValueError, match=r"must be \[B, H, T, D\]"):
        local_attention(q[0], k, v, span=4)
    with pytest.raises(ValueError, match="the queries be the last T"):
        local_attention(q, k[:, :1, :5], v[:, :1, :5], span=4)

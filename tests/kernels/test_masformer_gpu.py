"""Rung 3: the parity of test_masformer_kernels.py on a GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import pytest
import torch
from masformer_kernel_cases import check, padding, tensors

from zq_lib.masformer import local_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
SPANS = [("window", 1), ("window", 127), ("window", 256), ("window", 1000), ("block", 100), ("block", 512),
         ("two_block", 256)]  # fmt: skip


def big(T, S=None, dtype=torch.float16, **sizes):
    return tensors(T, S, dtype=dtype, device="cuda", **sizes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_head_widths_agree(D, dtype):
    seen = check(*big(1100, H=4, G=2, D=D, dtype=dtype), span=256, sinks=4)
    assert {launch.path for launch in seen} == {"triton"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sinks", [0, 4, 130])
@pytest.mark.parametrize(("kind", "span"), SPANS)
def test_spans_agree(kind, span, sinks, dtype):
    check(*big(2049, H=2, D=64, dtype=dtype), span=span, kind=kind, sinks=sinks)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "S"), [(1, 3000), (16, 1030), (700, 3000)])
@pytest.mark.parametrize(("kind", "span"), SPANS)
def test_queries_after_a_cache_agree(kind, span, T, S, dtype):
    check(*big(T, S, B=2, H=8, G=2, D=64, dtype=dtype), span=span, kind=kind, sinks=4)


@pytest.mark.parametrize(("kind", "span"), SPANS)
def test_padded_rows_agree(kind, span):
    texts = padding(1500, (0, 1500), (701, 1500), (0, 333), (1500, 1500), device="cuda")
    check(*big(1500, B=4, H=4, G=2, D=64), span=span, kind=kind, sinks=4, padding=texts)


def test_heads_may_have_spans_of_their_own():
    check(*big(1500, H=4, G=2, D=128, dtype=torch.bfloat16), span=(5, 256, None, 1000), sinks=4)


@pytest.mark.parametrize("dtype", TYPES)
def test_long_texts_agree(dtype):
    check(*big(8192, H=1, D=128, dtype=dtype), span=1024, sinks=4)


def test_a_span_that_covers_the_text_equals_full_attention_bit_for_bit():
    q, k, v = big(1000, H=2, D=64)
    outs = [local_attention(q, k, v, span=(s, 3), backend="triton")[:, 0] for s in (1000, 5000, None)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_runs_repeat_bit_for_bit():
    def gradients():
        found = [x.requires_grad_() for x in big(4096, B=2, H=8, G=2, D=128)]
        local_attention(*found, span=256, sinks=4).float().square().sum().backward()
        return [x.grad for x in found]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_memory_grows_with_the_text_and_not_with_its_square():
    found = [x.requires_grad_() for x in big(65536, H=1, D=64)]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    local_attention(*found, span=512, sinks=4).sum().backward()
    assert torch.cuda.max_memory_allocated() - held < 16 * found[0].nbytes

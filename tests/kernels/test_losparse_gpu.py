"""Rung 3: the parity of test_losparse_kernels.py on a GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import pytest
import torch
from losparse_kernel_cases import check, tensors

from zq_lib.losparse import kernels, reference
from zq_lib.losparse.kernels import RowImportanceTable
from zq_lib.losparse.linear import low_rank_sparse_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(("N", "K", "r"), [(768, 768, 20), (3072, 768, 31), (1000, 1537, 65), (4096, 4096, 103)])
@pytest.mark.parametrize("M", [1, 16, 64, 65, 1024])
def test_layers_agree(M, N, K, r, share, dtype):
    seen = check(tensors(M, N, K, r, round(share * N), dtype=dtype, device="cuda"))
    one = M <= kernels.FEW and r <= kernels.MOST_RANK and r * K <= kernels.MOST_REPEATED
    assert [s.kernel for s in seen] == (["losparse.decode"] if one else ["losparse.stack", "losparse.spread"])
    assert {s.path for s in seen} == {"triton"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("M", [5, 300])
def test_layers_without_bias_or_rank_agree(M, dtype):
    check(tensors(M, 768, 770, 0, 115, bias=False, dtype=dtype, device="cuda"))


def test_runs_repeat_bit_for_bit():
    x, *rest = tensors(515, 1024, 1024, 26, 150, dtype=torch.bfloat16, device="cuda")
    for m in (515, 3):
        assert torch.equal(*(low_rank_sparse_linear(x[:m], *rest, backend="triton") for _ in range(2)))


@pytest.mark.parametrize("m", [1, 300])
def test_a_layer_runs_in_a_cuda_graph(m):
    inputs = tensors(m, 1024, 1024, 26, 150, dtype=torch.bfloat16, device="cuda")
    wanted = low_rank_sparse_linear(*inputs, backend="triton")  # compiles, and reads the rows once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = low_rank_sparse_linear(*inputs, backend="triton")
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_importance_and_masks_of_a_whole_encoder_agree(dtype):
    shapes = ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 12
    source = torch.Generator(device="cuda").manual_seed(0)
    sparse, grads = (
        [torch.randn(*s, generator=source, device="cuda").to(dtype) for s in shapes] for _ in range(2)
    )  # fmt: skip
    table = RowImportanceTable(sparse)
    average = torch.zeros(table.rows, device="cuda")
    table.update(grads, torch.zeros_like(average), average, beta=0.0, position=None)
    pairs = zip(sparse, grads, strict=True)
    wanted = torch.cat([reference.importance(s.double(), g.double()).mean(1) for s, g in pairs])
    torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=0)
    keep = average > average.median()
    before = [s.clone() for s in sparse]
    table.zero(keep)
    for s, old, kept in zip(sparse, before, keep.split([n for n, _ in shapes]), strict=True):
        assert torch.equal(s, old * kept[:, None])

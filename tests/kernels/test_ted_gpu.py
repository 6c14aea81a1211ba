"""Rung 3: the parity of test_ted_kernels.py on a GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import math

import pytest
import torch
from ted_kernel_cases import check_divergence, check_filtered, logits, sides

from zq_lib.ted import Filtered, divergence, filtered_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 50_257), (7, 4096), (300, 4097), (1024, 5003), (64, 151_936)])
def test_divergences_agree(rows, classes, temperature, dtype):
    given = logits(rows, classes, dtype=dtype, device="cuda")
    seen = check_divergence(*given, temperature=temperature)
    assert [s.kernel for s in seen] == ["ted.kl_forward", "ted.kl_merge", "ted.kl_backward"]
    assert {s.path for s in seen} == {"triton"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_kept_rows_and_ruled_out_classes_agree(dtype, overwrite):
    s, t = logits(515, 9000, dtype=dtype, device="cuda")
    t[:, :4500] = -math.inf
    keep = torch.arange(515, device="cuda") % 3 > 0
    check_divergence(s, t, keep, overwrite=overwrite)
    s, t = s[keep].clone().requires_grad_(), t[keep]
    with torch.no_grad():
        s[:, 5000] = -math.inf
    assert float(divergence(s, t, backend="triton").detach()) == math.inf


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("student", "teacher", "dim"), [(384, 768, 768), (96, 384, 16), (100, 51, 77), (768, 768, 768)]
)
@pytest.mark.parametrize("rows", [1, 127, 129, 2048])
def test_filtered_errors_agree(rows, student, teacher, dim, dtype):
    (launch,) = check_filtered(*sides(rows, student, teacher, dim, 3, dtype=dtype, device="cuda"))
    assert (launch.kernel, launch.path) == ("ted.filtered_gap", "triton")


@pytest.mark.parametrize("dtype", TYPES)
def test_kept_tokens_and_pointers_off_sixteen_bytes_agree(dtype):
    own, other = sides(700, 384, 768, 256, 12, dtype=dtype, device="cuda")
    keep = torch.rand(700, generator=torch.Generator().manual_seed(0)).cuda() > 0.5
    check_filtered(own, other, keep)
    wide = torch.randn(700, 400, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    check_filtered([s._replace(hidden=wide[:, 3:387]) for s in own], other, keep)


def test_memory_of_a_training_step_is_at_most_four_tenths_of_plain_torch():
    own, other = sides(16_384, 384, 768, 768, 12, dtype=torch.bfloat16, device="cuda")
    mine = [Filtered(*(x.requires_grad_() for x in side)) for side in own]

    def plain():
        z = [[torch.nn.functional.linear(*side).float() for side in sides] for sides in (mine, other)]
        return torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(*z, strict=True)])

    peaks = []
    for loss in (lambda: filtered_error(mine, other, backend="triton"), plain):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = loss()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del found
    assert peaks[0] <= 0.4 * peaks[1]


def test_runs_repeat_bit_for_bit():
    def results():
        own, other = sides(2048, 384, 768, 768, 3, dtype=torch.bfloat16, device="cuda")
        mine = [x.requires_grad_() for side in own for x in side]
        s, t = logits(16, 50_257, dtype=torch.bfloat16, device="cuda")
        found = filtered_error(own, other, backend="triton"), divergence(s.requires_grad_(), t, backend="triton")
        return [*found, *torch.autograd.grad(found[0].sum() + found[1], [*mine, s])]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))

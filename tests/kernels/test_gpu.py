"""Rung 3: the parity of test_attention.py on a real GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import pytest
import torch
from attention_cases import case, causal_mask, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
HALF = [torch.float16, torch.bfloat16]
TYPES = [torch.float32, *HALF]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("T", [127, 128, 129, 1024])
def test_outputs_and_gradients_agree(T, D, dtype):
    seen = check(case(B=2, H=4, G=2, T=T, D=D, marked=(100, 110), dtype=dtype, device="cuda"))
    assert {launch.path for launch in seen} == {"triton"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("H", "G"), [(4, 4), (3, 1), (4, 1)])
def test_groups_and_chunks_agree(H, G, dtype):
    check(case(H=H, G=G, T=257, S=1031, D=64, marked=(300, 900), dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mask", [dict(left=130), dict(right=70), dict(window=200), dict(left=33, window=64)], ids=str)
def test_masks_agree(mask, dtype):
    T = S = 515
    check(case(T=T, D=64, marked=(250, 260), dtype=dtype, device="cuda").but(mask=causal_mask(T, S, **mask).cuda()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("S", [1, 255, 4099])
def test_one_query_agrees(S, D, dtype):
    seen = check(case(B=2, H=4, G=1, T=1, S=S, D=D, dtype=dtype, device="cuda"), gradients=False)
    assert [launch.kernel for launch in seen] == ["pasta.decode", "pasta.merge"]


@pytest.mark.parametrize("dtype", TYPES)
def test_blind_rows_the_row_rule_and_hard_masking_agree(dtype):
    mask = causal_mask(300, 300)
    mask[..., 128:260, :] = False
    rows = (torch.arange(300, device="cuda") >= 150)[None]
    check(case(T=300, D=64, alpha=1e-8, dtype=dtype, device="cuda").but(mask=mask.cuda(), rows=rows))


@pytest.mark.parametrize("dtype", HALF)
def test_runs_repeat_bit_for_bit(dtype):
    from zq_lib.pasta.kernels import flash_attention

    setup = case(B=2, H=4, G=2, T=515, D=64, dtype=dtype, device="cuda")

    def results():
        inputs = [x.clone().requires_grad_() for x in (setup.q, setup.k, setup.v, setup.gate, setup.beta)]
        out, _ = flash_attention(*inputs[:3], gate=inputs[3], beta=inputs[4])
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_addresses_beyond_two_to_the_31_are_reached():
    """Keys 2.1 billion elements apart: a 32-bit address would wrap and read something else."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    S, gap = 33, 2**27
    store = torch.zeros(S * gap // 64, 64, dtype=torch.float16, device="cuda")
    setup = case(T=S, H=1, D=64, dtype=torch.float16, device="cuda")
    k = store.view(-1).as_strided((1, 1, S, 64), (0, 0, gap - 64, 1))
    k.copy_(setup.k)
    check(setup.but(k=k), gradients=False)

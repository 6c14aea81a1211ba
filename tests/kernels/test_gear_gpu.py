"""Rung 3: the parity of test_gear_kernels.py on a real GPU at full size. `make gpu` runs this before any timing."""

from __future__ import annotations

import pytest
import torch
from gear_kernel_cases import attention, block, check, normal, queries

from zq_lib.core.numerics import CODE_TIES, relative_rms, tolerance
from zq_lib.gear import GearConfig, kernels
from zq_lib.gear.kernels_bench import SETTINGS, random_block
from zq_lib.gear.packing import pack
from zq_lib.gear.quantize import encode, group_view, ranges
from zq_lib.gear.view import View

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.usefixtures("poisoned"),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_gpu(found):
    return found.map(lambda x: x.cuda())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_codes_of_each_size_agree(D, bits, dtype):
    group = 16 if D == 80 else 64
    small = block(GearConfig.plain(bits, group=group, buffer=64), 320, B=2, G=2, D=D)
    seen = check(on_gpu(small), heads=8, dtype=dtype)
    assert {launch.path for launch in seen} == {"triton"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("config", [
    GearConfig.paper(), GearConfig.paper(4), GearConfig.lite().but(factor_bits=8), GearConfig.small(),
    GearConfig.paper(4).but(value_vector="all"), GearConfig.plain(4, scheme="per_token", group=32, rank=2),
    GearConfig(group=128, buffer=128), GearConfig(group=32, buffer=32),
])  # fmt: skip
def test_every_recipe_agrees_in_a_prompt_and_in_pages(config, dtype):
    check(on_gpu(block(config, 5 * config.buffer, B=2, G=2, D=128)), heads=8, dtype=dtype)
    check(on_gpu(block(config, config.buffer, m=7, G=2, D=128).crop(6 * config.buffer + 5)), heads=6, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_long_prompts_agree(setting, dtype):
    check(random_block(2, 2, 8192, 128, "cuda", **SETTINGS[setting]), heads=8, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_sinks_and_buffer_are_one_softmax_with_mask_and_bias(dtype):
    blocks = tuple(on_gpu(block(GearConfig.paper(), n, m=m, B=2, G=2, D=128)) for n, m in ((640, 1), (64, 5)))
    view = View(blocks, *(normal(2, 2, 70, 128, seed=s).cuda().to(dtype) for s in (8, 9)), 4)
    query = queries(2, 8, 128).cuda().to(dtype)
    mask = torch.rand(2, view.length, device="cuda") < 0.8
    named = dict(bias=normal(2, view.length, seed=3).cuda(), gate=normal(2, 8, seed=4).cuda())
    out = kernels.decode(query, view, scale=0.1, mask=mask, **named)
    restored = [
        torch.cat([exact[:, :, :4].float(), *side, exact[:, :, 4:].float()], 2)
        for exact, side in zip(
            (view.exact_keys, view.exact_values), zip(*(b.dequantize() for b in blocks), strict=True), strict=True
        )
    ]
    wanted, _ = attention(query, *restored, 0.1, mask, **named)
    assert relative_rms(out, wanted) <= tolerance(dtype, "triton").output


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_codes_equal_those_of_torch_on_a_cpu(kind, bits, dtype):
    x = (3 * normal(2, 2, 640, 128)).to(dtype)
    keep = normal(2, 2, 640, 128, seed=1) > -2
    config = GearConfig.plain(bits)
    codec = config.keys if kind == "key" else config.values
    segment = x.float()[:, None]
    view = group_view(codec, segment.shape)
    scale, zero = ranges(segment, keep[:, None], codec, view)
    codes = encode(segment.reshape(view.shape), scale, zero, bits).to(torch.uint8).view(segment.shape)
    got = kernels.quantize_pack(x.cuda(), kind, bits, 64, keep.cuda())
    assert torch.equal(got[1].cpu(), scale.reshape(view.stored)[:, 0].half())
    assert torch.equal(got[2].cpu(), zero.reshape(view.stored)[:, 0].half())
    assert (got[0].cpu() != pack(codes, bits)[:, 0]).double().mean() <= CODE_TIES


def test_runs_repeat_bit_for_bit():
    long = random_block(2, 2, 4096, 128, "cuda", **SETTINGS["GEAR 2 bits"])
    first, second = (kernels.packed_decode(queries(2, 8, 128).cuda().half(), long, scale=0.1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

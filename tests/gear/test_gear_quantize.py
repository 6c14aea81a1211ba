"""The quantiser against arithmetic written out here, and the errors that theory and measurement ask for."""

from __future__ import annotations

import pytest
import torch
from gear_cases import error, normal, packed

from zq_lib.gear.packing import unpack

GAUSS = {2: 0.449, 3: 0.192, 4: 0.0896, 8: 0.00535}  # relative error of N(0, 1), groups of 64


@pytest.mark.parametrize("bits", GAUSS)
@pytest.mark.parametrize("kind", ["key", "value"])
def test_errors_on_gaussian_numbers_are_the_expected_ones(bits: int, kind: str) -> None:
    """Within 1 %; 8 bits within 2 %, because there the rounding of scale and zero to float16 shows."""
    x = normal(2, 3, 256, 64)
    found = error(x, packed(x, kind, bits=bits, group=64).dequantize())
    assert found == pytest.approx(GAUSS[bits], rel=0.02 if bits == 8 else 0.01)


@pytest.mark.parametrize("bits", GAUSS)
@pytest.mark.parametrize("kind", ["key", "value"])
def test_every_part_lowers_the_error_also_on_gaussian_numbers(bits: int, kind: str) -> None:
    x = normal(2, 3, 256, 64)
    plain, lite, gear = (
        error(x, packed(x, kind, bits=bits, **more).dequantize())
        for more in ({}, {"rank": 4}, {"rank": 4, "outliers": 0.02})
    )
    assert gear < lite < plain
    assert 0.92 < lite / plain < 0.97  # noise is the worst case for a low rank


def by_hand(x: torch.Tensor, scheme: str, kind: str, group: int, whole: bool) -> tuple[list, torch.Tensor]:
    """Groups as lists of (head, token, channel), and for every entry the number of its group."""
    _, heads, n, d = x.shape
    groups: dict[tuple, list] = {}
    for h in range(heads):
        for t in range(n):
            for c in range(d):
                if kind == "key" and scheme == "kivi":
                    key = (h, c, t // group)
                elif kind == "key" and scheme == "kcvt":
                    key = (h, c)
                elif scheme == "kcvt":
                    key = (t,) if whole else (h, t)
                else:
                    key = (h, t, c // min(group, d))
                groups.setdefault(key, []).append((h, t, c))
    return list(groups.values())


@pytest.mark.parametrize(
    ("scheme", "kind", "whole"),
    [
        ("kivi", "key", False),
        ("kivi", "value", False),
        ("kcvt", "key", False),
        ("kcvt", "value", False),
        ("kcvt", "value", True),
        ("per_token", "key", False),
        ("per_token", "value", False),
    ],
)
@pytest.mark.parametrize("bits", [2, 3])
def test_every_scheme_shares_ranges_among_the_entries_it_says(scheme: str, kind: str, whole: bool, bits: int) -> None:
    x = normal(1, 2, 8, 8) * 3 + 1
    settings = {"scheme": scheme, "group": 4, "buffer": 8, "value_vector": "all" if whole else "head"}
    block = packed(x, kind, bits=bits, **settings)
    restored = block.dequantize()
    groups = by_hand(x, scheme, kind, 4, whole)
    assert block.scale.numel() == len(groups)
    for group in groups:
        index = tuple(zip(*group, strict=True))
        values = x[0][index]
        zero = values.min().half().float()
        scale = ((values.max() - values.min()) / (2**bits - 1)).half().float()
        expected = ((values - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero
        assert torch.equal(restored[0][index], expected)


@pytest.mark.parametrize(
    ("kind", "settings", "shape"),
    [
        ("key", {"group": 16}, (2, 1, 3, 4, 32)),
        ("key", {"scheme": "kcvt"}, (2, 1, 3, 1, 32)),
        ("key", {"scheme": "per_token", "group": 16}, (2, 1, 3, 64, 2)),
        ("value", {"group": 16}, (2, 1, 3, 64, 2)),
        ("value", {"group": 64}, (2, 1, 3, 64, 1)),
        ("value", {"scheme": "kcvt"}, (2, 1, 3, 64, 1)),
        ("value", {"scheme": "kcvt", "value_vector": "all"}, (2, 1, 1, 64, 1)),
    ],
)
@pytest.mark.parametrize("meta", ["float16", "float32"])
def test_scales_and_zeros_have_the_documented_shape_and_dtype(kind: str, settings: dict, shape: tuple, meta) -> None:  # noqa: ANN001
    block = packed(normal(2, 3, 64, 32), kind, meta_dtype=meta, **settings)
    assert block.scale.shape == block.zero.shape == shape
    assert block.scale.dtype == block.zero.dtype == getattr(torch, meta)
    assert block.codes.shape == (2, 1, 3, 64, 8)


def test_codes_round_half_to_even() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 1, 8)
    block = packed(x, "value", bits=2, group=8, buffer=8)
    assert unpack(block.codes, 2).flatten().tolist() == [0, 0, 2, 2, 3, 1, 2, 0]


def test_scale_and_zero_are_rounded_to_storage_before_the_codes_are_computed() -> None:
    """Around 1000 float16 has steps of 0.5, far more than a code of 8 bits: only the codes can absorb that."""
    x = 1000.2 + 5 * normal(1, 1, 64, 8)
    block = packed(x, "key", bits=8)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    zero, scale = low.half().float(), ((high - low) / 255).half().float()
    assert torch.equal(block.zero[:, 0].float(), zero) and torch.equal(block.scale[:, 0].float(), scale)
    expected = ((x - zero) / scale).round().clamp(0, 255)
    assert torch.equal(unpack(block.codes, 8)[:, 0].float(), expected)
    assert (expected - ((x - low) / (high - low) * 255).round()).abs().max() > 1
    inside = (x >= zero) & (x <= zero + 255 * scale)
    assert ((x - block.dequantize()).abs() <= 0.501 * scale)[inside].all()


def test_wide_metadata_serves_keys_with_a_large_offset() -> None:
    x = 2000 + normal(1, 1, 64, 16)
    half, full = (error(x, packed(x, bits=8, meta_dtype=meta).dequantize()) for meta in ("float16", "float32"))
    assert full < half / 5


@pytest.mark.parametrize("bits", GAUSS)
@pytest.mark.parametrize("scheme", ["kivi", "kcvt", "per_token"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_clipping_lowers_the_squared_error_and_never_raises_a_groups(bits: int, scheme: str, kind: str) -> None:
    x = normal(1, 2, 128, 32)
    settings = {"bits": bits, "scheme": scheme, "group": 32}
    plain, clipped = (x - packed(x, kind, clip=clip, **settings).dequantize() for clip in (False, True))
    if kind == "key" and scheme != "per_token":
        sums = [e.square().unflatten(2, (4, 32) if scheme == "kivi" else (1, 128)).sum(3) for e in (plain, clipped)]
    else:
        sums = [e.square().sum(3) for e in (plain, clipped)]
    assert (sums[1] <= sums[0] * (1 + 1e-5)).all()
    if bits == 2:
        assert clipped.norm() < 0.9 * plain.norm()


def test_clipping_ignores_outliers_and_padding() -> None:
    x = normal(1, 1, 64, 8)
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, :9] = False
    noisy = x.clone()
    noisy[:, :, :9] = 1e4
    a, b = (packed(y, "key", clip=True, valid=valid) for y in (x, noisy))
    assert torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("scheme", ["kivi", "kcvt", "per_token"])
def test_constant_groups_are_restored_without_a_division_by_zero(kind: str, scheme: str) -> None:
    x = torch.full((1, 2, 64, 16), 0.37)
    block = packed(x, kind, scheme=scheme)
    assert not block.scale.any() and not block.codes.any()
    assert torch.equal(block.dequantize(), x.half().float())


def test_a_group_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ValueError, match="group=48 does not divide the head width 64; use group=32"):
        packed(normal(1, 1, 48, 64), "value", group=48, buffer=48)
    with pytest.raises(ValueError, match="group=64 does not divide a segment of 65 tokens"):
        packed(normal(1, 1, 65, 8), "key")


def test_a_range_beyond_float16_is_refused_and_fits_float32() -> None:
    x = normal(1, 1, 64, 8) * 1e6
    with pytest.raises(ValueError, match="key range.*use meta_dtype='float32'"):
        packed(x, "key")
    assert torch.isfinite(packed(x, "key", meta_dtype="float32").dequantize()).all()

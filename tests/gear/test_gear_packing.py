"""Codes in bytes: every value comes back, in the planar layout."""

from __future__ import annotations

import pytest
import torch

from zq_lib.gear.config import BITS
from zq_lib.gear.packing import pack, row_bytes, to_kivi, unpack


def codes(bits: int, width: int, rows: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (2, rows, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [8, 16, 64, 80, 128, 256])
def test_packing_round_trips_and_takes_exactly_its_bits(bits: int, width: int) -> None:
    x = codes(bits, width)
    before = x.clone()
    packed = pack(x, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 7, width * bits // 8)
    assert packed.shape[-1] == row_bytes(width, bits)
    assert torch.equal(unpack(packed, bits), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_place_comes_back(bits: int) -> None:
    for value in {0, 1, 2**bits - 2, 2**bits - 1}:
        for place in range(16):
            x = torch.zeros(1, 16, dtype=torch.uint8)
            x[0, place] = value
            assert torch.equal(unpack(pack(x, bits), bits), x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layout_is_planar_along_channels(bits: int) -> None:
    """Byte j holds channels j, j + D/per, j + 2 D/per, ... at bit offsets 0, bits, 2 bits, ..."""
    x, per, width = codes(bits, 32, rows=1), 8 // bits, 32
    packed = pack(x, bits)
    for j in range(width // per):
        expected = sum(int(x[0, 0, j + i * width // per]) << (bits * i) for i in range(per))
        assert int(packed[0, 0, j]) == expected


def test_three_bits_are_a_plane_of_two_low_bits_and_a_plane_of_the_high_bit() -> None:
    x = codes(3, 32, rows=1)
    packed = pack(x, 3)
    low, high = packed[..., :8], packed[..., 8:]
    assert high.shape[-1] == 4
    assert torch.equal(low, pack(x & 3, 2))
    for j in range(4):
        assert int(high[0, 0, j]) == sum((int(x[0, 0, j + 4 * i]) >> 2) << i for i in range(8))


def test_a_strided_input_packs_like_its_copy() -> None:
    x = codes(2, 64).transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(pack(x, 2), pack(x.contiguous(), 2))


@pytest.mark.parametrize(("width", "bits"), [(6, 2), (12, 3), (7, 4)])
def test_a_width_that_fills_no_whole_bytes_is_refused_with_a_remedy(width: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"head width {width}.*bits={bits}.*use bits=8"):
        pack(torch.zeros(1, width, dtype=torch.uint8), bits)
    assert pack(torch.zeros(1, width, dtype=torch.uint8), 8).shape[-1] == width


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivis_words_hold_the_codes_from_the_lowest_bits_on(bits: int) -> None:
    x, per = codes(bits, 64, rows=3), 32 // bits
    words = to_kivi(x, bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 64 // per)
    for b, row, word in ((0, 0, 0), (1, 2, 1), (1, 1, 64 // per - 1)):
        value = int(words[b, row, word]) & 0xFFFFFFFF  # the top code may set the sign
        assert value == sum(int(x[b, row, word * per + i]) << (bits * i) for i in range(per))


def test_kivis_top_code_fills_the_sign_bit() -> None:
    full = torch.full((1, 16), 3, dtype=torch.uint8)
    assert to_kivi(full, 2).tolist() == [[-1]]


@pytest.mark.parametrize(("bits", "width"), [(3, 32), (2, 24)])
def test_what_kivi_cannot_pack_is_refused(bits: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} with {width} codes"):
        to_kivi(torch.zeros(1, width, dtype=torch.uint8), bits)

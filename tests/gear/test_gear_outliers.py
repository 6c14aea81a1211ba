"""The outlier filter: how many, which ones, restored exactly, and no part of a range."""

from __future__ import annotations

import pytest
import torch
from gear_cases import error, normal, packed

from zq_lib.gear import GearConfig
from zq_lib.gear.outliers import page_starts, per_side


@pytest.mark.parametrize(
    ("rounding", "counts"),
    [
        ("floor", {64: 0, 99: 0, 100: 1, 192: 1, 1024: 10, 4096: 40}),
        ("nearest", {49: 0, 50: 1, 64: 1, 149: 1, 192: 2, 1024: 10, 4096: 41}),
        ("ceil", {1024: 11, 64: 1, 100: 1, 101: 2, 4096: 41}),
    ],
)
def test_a_share_becomes_a_count_by_the_chosen_rounding(rounding: str, counts: dict[int, int]) -> None:
    codec = GearConfig(outliers=0.02, outlier_round=rounding).keys
    assert {length: per_side(codec, length) for length in counts} == counts


def test_the_paper_keeps_one_percent_at_each_end_of_a_thousand_tokens() -> None:
    x = normal(1, 3, 1024, 64)
    keys, values = (packed(x, kind, outliers=0.02, outlier_round="floor") for kind in ("key", "value"))
    assert keys.out_delta.shape[-1] == 2 * 10 * 64 * 3
    assert values.out_delta.shape[-1] == 2 * 1 * 1024


@pytest.mark.parametrize(("share", "n", "rounding"), [(0.5, 2, "ceil"), (0.99, 64, "nearest"), (0.02, 2, "ceil")])
def test_outliers_that_would_be_the_whole_vector_are_refused(share: float, n: int, rounding: str) -> None:
    codec = GearConfig(outliers=share, outlier_round=rounding).keys
    if 2 * round(n * share / 2 + (0.499 if rounding == "ceil" else 0)) < n:
        assert per_side(codec, n)
        return
    with pytest.raises(ValueError, match=rf"outliers={share} keeps \d+ of {n} entries of a key vector.*smaller share"):
        per_side(codec, n)


def test_a_short_vector_is_never_kept_whole_in_silence() -> None:
    """Published code keeps every entry of a 64-token page."""
    with pytest.raises(ValueError, match="outliers=0.6 keeps 2 of 2 entries of a key vector"):
        packed(normal(1, 1, 2, 8), "key", outliers=0.6, outlier_round="ceil", scheme="kcvt")


@pytest.mark.parametrize("scope", ["vector", "head"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_the_largest_and_smallest_entries_of_every_vector_are_the_ones(kind: str, scope: str) -> None:
    x = normal(2, 2, 64, 16)
    block = packed(x, kind, outliers=0.1, outlier_scope=scope)
    marked = positions(block)
    if scope == "head":
        vectors, marks = x.flatten(2), marked.flatten(2)
    elif kind == "key":
        vectors, marks = x.mT, marked.mT
    else:
        vectors, marks = x.transpose(1, 2).flatten(2), marked.transpose(1, 2).flatten(2)
    count = per_side(block_codec(kind, scope), vectors.shape[-1])
    order = vectors.argsort(-1)
    expected = torch.zeros_like(marks)
    expected.scatter_(-1, order[..., :count], True)
    expected.scatter_(-1, order[..., -count:], True)
    assert torch.equal(marks, expected)


def block_codec(kind: str, scope: str):  # noqa: ANN201
    config = GearConfig(outliers=0.1, outlier_scope=scope)
    return config.keys if kind == "key" else config.values


def positions(block) -> torch.Tensor:  # noqa: ANN001
    """Where the outliers of a block of one segment are, [B, G, n, D], read with plain loops from the stored entries."""
    b, _, heads, n = block.codes.shape[:4]
    marked = torch.zeros(b, heads, n, block.width, dtype=torch.bool)
    pages = -(-n // 64)
    for row in range(b):
        for h in range(heads):
            for page in range(pages):
                start, stop = block.out_start[row, 0, h * pages + page], block.out_start[row, 0, h * pages + page + 1]
                for e in range(int(start), int(stop)):
                    token = page * 64 + int(block.out_token[row, 0, e])
                    assert not marked[row, h, token, int(block.out_channel[row, 0, e])]
                    marked[row, h, token, int(block.out_channel[row, 0, e])] = True
    assert (block.out_start[:, 0, -1] == block.out_delta.shape[-1]).all()
    return marked


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("rank", [0, 2])
def test_exact_outliers_are_restored_to_half_precision_of_what_was_missing(kind: str, rank: int) -> None:
    x = normal(1, 2, 128, 16)
    block = packed(x, kind, bits=2, outliers=0.05, rank=rank)
    marked = positions(block)
    missing = block.map(lambda t: t)
    off = (x - missing.dequantize()).abs()[marked]
    assert off.max() < 2e-3 < (x - block.dequantize()).abs()[~marked].mean()


def test_the_papers_mode_adds_the_low_rank_part_at_outliers() -> None:
    x = normal(1, 2, 128, 16)
    exact, paper = (packed(x, "key", outliers=0.05, rank=2, outlier_mode=mode) for mode in ("exact", "paper"))
    marked = positions(exact)
    left, right = paper.factors()
    low_rank = (left @ right.mT)[:, 0]
    assert torch.allclose(paper.dequantize()[marked], (x + low_rank)[marked], atol=4e-3)
    assert low_rank[marked].abs().max() > 0.05
    assert torch.equal(paper.dequantize()[~marked], exact.dequantize()[~marked])


def test_outliers_take_no_part_in_the_range_of_the_others() -> None:
    x = normal(1, 1, 64, 8)
    spiked = x.clone()
    spiked[0, 0, 17] = 500.0
    spiked[0, 0, 40] = -500.0
    block = packed(spiked, "key", outliers=2 / 64)
    rest = torch.ones(64, dtype=torch.bool)
    rest[[17, 40]] = False
    assert torch.equal(block.zero.float().flatten(), x[0, 0, rest].amin(0).half().float())
    assert block.dequantize()[0, 0, 17].allclose(torch.tensor(500.0), atol=0.3)
    assert error(x[:, :, rest], block.dequantize()[:, :, rest]) < 0.6


def test_the_two_ends_are_disjoint_also_in_constant_vectors() -> None:
    for x in (torch.zeros(1, 2, 64, 8), torch.full((1, 2, 64, 8), 3.0)):
        for kind in ("key", "value"):
            block = packed(x, kind, outliers=0.2)
            marked = positions(block)
            assert marked.sum() == block.out_delta.shape[-1]
            assert torch.equal(block.dequantize(), x)


def test_no_outliers_where_a_share_rounds_to_none() -> None:
    block = packed(normal(1, 1, 64, 8), "key", outliers=0.02, outlier_round="floor")
    assert block.out_delta is None and "out_token" not in block.tensors()
    assert packed(normal(1, 1, 64, 8), "key", outliers=0.02).out_delta is not None


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("scope", ["vector", "head"])
def test_padding_takes_no_outlier_that_text_could_have(kind: str, scope: str) -> None:
    x = normal(2, 2, 64, 16)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, :20] = False
    x[1, :, :20] = 1e3
    marked = positions(packed(x, kind, outliers=0.1, outlier_scope=scope, valid=valid))
    if kind == "key" or scope == "head":
        assert not marked[1, :, :20].any()
    alone = positions(packed(x[1:, :, 20:], kind, outliers=0.1, outlier_scope=scope, scheme="kcvt"))
    if kind == "value" and scope == "vector":
        assert torch.equal(marked[1, :, 20:], alone[0])
    assert torch.equal(marked[0], positions(packed(x[:1], kind, outliers=0.1, outlier_scope=scope))[0])


def test_wide_heads_store_channels_in_more_than_a_byte() -> None:
    x = normal(1, 1, 64, 320)
    block = packed(x, "value", outliers=0.02, group=64)
    assert block.out_channel.dtype == torch.int16
    assert (x - block.dequantize()).abs()[positions(block)].max() < 4e-3
    assert packed(normal(1, 1, 64, 256), "value", outliers=0.02).out_channel.dtype == torch.uint8


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130, 200])
def test_any_number_of_tokens_has_its_last_page(n: int) -> None:
    x = normal(2, 3, n, 8)
    block = packed(x, "value", outliers=0.1)
    marked = positions(block)
    assert marked.sum(dim=(1, 3)).eq(2 * per_side(block_codec("value", "vector"), 24)).all()
    assert (x - block.dequantize()).abs()[marked].max() < 4e-3


def test_pages_start_where_the_strides_say_and_count_in_more_than_32_bits_where_they_must() -> None:
    found = page_starts(torch.Size((2, 1, 2, 130)), (10_000, 7, 3_000, 16), torch.device("cpu"))
    assert found.dtype == torch.int32
    assert found.tolist() == [b + h + p for b in (0, 10_000) for h in (0, 3_000) for p in (0, 1024, 2048)]
    far = page_starts(torch.Size((2, 1, 1, 64)), (2**31, 1, 1, 16), torch.device("cpu"))
    assert far.dtype == torch.int64 and far.tolist() == [0, 2**31]

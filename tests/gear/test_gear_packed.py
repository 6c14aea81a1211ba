"""The compressed form: bytes to the byte, rows that do not depend on their batch, and the numbers that break others."""

from __future__ import annotations

import math

import pytest
import torch
from gear_cases import assert_same, error, held, layer, normal, packed

from zq_lib.gear import PRESETS, GearConfig
from zq_lib.gear.packed import Block, compress

CONFIGS = {
    "plain 2": {},
    "plain 3": {"bits": 3},
    "plain 4, fp32 metadata": {"bits": 4, "meta_dtype": "float32"},
    "plain 8": {"bits": 8},
    "kcvt": {"bits": 4, "scheme": "kcvt"},
    "kcvt over all heads": {"bits": 4, "scheme": "kcvt", "value_vector": "all"},
    "per token": {"scheme": "per_token", "group": 16},
    "lite": {"rank": 4},
    "gear": {"rank": 4, "outliers": 0.02},
    "gear, floor, head": {"rank": 4, "outliers": 0.02, "outlier_round": "floor", "outlier_scope": "head"},
    "gear int8": {"rank": 4, "outliers": 0.02, "factor_bits": 8},
    "clip": {"clip": True, "outliers": 0.05},
}


def side_bytes(kind: str, n: int, heads: int, d: int, settings: dict) -> dict[str, float]:
    """The formulas of the accounting, per row. An outlier is a 16-bit value, an 8-bit token and an 8-bit channel."""
    c = GearConfig.plain(**settings)
    elements, bits, rank = n * heads * d, c.bits, c.rank
    if kind == "key" and c.scheme != "per_token":
        groups = heads * d * (1 if c.scheme == "kcvt" else n / c.group)
    elif c.scheme == "kcvt":
        groups = n * (1 if c.value_vector == "all" else heads)
    else:
        groups = n * heads * d / min(c.group, d)
    count = {"floor": math.floor, "nearest": lambda x: math.floor(x + 0.5)}[c.outlier_round]
    if c.outlier_scope == "head":
        entries = heads * 2 * count(n * d * c.outliers / 2)
    elif kind == "key":
        entries = heads * d * 2 * count(n * c.outliers / 2)
    else:
        entries = n * 2 * count(heads * d * c.outliers / 2)
    pages = 4 * (heads * math.ceil(n / 64) + 1) if entries else 0
    return {
        "codes": elements * bits / 8,
        "metadata": groups * 2 * (2 if c.meta_dtype == "float16" else 4),
        "low rank": rank * (n + d) * heads * c.factor_bits / 8 + (rank * heads * 4 if c.factor_bits == 8 else 0),
        "outliers": entries * 4 + pages,
    }


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("n", "heads", "d"), [(1024, 3, 64), (192, 2, 32)])
def test_bytes_equal_the_formulas_to_the_byte(settings: dict, n: int, heads: int, d: int) -> None:
    for kind in ("key", "value"):
        block = packed(normal(2, heads, n, d), kind, **settings)
        expected = side_bytes(kind, n, heads, d, settings)
        assert block.nbytes() == {part: 2 * size for part, size in expected.items()}
        assert sum(block.nbytes().values()) == sum(x.nbytes for x in held(block).values())


def test_plain_two_bits_of_a_thousand_tokens_take_the_published_bytes() -> None:
    one = layer(GearConfig.plain(2))
    one.update(normal(1, 3, 1024, 64), normal(1, 3, 1024, 64, seed=1))
    assert sum(one.nbytes().values()) == 122_880


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_stored_tensor_is_contiguous_and_owns_its_bytes(settings: dict) -> None:
    for x in (normal(2, 2, 64, 16), normal(2, 64, 2, 16).transpose(1, 2)):
        for kind in ("key", "value"):
            for name, stored in held(packed(x, kind, **settings)).items():
                assert stored.is_contiguous(), name
                assert stored.untyped_storage().nbytes() == stored.nbytes, name


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_row_compresses_to_the_same_bytes_alone_and_in_a_batch(settings: dict, kind: str) -> None:
    x = normal(3, 3, 128, 32)
    together = packed(x, kind, **settings)
    for b in range(3):
        alone = packed(x[b : b + 1], kind, **settings)
        for name, stored in alone.tensors().items():
            assert torch.equal(stored[0], together.tensors()[name][b]), name


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", ["key", "value"])
def test_the_parts_add_up_to_what_is_restored(settings: dict, kind: str) -> None:
    block = packed(normal(2, 2, 128, 32), kind, **settings)
    rebuilt = block.backbone()
    if block.left is not None:
        left, right = block.left.double(), block.right.double()
        if block.left_scale is not None:
            left, right = left * block.left_scale, right * block.right_scale
        rebuilt = rebuilt + (left @ right.mT).float()
    if block.out_delta is not None:
        for b in range(2):
            for h in range(2):
                for page in range(2):
                    for e in range(*block.out_start[b, 0, 2 * h + page : 2 * h + page + 2].tolist()):
                        place = (
                            b,
                            0,
                            h,
                            64 * page + block.out_token[b, 0, e].long(),
                            block.out_channel[b, 0, e].long(),
                        )
                        rebuilt[place] += block.out_delta[b, 0, e].float()
    assert torch.allclose(block.dequantize(), rebuilt[:, 0], atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_segment_cut_into_buffers_holds_the_same(kind: str, bits: int) -> None:
    whole = packed(normal(2, 3, 128, 32), kind, bits=bits, outliers=0.0, rank=0, group=16)
    assert whole.can_be_cut(32)
    pieces = whole.cut(32)
    assert (pieces.count, pieces.tokens) == (4, 32)
    assert torch.equal(pieces.dequantize(), whole.dequantize())
    assert pieces.nbytes() == whole.nbytes()


@pytest.mark.parametrize("settings", [{"rank": 2}, {"outliers": 0.1}, {"scheme": "kcvt"}])
def test_a_segment_with_parts_of_its_own_is_not_cut(settings: dict) -> None:
    x = normal(1, 2, 64, 16)
    whole = Block(*(packed(x, kind, **{"outliers": 0.0, "rank": 0, **settings}) for kind in ("key", "value")), 64)
    assert whole.cut(16) is whole


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", ["key", "value"])
def test_hard_numbers_give_no_nan(settings: dict, kind: str) -> None:
    """Constant channels, zeros, 6e4 of both signs, a single spike, numbers too small for float16."""
    x = normal(1, 2, 64, 16)
    constant = x.clone()
    constant[..., 3] = 7.0
    spike = torch.zeros_like(x)
    spike[0, 0, 5, 5] = 6e4
    signs = torch.where(x > 0, 6e4, -6e4)
    for hard in (constant, torch.zeros_like(x), signs, spike, x * 1e-30, 6e4 + torch.zeros_like(x), x * 1e4):
        restored = packed(hard, kind, **settings).dequantize()
        assert torch.isfinite(restored).all()
        assert error(hard + 1e-9, restored) < 0.7 or hard.abs().max() < 1e-20
    assert not packed(torch.zeros_like(x), kind, **settings).dequantize().any()


@pytest.mark.parametrize("settings", [s for s in CONFIGS.values() if s.get("scheme")])
def test_a_segment_of_one_token_is_possible_where_groups_allow(settings: dict) -> None:
    for kind in ("key", "value"):
        x = normal(2, 2, 1, 16)
        assert error(x, packed(x, kind, rank=2, **settings).dequantize()) < 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_nan_and_infinity_are_refused_by_name(bad: float, kind: str) -> None:
    x = normal(1, 2, 64, 16)
    x[0, 1, 3, 2] = bad
    with pytest.raises(ValueError, match=f"the {kind}s hold NaN or infinite numbers.*bfloat16 or float32"):
        packed(x, kind)


def test_compressing_changes_neither_its_input_nor_keeps_a_graph() -> None:
    x = normal(1, 2, 64, 16).requires_grad_()
    before = x.detach().clone()
    block = packed(x, "key", rank=2, outliers=0.1, clip=True)
    assert torch.equal(x, before)
    assert not any(t.requires_grad for t in held(block).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_compresses_as_its_float32_copy(dtype: torch.dtype) -> None:
    x = normal(1, 2, 64, 16).to(dtype)
    assert_same(packed(x, "key", rank=2, outliers=0.1), packed(x.float(), "key", rank=2, outliers=0.1))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_compresses_both_sides_of_a_page_and_a_prompt(name: str) -> None:
    config = PRESETS[name]()
    for n, prompt in ((config.buffer, False), (16 * config.buffer, True)):
        x = normal(1, 3, n, 64)
        for codec in (config.keys, config.values):
            assert error(x, compress(x, codec, prompt=prompt).dequantize()) < 0.46


def page_block(segments: int, **settings) -> tuple[Block, torch.Tensor, torch.Tensor]:  # noqa: ANN003
    keys, values = normal(2, 2, 64 * segments, 16), normal(2, 2, 64 * segments, 16, seed=1)
    block = None
    for s in range(segments):
        part = slice(64 * s, 64 * (s + 1))
        new = Block(packed(keys[:, :, part], "key", **settings), packed(values[:, :, part], "value", **settings), 64)
        block = new if block is None else block.join(new)
    return block, keys, values


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_joined_segments_restore_what_each_restored(settings: dict) -> None:
    block, keys, values = page_block(3, **settings)
    assert block.length == 192 and block.keys.count == 3
    for restored, x, kind in zip(block.dequantize(), (keys, values), ("key", "value"), strict=True):
        single = [packed(part, kind, **settings).dequantize() for part in x.split(64, 2)]
        assert torch.equal(restored, torch.cat(single, 2))


def test_blocks_of_different_layout_or_with_hidden_tokens_do_not_join() -> None:
    block, *_ = page_block(2)
    other, *_ = page_block(1, bits=3)
    assert block.join(other) is None
    assert block.crop(100).join(page_block(1)[0]) is None
    assert block.crop(128).join(page_block(1)[0]).length == 192


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 191, 192])
def test_a_cropped_block_restores_the_same_first_tokens_and_frees_whole_segments(length: int) -> None:
    block, *_ = page_block(3, rank=2, outliers=0.1)
    cropped = block.crop(length)
    assert cropped.keys.count == cropped.values.count == -(-length // 64)
    for a, b in zip(cropped.dequantize(), block.dequantize(), strict=True):
        assert torch.equal(a, b[:, :, :length])
    for name, stored in held(cropped).items():
        assert stored.untyped_storage().nbytes() == stored.nbytes, name


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 192), (128, 200), (192, 200), (0, 200)])
def test_part_of_a_long_segment_restores_its_tokens(settings: dict, start: int, stop: int) -> None:
    """The last page of 200 tokens is a short one, which no key group of 64 divides."""
    for kind in ("key", "value"):
        n = 256 if kind == "key" and settings.get("scheme", "kivi") == "kivi" else 200
        whole = packed(normal(2, 2, n, 32), kind, **settings)
        last = n if stop == 200 else stop
        part = whole.tokens_between(start, last)
        assert torch.allclose(part.dequantize(), whole.dequantize()[:, :, start:last], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("width", [16, 64])
def test_restoring_into_a_longer_tensor_writes_its_columns_and_no_other(bits: int, segments: int, width: int) -> None:
    """As a layer restores: rows, heads and segments lie apart there; the sum is formed here from the stored parts."""
    for kind in ("key", "value"):
        pieces = [
            packed(normal(2, 3, 64, width, seed=i), kind, bits=bits, rank=2, outliers=0.1) for i in range(segments)
        ]
        block = pieces[0]
        for piece in pieces[1:]:
            block = block.join(piece)
        out = torch.full((2, 3, 5 + 64 * segments + 7, width), 9.0)
        block.restore_into(out, 5)
        for i, piece in enumerate(pieces):
            left, right = piece.factors()
            expected = (piece.backbone() + left @ right.mT)[:, 0]
            for row in range(2):
                starts = piece.out_start[row, 0].tolist()
                for head in range(3):
                    for entry in range(starts[head], starts[head + 1]):
                        token, channel = int(piece.out_token[row, 0, entry]), int(piece.out_channel[row, 0, entry])
                        expected[row, head, token, channel] += piece.out_delta[row, 0, entry].float()
            assert torch.allclose(out[:, :, 5 + 64 * i : 69 + 64 * i], expected, atol=1e-5)
        assert (out[:, :, :5] == 9).all() and (out[:, :, 5 + 64 * segments :] == 9).all()


def test_a_range_of_tokens_of_several_segments_is_refused() -> None:
    block, *_ = page_block(2)
    with pytest.raises(ValueError, match="a block of 2 segments"):
        block.keys.tokens_between(0, 64)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"clip": True}, {"scheme": "kcvt", "value_vector": "all"}])
def test_what_stands_in_padding_changes_nothing_in_the_text(kind: str, settings: dict) -> None:
    x = normal(2, 2, 64, 16)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, :25] = False
    other = x.clone()
    other[1, :, :25] = 1e4 * normal(2, 25, 16, seed=3)
    a, b = (packed(y, kind, valid=valid, outliers=0.1, **settings).dequantize() for y in (x, other))
    assert torch.isfinite(b).all()
    assert torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1, :, 25:], b[1, :, 25:], atol=1e-3)


def test_a_row_of_nothing_but_padding_is_harmless() -> None:
    x = normal(2, 2, 64, 16)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1] = False
    for kind in ("key", "value"):
        block = packed(x, kind, valid=valid, outliers=0.1, rank=2, clip=True)
        assert torch.isfinite(block.dequantize()).all()
        alone = packed(x[:1], kind, outliers=0.1, rank=2, clip=True)
        assert torch.equal(block.dequantize()[:1], alone.dequantize())

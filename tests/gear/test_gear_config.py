"""Settings check themselves and say what would do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from zq_lib.gear import PRESETS, GearConfig


@pytest.mark.parametrize(
    ("settings", "name", "remedy"),
    [
        ({"bits": 5}, "bits=5", "2, 3, 4 or 8"),
        ({"bits": True}, "bits=True", "2, 3, 4 or 8"),
        ({"bits": (2, 16)}, "bits=16", "2, 3, 4 or 8"),
        ({"bits": (2, 3, 4)}, r"bits=\(2, 3, 4\)", r"a pair \(keys, values\)"),
        ({"scheme": "kivy"}, "scheme='kivy'", "kivi, kcvt, per_token"),
        ({"group": 0}, "group=0", "at least 2"),
        ({"group": 64.0}, "group=64.0", "at least 2"),
        ({"outliers": 1.0}, "outliers=1.0", "below 1"),
        ({"outliers": -0.1}, "outliers=-0.1", "at least 0"),
        ({"outliers": (0.02, "2%")}, "outliers='2%'", "0.02"),
        ({"outliers": float("nan")}, "outliers=nan", "0.02"),
        ({"rank": -1}, "rank=-1", "from 0 to 64"),
        ({"rank": 65}, "rank=65", "from 0 to 64"),
        ({"rank": 2.5}, "rank=2.5", "from 0 to 64"),
        ({"rank_decode": (2, 100)}, "rank_decode=100", "from 0 to 64"),
        ({"clip": 1}, "clip=1", "False or True"),
        ({"factor_bits": 4}, "factor_bits=4", "8 or 16"),
        ({"sinks": -1}, "sinks=-1", "at least 0"),
        ({"buffer": 0}, "buffer=0", "at least 1"),
        ({"buffer": 100}, "buffer=100", "use buffer=128"),
        ({"buffer": 20}, "buffer=20", "use buffer=64"),
        ({"recent": -4}, "recent=-4", "at least 0"),
        ({"prompt_segment": 0}, "prompt_segment=0", "at least 1"),
        ({"iterations": 0}, "iterations=0", "at least 1"),
        ({"seed": -1}, "seed=-1", "at least 0"),
        ({"seed": "0"}, "seed='0'", "at least 0"),
        ({"outlier_scope": "row"}, "outlier_scope='row'", "vector, head"),
        ({"outlier_round": "up"}, "outlier_round='up'", "nearest, floor, ceil"),
        ({"outlier_mode": "delta"}, "outlier_mode='delta'", "exact, paper"),
        ({"value_vector": "token"}, "value_vector='token'", "head, all"),
        ({"meta_dtype": "bfloat16"}, "meta_dtype='bfloat16'", "float16, float32"),
        ({"solver": "qr"}, "solver='qr'", "power, svd"),
        ({"backend": "cuda"}, "backend='cuda'", "auto, torch, triton"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_a_remedy(settings: dict, name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}.*{remedy}") as caught:
        GearConfig(**settings)
    assert "\n" not in str(caught.value)


def test_the_remedy_for_a_buffer_is_accepted() -> None:
    for buffer in (1, 20, 63, 65, 100, 1000):
        with pytest.raises(ValueError) as caught:
            GearConfig(buffer=buffer)
        GearConfig(buffer=int(str(caught.value).rpartition("=")[2]))


def test_a_buffer_needs_no_multiple_of_the_group_where_groups_do_not_run_along_tokens() -> None:
    for scheme in ("kcvt", "per_token"):
        assert GearConfig(scheme=scheme, buffer=20).buffer == 20


def test_the_paper_has_recipes_for_two_and_four_bits_only() -> None:
    assert GearConfig.paper(4).scheme == "kcvt" and GearConfig.paper(4).buffer == 20
    with pytest.raises(ValueError, match="bits=3 has no recipe in the paper; use 2 or 4"):
        GearConfig.paper(3)


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    config = GearConfig.paper()
    assert (config.bits, config.group, config.buffer, config.outliers) == (2, 64, 64, 0.02)
    assert (config.rank, config.rank_decode, config.iterations, config.sinks, config.clip) == (4, 2, 3, 0, False)


def test_pairs_set_keys_and_values_apart_and_lists_become_pairs() -> None:
    config = GearConfig(bits=[3, 2], outliers=(0.0, 0.05), clip=(False, True), rank=[2, 0])
    assert (config.keys.bits, config.values.bits) == (3, 2)
    assert (config.keys.outliers, config.values.outliers) == (0.0, 0.05)
    assert (config.keys.clip, config.values.clip) == (False, True)
    assert (config.keys.rank, config.values.rank) == (2, 0)
    assert config.keys.kind == "key" and config.values.kind == "value"
    assert config.keys.per_channel() and not config.values.per_channel()
    assert not config.but(scheme="per_token").keys.per_channel()
    assert hash(config) == hash(GearConfig(bits=(3, 2), outliers=(0.0, 0.05), clip=(False, True), rank=(2, 0)))


def test_settings_are_frozen_and_a_changed_copy_is_checked() -> None:
    config = GearConfig()
    with pytest.raises(FrozenInstanceError):
        config.bits = 4  # type: ignore[misc]
    assert config.but(bits=4).bits == 4 and config.bits == 2
    with pytest.raises(ValueError, match="bits=7"):
        config.but(bits=7)


def test_every_preset_can_be_made() -> None:
    assert set(PRESETS) == {"paper_2bit", "paper_4bit", "lite", "small", "balanced", "near_lossless"}
    for make in PRESETS.values():
        assert isinstance(make(), GearConfig)


def test_the_long_segment_is_four_buffers_unless_given() -> None:
    assert GearConfig().long_segment() == 256
    assert GearConfig(prompt_segment=100).long_segment() == 100

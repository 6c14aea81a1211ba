"""The pictures: each is drawn, and its description holds the numbers that were given."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core.figures import Figure, to_png
from zq_lib.gear import figures

torch.manual_seed(0)
KEYS, VALUES = torch.randn(2, 96, 16)
ROWS = [
    {"setting": "plain 2 bits", "bits": 2.5, "kl": 0.359, "kl_se": 0.04},
    {"setting": "plain 3 bits", "bits": 3.5, "kl": 0.028, "kl_se": 0.003},
    {"setting": "GEAR", "bits": 4.08, "kl": 0.181, "kl_se": 0.2},
    {"setting": "balanced", "bits": 3.5, "kl": 0.019, "kl_se": 0.003},
]
STREAM = [
    {"tokens": 70, "sinks": 4, "segments": [64], "buffer": 2, "bytes": 20_000, "dense": 53_800},
    {"tokens": 71, "sinks": 4, "segments": [64], "buffer": 3, "bytes": 20_700, "dense": 54_500},
    {"tokens": 200, "sinks": 4, "segments": [64, 128], "buffer": 4, "bytes": 40_000, "dense": 153_600},
]


def drawn(fig: Figure, *said: str) -> None:
    png = to_png(fig)
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for text in said:
        assert text in fig.caption, fig.caption


def test_channels_compares_the_largest_channel_with_the_median_one():
    striped = torch.ones(96, 16)
    striped[:, 3] = 12.0
    drawn(figures.channels(striped, torch.ones(96, 16)), "12.0 times the median", "it is 1.00 times")


def test_error_heatmap_says_the_relative_error_and_counts_the_outliers():
    marked = torch.zeros(96, 16, dtype=torch.bool)
    marked[5, 3] = marked[60, 8] = True
    drawn(
        figures.error_heatmap(KEYS, 1.1 * KEYS, marked, "A title"), "96 tokens by 16 channels", "0.100", "2 red marks"
    )
    assert "red" not in figures.error_heatmap(KEYS, KEYS).caption


def test_residual_spectrum_gives_the_share_at_the_rank():
    low_rank = torch.randn(3, 96, 4) @ torch.randn(3, 4, 16)
    fig = figures.residual_spectrum({"keys": low_rank, "white noise": torch.eye(16)[None]}, rank=4)
    drawn(fig, "At rank 4: keys 1.00; white noise 0.250")


def test_error_ladder_names_both_errors_of_every_step():
    drawn(figures.error_ladder([{"setting": "2 bits", "keys": 0.234, "values": 0.526}]), "2 bits 0.234 and 0.526")


def test_bytes_over_tokens_uses_a_fitting_unit_and_the_last_point():
    rows = [{"name": n, "tokens": t, "bytes": t * size} for n, size in (("a", 1e6), ("b", 2e4)) for t in (1024, 4096)]
    drawn(figures.bytes_over_tokens(rows), "a 4.10 GB at 4096", "b 0.0819 GB at 4096")
    drawn(figures.bytes_over_tokens([r for r in rows if r["name"] == "b"]), "b 81.9 MB at 4096")


def test_size_bar_adds_the_components_up():
    parts = {"codes": 1_000_000, "metadata": 250_000, "low rank": 0, "exact": 500_000}
    fig = figures.size_bar({"plain": parts, "small": {"codes": 1_000_000}}, 8_000_000)
    drawn(fig, "against 8.00 MB", "plain 1.75 MB (codes 1.00, metadata 0.250, exact 0.500)", "small 1.00 MB")


def test_every_component_that_a_cache_counts_has_a_colour_of_its_own():
    from zq_lib.gear.packed import COMPONENTS

    assert set(COMPONENTS) | {"exact", "positions", "other layers"} == set(figures.COMPONENTS)
    assert len(set(figures.COMPONENTS.values())) == len(figures.COMPONENTS)


def test_equal_bytes_sorts_by_bits_and_gives_a_panel_per_text():
    one = figures.equal_bytes(ROWS)
    drawn(one, "plain 2 bits 2.50 bits 0.359", "GEAR 4.08 bits 0.181")
    assert one.caption.index("balanced") < one.caption.index("GEAR")
    assert len(one.figure.axes) == 1
    two = figures.equal_bytes([{**r, "text": t} for t in ("first", "second") for r in ROWS])
    drawn(two, "first: plain 2 bits", "second: plain 2 bits")
    assert len(two.figure.axes) == 2


def test_the_family_of_a_setting_is_read_from_its_name():
    names = ("plain 3 bits", "GEAR-L", "paper_2bit", "lite", "balanced")
    assert [figures.family(n) for n in names] == ["plain", "gear", "gear", "gear", "other"]


@pytest.mark.parametrize(("tokens", "packed"), [(70, "64 are packed in 1 segments"), (200, "192 are packed in 2")])
def test_stream_says_what_is_exact_and_what_is_packed(tokens: int, packed: str):
    drawn(figures.stream(STREAM, tokens), f"A strip of {tokens} tokens", "4 sinks", packed)


def test_lines_that_end_together_are_labelled_apart():
    levels = figures._spread([1.0, 1.0, 0.9, 3.0], 0.2)
    assert levels == pytest.approx([1.1, 1.3, 0.9, 3.0])

from __future__ import annotations

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from zq_lib.core.figures import PALETTE, Figure, number, show, style, subplots, table, to_png

CAPTION = "A line over <x>: y reaches 4.00."


def line() -> Figure:
    with style():
        fig, axes = subplots(width=4, height=3)
        axes.plot([0, 1, 2], [0, 1, 4])
        axes.set_title("$x^2$ grows")
    return Figure(fig, CAPTION)


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict | None]]:
    """What a notebook would receive: data and metadata of each display."""
    calls: list[tuple[dict, dict | None]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, metadata=None, raw=None: calls.append((data, metadata)))
    return calls


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_the_same_figure_gives_the_same_bytes_without_a_software_tag():
    assert to_png(line()) == to_png(line())
    assert b"matplotlib" not in to_png(line()).lower()


def test_the_reader_s_own_settings_change_neither_the_picture_nor_are_they_changed():
    expected = to_png(line())
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "axes.facecolor": "red"}):
        assert to_png(line()) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_the_style_uses_the_bundled_font_at_ten_points_or_more():
    with style():
        font = matplotlib.font_manager.findfont("DejaVu Sans", fallback_to_default=False)
        assert font.startswith(matplotlib.get_data_path())
        for key in ("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize", "axes.labelsize"):
            assert matplotlib.rcParams[key] >= 10


def test_lines_differ_by_dash_as_well_as_by_colour():
    with style():
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
    assert len({str(s) for s in cycle["linestyle"]}) == len(set(cycle["color"])) == 6


def test_the_colours_are_distinct_and_dark_enough_on_white():
    assert len(set(PALETTE.values())) == len(PALETTE)
    for colour in PALETTE.values():
        assert 1.05 / (luminance(colour) + 0.05) > 2  # a mark of two points' width; text is always black
    for a, b in itertools.combinations(PALETTE.values(), 2):
        assert sum(abs(int(a[i : i + 2], 16) - int(b[i : i + 2], 16)) for i in (1, 3, 5)) > 60


def test_show_gives_picture_with_description_and_the_caption_below(displayed):
    show(line())
    (picture, metadata), (below, _) = displayed
    assert picture["text/plain"] == below["text/plain"] == CAPTION
    assert metadata["image/png"] == {"alt": CAPTION, "width": 384}  # four inches at the 96 pixels of a screen
    assert set(picture) == {"image/png", "text/plain"}  # in HTML the picture's bytes would be compared
    assert below["text/html"] == "<p>A line over &lt;x&gt;: y reaches 4.00.</p>"


def test_a_figure_made_with_pyplot_is_not_left_open(displayed):
    with style():
        fig, _ = plt.subplots()
    show(Figure(fig, CAPTION))
    assert not plt.fignum_exists(fig.number)


def test_a_figure_without_description_is_refused():
    fig, _ = subplots()
    with pytest.raises(TypeError, match="show needs a zq_lib.core.figures.Figure"):
        show(fig)
    for caption in ("", " ", "two\nlines", None):
        with pytest.raises(ValueError, match="caption must be one or two sentences"):
            Figure(fig, caption)
    with pytest.raises(TypeError, match="figure must be a matplotlib Figure, got str"):
        Figure("a path", CAPTION)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"), (1 / 3, "0.333"), (0.3, "0.300"), (1.0, "1.00"), (99.96, "100"), (1234.5, "1230"),
        (-0.5, "-0.500"), (0.0, "0"), (-0.0, "0"), (2e-7, "2.00e-07"), (1.5e9, "1.50e+09"), (float("nan"), "nan"),
        (float("-inf"), "-inf"), (12345, "12345"), (True, "yes"), (np.bool_(False), "no"), (None, "–"),
        ("word", "word"), (np.float32(0.1), "0.100"), (torch.tensor(0.25), "0.250"), (torch.tensor(3), "3"),
        (0.99999, "1.00"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


def test_a_table_reads_the_same_as_markdown_and_as_text():
    shown = table([["a|b", 1 / 3, True], ["c", None, False]], ["name", "error", "holds"])
    assert shown.markdown() == (
        "| name | error | holds |\n| --- | ---: | ---: |\n| a\\|b | 0.333 | yes |\n| c | – | no |"
    )
    assert str(shown) == "name  error  holds\na|b   0.333    yes\nc         –     no"
    assert shown._repr_mimebundle_() == {"text/markdown": shown.markdown(), "text/plain": str(shown)}


def test_an_empty_table_shows_its_headers():
    assert table([], ["name"]).markdown() == "| name |\n| --- |"


def test_a_row_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"row 1 has 1 cells but there are 2 headers: \['a', 'b'\]"):
        table([[1, 2], [3]], ["a", "b"])

from __future__ import annotations

import base64
import html

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from zq_lib.core.figures import Figure, subplots
from zq_lib.core.widgets import Explorer


def draw(power: int) -> Figure:
    if power == 3:
        raise ValueError("3 is <odd>")
    fig, axes = subplots(width=3, height=2)
    axes.plot([0, 1, 2], [x**power for x in (0, 1, 2)])
    return Figure(fig, f'A "line": y reaches {2**power}.')


def explorer() -> Explorer:
    return Explorer(draw, power=ipywidgets.IntSlider(value=2, min=1, max=4))


def test_the_default_state_is_drawn_at_once_and_stored_in_every_form():
    shown = explorer()
    data, metadata = shown._repr_mimebundle_()
    assert data["text/plain"] == shown.caption == 'A "line": y reaches 4.'
    assert base64.b64decode(data["image/png"]) == shown.png
    assert data["image/png"] in shown.picture.value
    assert metadata["image/png"]["alt"] == shown.caption
    assert "application/vnd.jupyter.widget-view+json" in data


def test_moving_a_control_changes_picture_description_and_caption_together():
    shown = explorer()
    before = shown.png
    shown.controls["power"].value = 4
    assert shown.png != before
    assert shown.caption == 'A "line": y reaches 16.'
    assert shown.picture.value.count(html.escape(shown.caption)) == 2  # alt and figcaption
    assert base64.b64encode(shown.png).decode() in shown.picture.value


def test_every_control_is_labelled_and_answers_on_release():
    alpha = ipywidgets.FloatText(description="α")
    shown = Explorer(lambda head_count, alpha: draw(2), head_count=ipywidgets.IntSlider(), alpha=alpha)
    assert [c.description for c in shown.controls.values()] == ["head count", "α"]
    assert not any(c.continuous_update for c in shown.controls.values())
    assert shown.children == (*shown.controls.values(), shown.picture)


def test_a_setting_that_can_not_be_drawn_says_so_and_the_next_one_recovers():
    shown = explorer()
    shown.controls["power"].value = 3
    assert shown.picture.value == '<p role="alert">These settings can not be drawn: 3 is &lt;odd&gt;</p>'
    assert shown._repr_mimebundle_()[0]["text/plain"].endswith("3 is <odd>")
    shown.controls["power"].value = 1
    assert shown.caption == 'A "line": y reaches 2.' and shown.png


def test_a_default_that_can_not_be_drawn_is_the_author_s_error():
    with pytest.raises(ValueError, match="3 is <odd>"):
        Explorer(draw, power=ipywidgets.IntSlider(value=3))


def test_a_matplotlib_figure_needs_a_describe_function_and_is_closed():
    def bare(size):
        fig, _ = plt.subplots(figsize=(2, size))
        return fig

    shown = Explorer(bare, lambda size: f"Empty axes, {size} high.", size=ipywidgets.IntSlider(value=2))
    assert shown.caption == "Empty axes, 2 high."
    assert plt.get_fignums() == []
    with pytest.raises(TypeError, match="draw returned Figure without a caption: pass describe"):
        Explorer(bare, size=ipywidgets.IntSlider(value=2))
    plt.close("all")


def test_controls_must_be_widgets_with_value_and_label():
    with pytest.raises(ValueError, match="at least one control"):
        Explorer(draw)
    with pytest.raises(TypeError, match="control 'power' must be an ipywidget with a value and a label, got int"):
        Explorer(draw, power=3)
    with pytest.raises(TypeError, match="got VBox"):
        Explorer(draw, power=ipywidgets.VBox())

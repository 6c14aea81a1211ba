"""The explorer: sliders beside a picture that is drawn before anybody touches them."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure as Canvas

from zq_lib.core.figures import Figure, close, markup, picture_bundle, style, to_png


class Explorer(ipywidgets.VBox):
    """A picture that follows its controls.

    `draw(**values)` returns a `core.figures.Figure`, or a matplotlib figure if `describe(**values)` gives the sentence
    that goes with it. Each control is an ipywidget with a value; without a description it is labelled by its name.

    The default state is drawn at once and stored in three forms: live widget, PNG with alternative text for viewers
    without a kernel, and the sentence, which is what notebook validation compares. Picture, alternative text and
    caption are one element, so they can not disagree, and no output of the notebook is updated.

        Explorer(draw, alpha=ipywidgets.FloatSlider(value=0.5, min=0, max=1))
    """

    def __init__(
        self,
        draw: Callable[..., Figure | Canvas],
        describe: Callable[..., str] | None = None,
        **controls: ipywidgets.Widget,
    ) -> None:
        if not controls:
            raise ValueError("Explorer needs at least one control, for example alpha=ipywidgets.FloatSlider()")
        for name, control in controls.items():
            if not isinstance(control, ipywidgets.ValueWidget) or not control.has_trait("description"):
                raise TypeError(
                    f"control {name!r} must be an ipywidget with a value and a label, got {type(control).__name__}"
                )
        self.draw, self.describe, self.controls = draw, describe, controls
        self.caption, self.png = "", b""
        self.picture = ipywidgets.HTML()
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.style.description_width = "initial"  # labels are never cut off
            if control.has_trait("continuous_update"):
                control.continuous_update = False  # a model answers per release, not per pixel
        self._redraw()
        for control in controls.values():
            control.observe(self._refresh, "value")
        super().__init__([*controls.values(), self.picture])

    @property
    def values(self) -> dict[str, Any]:
        """What the controls are set to."""
        return {name: control.value for name, control in self.controls.items()}

    def _redraw(self) -> None:
        values = self.values
        with style():
            drawn = self.draw(**values)
        if self.describe is not None:
            drawn = Figure(drawn.figure if isinstance(drawn, Figure) else drawn, self.describe(**values))
        elif not isinstance(drawn, Figure):
            raise TypeError(
                f"draw returned {type(drawn).__name__} without a caption: pass describe=... or return a core Figure"
            )
        self.png, self.caption = to_png(drawn), drawn.caption
        close(drawn)
        self.picture.value = markup(self.png, self.caption)

    def _refresh(self, _: object) -> None:
        try:
            self._redraw()
        except Exception as error:  # raised in a callback it would vanish in the log, and a stale picture would stay
            self.png, self.caption = b"", f"These settings can not be drawn: {error}"
            self.picture.value = f'<p role="alert">{html.escape(self.caption)}</p>'

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data = super()._repr_mimebundle_(**kwargs)
        if not self.png:
            return {**data, "text/plain": self.caption}, {}
        picture, metadata = picture_bundle(self.png, self.caption)
        return {**data, **picture}, metadata

"""Figures and tables that read the same for everybody: one style, a description with every picture, three digits.

A picture is never compared between machines; the sentence that comes with it is. So its numbers belong there.
"""

from __future__ import annotations

import base64
import html
import io
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

# Okabe and Ito's colours, told apart under the common kinds of colour blindness; grey is for baselines.
PALETTE: dict[str, str] = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#6E6E6E",
    "black": "#000000",
}
DPI = 144  # one and a half times the 96 of a screen: sharp, and still small enough to commit
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # bundled with matplotlib, so the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "image.cmap": "cividis",
    # Lines differ by dash as well as by colour.
    "axes.prop_cycle": cycler(color=list(PALETTE.values())[:6]) + cycler(linestyle=_LINES),
}


_DRAWING = threading.RLock()  # the settings are matplotlib's own, one set for all threads


@contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style, whatever the reader's own matplotlib settings are; they come back afterwards.

    matplotlib reads its settings when a line or a text is made, so all drawing belongs inside:

        with style():
            fig, axes = subplots()
            axes.plot(...)
    """
    with _DRAWING, matplotlib.style.context(["default", _STYLE]):
        yield


def subplots(rows: int = 1, cols: int = 1, *, width: float = 7.0, height: float = 4.0) -> tuple[Canvas, Any]:
    """A new figure of `width` x `height` inches and its axes, as pyplot's function of this name gives them.

    The figure is not registered with pyplot: nothing has to be closed, and a notebook does not show it twice.
    """
    canvas = Canvas(figsize=(width, height))
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(rows, cols)


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure and its description: one or two sentences with the kind of plot, the axes and the finding
    in numbers. The description is caption, alternative text and what the tests compare."""

    figure: Canvas
    caption: str

    def __post_init__(self) -> None:
        if not isinstance(self.figure, Canvas):
            raise TypeError(f"figure must be a matplotlib Figure, got {type(self.figure).__name__}")
        if not isinstance(self.caption, str) or not self.caption.strip() or "\n" in self.caption:
            raise ValueError(f"caption must be one or two sentences on a single line, got {self.caption!r}")


def to_png(fig: Figure | Canvas) -> bytes:
    """The picture as PNG. The same figure gives the same bytes: fixed font and resolution, no software tag."""
    canvas = fig.figure if isinstance(fig, Figure) else fig
    buffer = io.BytesIO()
    with style():  # fonts are looked up while drawing
        canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def close(fig: Figure | Canvas) -> None:
    """Forget the figure if pyplot keeps it; otherwise a notebook would show it a second time, without caption."""
    import matplotlib.pyplot as plt

    plt.close(fig.figure if isinstance(fig, Figure) else fig)


def width_on_screen(png: bytes) -> int:
    """Width in CSS pixels at which the picture's points have the size of the text around it."""
    return round(struct.unpack(">I", png[16:20])[0] * 96 / DPI)


def markup(png: bytes, caption: str) -> str:
    """An HTML figure with embedded picture, alternative text and caption."""
    text = html.escape(caption)
    return (
        f'<figure style="margin: 0"><img alt="{text}" width="{width_on_screen(png)}" '
        f'style="max-width: 100%; height: auto" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def caption_markup(caption: str) -> str:
    """The caption as the HTML paragraph that `show` puts below a picture."""
    return f"<p>{html.escape(caption)}</p>"


def picture_bundle(png: bytes, caption: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Data and metadata with which Jupyter shows the picture, its text and its alternative text."""
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": caption}
    return data, {"image/png": {"alt": caption, "width": width_on_screen(png)}}


def show(fig: Figure) -> None:
    """Show the picture with its caption below it. JupyterLab drops alternative texts, so the caption is visible.

    Raises TypeError for a bare matplotlib figure: it has no description.
    """
    if not isinstance(fig, Figure):
        raise TypeError(f"show needs a zq_lib.core.figures.Figure (figure and caption), got {type(fig).__name__}")
    from IPython.display import display  # comes with the notebooks extra; apps use to_png without it

    data, metadata = picture_bundle(to_png(fig), fig.caption)
    close(fig)
    display(data, metadata=metadata, raw=True)
    display({"text/html": caption_markup(fig.caption), "text/plain": fig.caption}, raw=True)


def number(value: object) -> str:
    """A value as a table or caption prints it: three significant digits, so that two machines agree.

    >>> number(0.0123456), number(1234.5), number(2e-7), number(12), number(True), number(None)
    ('0.0123', '1230', '2.00e-07', '12', 'yes', '–')
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of torch or numpy
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, Real) or isinstance(value, Integral) or not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.2e}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if not -4 <= exponent < 6:
        return f"{rounded:.2e}"
    return f"{rounded:.{max(0, 2 - exponent)}f}"


@dataclass(frozen=True)
class Table:
    """Cells as text. Jupyter shows the markdown; the plain text is for terminals."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # per column: aligned to the right

    def markdown(self) -> str:
        rule = ["---:" if right else "---" for right in self.numeric]
        cells = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in (self.headers, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))

    def __str__(self) -> str:
        lines = (self.headers, *self.rows)
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.headers))]
        return "\n".join(
            "  ".join(
                c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, self.numeric, strict=True)
            ).rstrip()
            for row in lines
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/markdown": self.markdown(), "text/plain": str(self)}


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> Table:
    """A table for the last line of a cell; numbers get three significant digits, whole numbers stay whole.

    Raises ValueError if a row is not as long as `headers`.
    """
    for i, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(f"row {i} has {len(row)} cells but there are {len(headers)} headers: {list(headers)}")
    numeric = tuple(
        bool(rows) and all(row[i] is None or isinstance(row[i], Real) or hasattr(row[i], "item") for row in rows)
        for i in range(len(headers))
    )
    return Table(tuple(map(str, headers)), tuple(tuple(map(number, row)) for row in rows), numeric)

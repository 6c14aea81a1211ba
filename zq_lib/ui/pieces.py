"""Pieces of a page as HTML. Every text goes through `escape`, so what a user types is never markup."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from zq_lib.core import figures


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], caption: str) -> str:
    """A table with a caption; numbers have three significant digits and stand to the right."""
    cells = figures.table(rows, headers)

    def row(tag: str, texts: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = [' class="n"' if right else "" for right in cells.numeric]
        parts = [f"<{tag}{scope}{kind}>{escape(t)}</{tag}>" for t, kind in zip(texts, kinds, strict=True)]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row("td", r) for r in cells.rows)
    return (
        f'<div class="zq-table"><table><caption>{escape(caption)}</caption><thead>{row("th", cells.headers)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(figure: figures.Figure) -> str:
    """The figure with its description as alternative text and as caption."""
    return figures.markup(figures.to_png(figure), figure.caption)


def paragraph(text: str) -> str:
    """Plain text, whatever it contains."""
    return f"<p>{escape(text)}</p>"

"""Marking by choosing words: the text with *stars* as a list of words, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from zq_lib.pasta import MarkupError, escape, parse


@dataclass(frozen=True)
class Words:
    """Words of the plain text and which of them are emphasised, by position."""

    plain: str
    words: tuple[str, ...]
    chosen: frozenset[int]


def read(text: str) -> Words:
    """Split marked text at white space. Raises MarkupError for emphasis that cannot be read."""
    marked = parse(text)
    found = list(re.finditer(r"\S+", marked.text))
    chosen = frozenset(
        i
        for i, m in enumerate(found)
        if any(s.weight > 0 and s.start < m.end() and m.start() < s.end for s in marked.spans)
    )
    return Words(marked.text, tuple(m.group() for m in found), chosen)


def write(plain: str, chosen: Collection[int]) -> str:
    """Plain text with stars around the words at `chosen`, neighbours under one pair; special characters are escaped
    only where they would be read as marks.

    >>> write("Say only this.", {1, 2})
    'Say *only this.*'
    """
    spans = [m.span() for m in re.finditer(r"\S+", plain)]
    wanted = Words(plain, tuple(plain[a:b] for a, b in spans), frozenset(chosen))
    runs: list[list[int]] = []
    for i in sorted(wanted.chosen):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])

    def source(quote: Callable[[str], str]) -> str:
        parts, at = [], 0
        for first, last in runs:
            start, end = spans[first][0], spans[last][1]
            parts += [quote(plain[at:start]), f"*{quote(plain[start:end])}*"]
            at = end
        return "".join([*parts, quote(plain[at:])])

    simple = source(str)
    try:
        if read(simple) == wanted:
            return simple
    except MarkupError:
        pass
    return source(escape)

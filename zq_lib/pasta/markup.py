"""Emphasis markup: text with marks in, plain text and weighted character spans out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_TAG = re.compile(r"</?em>", re.IGNORECASE)
_WEIGHT = re.compile(r":([+-]?(?:\d+\.?\d*|\.\d+))\Z")
_RUN = re.compile(r"\*+|=+")
_SPECIAL = "\\*=<("
MAX_WEIGHT = 4.0  # alpha ** (1 - 4) is already a millionfold at alpha = 0.01


class MarkupError(ValueError):
    """Emphasis that cannot be read: unclosed, crossed, empty, or of a weight out of range."""


@dataclass(frozen=True, order=True)
class Span:
    """Characters [start, end) of the plain text, with a weight: 1 is ordinary emphasis, 0 none, below 0 hides."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class MarkedText:
    """Plain text and its emphasised spans."""

    text: str
    spans: tuple[Span, ...] = ()


@dataclass
class _Open:
    mark: str
    at: int  # where it stands in the source, for messages
    out: int  # where the emphasised text begins in the plain text
    inner: list[Span] = field(default_factory=list)


def parse(source: str) -> MarkedText:
    """Read `*this*`, `**this**`, `==this==`, `<em>this</em>` and `(this:1.5)`.

    Marks nest and may touch; where they overlap the largest weight counts. A backslash before `*`, `=`, `<`, `(` or
    `\\` takes the character literally, as does a star or `==` between spaces (`2 * 3`); plain parentheses are text.

    >>> parse("Say (softly:0.5).")
    MarkedText(text='Say softly.', spans=(Span(start=4, end=10, weight=0.5),))

    Raises MarkupError for emphasis that is unclosed, empty, crossed, or whose weight is not within -4 to 4.
    """
    out: list[str] = []  # one character each
    stack = [_Open("", 0, 0)]

    def close(mark: str, at: int) -> None:
        while stack[-1].mark == "(":  # a parenthesis that never closed is text
            done = stack.pop()
            stack[-1].inner += done.inner
        top = stack.pop()
        if top.mark != mark:
            raise MarkupError(
                f"{_near(source, at)} closes {mark!r} while {top.mark!r} from character {top.at} is still open; "
                "close the inner emphasis first"
            )
        _add(stack[-1], top, 1.0)

    def _add(parent: _Open, top: _Open, weight: float) -> None:
        if not "".join(out[top.out :]).strip():
            raise MarkupError(f"{_near(source, top.at)} emphasises nothing; put a word between the marks")
        parent.inner += [*top.inner, Span(top.out, len(out), weight)]

    i = 0
    while i < len(source):
        char = source[i]
        if char == "\\" and i + 1 < len(source) and source[i + 1] in _SPECIAL:
            out.append(source[i + 1])
            i += 2
        elif tag := _TAG.match(source, i):
            if source[i + 1] == "/":
                if not any(o.mark == "<em>" for o in stack):
                    raise MarkupError(
                        f"{_near(source, i)} closes an emphasis that was never opened; add <em> before it"
                    )
                close("<em>", i)
            else:
                stack.append(_Open("<em>", i, len(out)))
            i = tag.end()
        elif char == "*" or source.startswith("==", i):
            mark = _delimiter(source, i, stack)
            if mark and any(o.mark == mark for o in stack):
                close(mark, i)
            elif mark and not _space_after(source, i + len(mark)):
                stack.append(_Open(mark, i, len(out)))
            else:
                mark = mark or _RUN.match(source, i)[0]
                out += mark
            i += len(mark)
        elif char == "(":
            stack.append(_Open("(", i, len(out)))
            out.append("(")
            i += 1
        elif char == ")" and stack[-1].mark == "(":
            top = stack.pop()
            inside = "".join(out[top.out + 1 :])
            if found := _WEIGHT.search(inside):
                weight = float(found[1])
                if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
                    raise MarkupError(
                        f"{_near(source, top.at)} has weight {found[1]}; use one between -4 and 4, "
                        f"or write {chr(92)}( for the character itself"
                    )
                out[top.out :] = inside[: found.start()]
                moved = [Span(s.start - 1, min(s.end - 1, len(out)), s.weight) for s in top.inner]
                top.inner = [s for s in moved if s.start < s.end]  # a mark on the weight itself is gone with it
                _add(stack[-1], top, weight)
            else:
                out.append(")")
                stack[-1].inner += top.inner
            i += 1
        elif char == ")" and (crossed := _crossed_weight(source, i, stack)):
            raise MarkupError(
                f"{_near(source, i)} closes '(' while {crossed.mark!r} from character {crossed.at} is still open; "
                "close the inner emphasis first"
            )
        else:
            out.append(char)
            i += 1
    while len(stack) > 1:
        top = stack.pop()
        if top.mark != "(":
            raise MarkupError(
                f"{_near(source, top.at)} opens {top.mark!r} and never closes it; "
                f"close it, or write {chr(92)}{top.mark[0]} for the character itself"
            )
        stack[-1].inner += top.inner
    return MarkedText("".join(out), tuple(sorted(stack[0].inner)))


def escape(text: str) -> str:
    """Text that `parse` gives back unchanged, with no emphasis."""
    return re.sub(r"([\\*=<(])", r"\\\1", text)


def _delimiter(source: str, i: int, stack: list[_Open]) -> str:
    """Which mark the characters at `i` are, given what is open; '' when they stand between spaces."""
    run = len(_RUN.match(source, i)[0])
    if _is_space(source, i - 1) and _space_after(source, i + run):
        return ""
    if source[i] == "=":
        return "=="
    top = next((o.mark for o in reversed(stack) if o.mark != "("), "")
    if run == 1 or (top == "*" and run % 2):
        return "*"
    return "**"


def _crossed_weight(source: str, i: int, stack: list[_Open]) -> _Open | None:
    """The mark that is open inside the `(text:weight` which the parenthesis at `i` would close, if there is one."""
    opened = next((at for at in range(len(stack) - 1, 0, -1) if stack[at].mark == "("), None)
    return stack[-1] if opened and _WEIGHT.search(source, stack[opened].at, i) else None


def _is_space(source: str, i: int) -> bool:
    return i < 0 or source[i].isspace()


def _space_after(source: str, i: int) -> bool:
    return i >= len(source) or source[i].isspace()


def _near(source: str, at: int) -> str:
    return f"text={source[max(0, at - 12) : at + 12]!r}, character {at}:"

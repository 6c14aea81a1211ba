"""Where a batch's texts lie on the key axis: padding before, between and after, and keys that a cache has dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Where one text lies on the key axis: real keys in [first, last), `gap` places missing after the sinks."""

    first: int
    last: int
    gap: int = 0
    real: Tensor | None = None  # indices of the real keys when padding stands between them


@dataclass(frozen=True)
class Layout:
    """The texts of a batch, one for all rows or one per row, and the arguments they were read from."""

    texts: tuple[Text, ...]
    position: Tensor | None
    padding: Tensor | None


@dataclass(frozen=True)
class Rule:
    """What `local_attention` was told of one span."""

    span: int | None
    kind: str
    sinks: int
    scale: float
    softcap: float | None

    @property
    def back(self) -> int:
        """Keys before a chunk that its queries may see, besides sinks."""
        return {"window": self.span - 1, "block": 0, "two_block": self.span}[self.kind]

    def earliest(self, place: int) -> int:
        """The first place that a query at `place` sees, besides sinks."""
        if self.kind == "window":
            return max(0, place - self.span + 1)
        return max(0, place // self.span * self.span - self.back)


def read_layout(
    shape: Sequence[int], keys: int, rules: Iterable[Rule], position: Tensor | None, padding: Tensor | None
) -> Layout:
    """Read `position` and `padding` into where each row's text lies. On a GPU this waits for what they say.

    `shape` is that of the queries [B, H, T, D]. Raises ValueError for a wrong shape, for positions of another form, and
    for a dropped key that a query sees.
    """
    B, T = shape[0], shape[2]
    if padding is not None:
        if padding.shape != (B, keys) or padding.dtype != torch.bool:
            raise ValueError(
                f"padding is {padding.dtype} {tuple(padding.shape)}; give bool ({B}, {keys}), True is real"
            )
        padding = None if bool(padding.all()) else padding
    if position is not None and position.shape not in ((keys,), (B, keys), (1, keys)):
        raise ValueError(f"position has shape {tuple(position.shape)}; give ({keys},) or ({B}, {keys})")
    if padding is None:
        texts = [Text(0, keys)]
    else:
        texts = [_text_of(row) for row in padding.cpu()]
        if texts[0].real is None and all(text == texts[0] for text in texts):
            texts = texts[:1]
    if position is not None:
        places = position.cpu().reshape(-1, keys)
        rows = max(len(places), len(texts))
        texts = [
            _placed(texts[b % len(texts)], places[b % len(places)], keys - T, rules) for b in range(rows)
        ]  # fmt: skip
    return Layout(tuple(texts), position, padding)


def _text_of(real: Tensor) -> Text:
    """Read one row of padding, [S] bool."""
    index = real.nonzero()[:, 0]
    if not len(index):
        return Text(0, 0)
    first, last = int(index[0]), int(index[-1]) + 1
    return Text(first, last, real=None if last - first == len(index) else index)


def _placed(text: Text, place: Tensor, past: int, rules: Iterable[Rule]) -> Text:
    """The text with the gap that its positions show. `past`: keys before the first query on the key axis."""
    index = torch.arange(text.first, text.last) if text.real is None else text.real
    if not len(index):
        return text
    place, order = place[index], torch.arange(len(index))
    gap = int(place[-1]) - len(index) + 1
    queries = int((index >= past).sum())
    for rule in rules:
        wanted = torch.where(order < rule.sinks, order, order + gap)
        if gap < 0 or not torch.equal(place, wanted):
            raise ValueError(
                f"position {place.tolist()[:8]}... is not the text's first {rule.sinks} places (the sinks) and then "
                "consecutive ones; give where each real key stands, counted from the first real token"
            )
        first = len(index) - queries + gap
        earliest = 0 if rule.span is None else rule.earliest(first)
        if gap and queries and earliest < min(rule.sinks, len(index)) + gap:
            raise ValueError(
                f"position says that the cache dropped places {rule.sinks} to {rule.sinks + gap - 1}, but the query at "
                f"{first} sees from {earliest} on with {rule.kind} {rule.span}; keep more keys"
            )
    return replace(text, gap=gap)

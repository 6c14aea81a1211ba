"""From marked text to token ids with a weight on every token, through the tokenizer's own offsets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zq_lib.pasta.markup import MarkedText, Span, parse

Message = Mapping[str, str]
Source = str | MarkedText | Sequence[Message]
_SENTINEL = "\ue000{}\ue001"  # private-use characters, found again after the chat template has run


@dataclass(frozen=True)
class Prompt:
    """A batch of B prompts of T tokens, padded.

    input_ids, attention_mask [B, T] int64; weights [B, T] float32 (0 where unmarked); marked, special [B, T] bool;
    message [B, T] int64: which chat message a token belongs to, -1 for the template's own and for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor
    marked: Tensor
    special: Tensor
    message: Tensor
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What `model.generate(**prompt.inputs)` takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def position_ids(self) -> Tensor:
        """Positions that do not count padding, [B, T]: for a plain forward of a left-padded batch."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with its tensors on `device`."""
        moved = {n: getattr(self, n).to(device) for n in _TENSORS}
        return replace(self, **moved)


_TENSORS = ("input_ids", "attention_mask", "weights", "marked", "special", "message")


def encode(
    tokenizer: PreTrainedTokenizerBase,
    source: Source | Sequence[Source],
    *,
    markup: bool = True,
    padding_side: str = "left",
    max_length: int | None = None,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Tokenise marked text, chats or `MarkedText`, one or a list of them, and find the tokens under each mark.

    A chat is a list of {"role", "content"} messages, rendered by the tokenizer's chat template; marks stand inside the
    contents. With `markup=False` the text is taken literally (give `MarkedText` to mark spans by position).
    `max_length` cuts each prompt on the tokenizer's truncation side; a mark that is cut off entirely is a warning.

    A token belongs to a span if, without its surrounding white space, it shares a character with the span.

    Raises ValueError for an empty batch, text longer than the tokenizer's context, a tokenizer without offsets or chat
    template, and a template that changes a marked message; MarkupError for emphasis that cannot be read.

    >>> encode(tokenizer, "The *blue* door").marked.sum()
    tensor(1)
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r} is not known; use 'left' (for generation) or 'right'")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={type(tokenizer).__name__} gives no character offsets; load its fast version")
    sources = [source] if _is_single(source) else list(source)
    if not sources:
        raise ValueError("source=[] is an empty batch; give at least one text")
    rendered = [_render(tokenizer, s, markup, add_generation_prompt) for s in sources]
    rows = [_tokenise(tokenizer, *r, max_length) for r in rendered]
    width = max(len(r["ids"]) for r in rows)
    fill = {
        "ids": tokenizer.pad_token_id or 0,
        "mask": 0,
        "weights": 0.0,
        "marked": False,
        "special": False,
        "message": -1,
    }
    columns = {}
    for name, value in fill.items():
        padded = []
        for row in rows:
            pad = [value] * (width - len(row[name]))
            padded.append(pad + row[name] if padding_side == "left" else row[name] + pad)
        columns[name] = torch.tensor(padded)
    return Prompt(
        columns["ids"], columns["mask"], columns["weights"].float(), columns["marked"], columns["special"],
        columns["message"], tuple(r[0].text for r in rendered), tuple(r[0].spans for r in rendered),
    )  # fmt: skip


def _is_single(source: Any) -> bool:
    if isinstance(source, str | MarkedText):
        return True
    return bool(source) and isinstance(source[0], Mapping)


def _render(
    tokenizer: PreTrainedTokenizerBase, source: Source, markup: bool, add_generation_prompt: bool
) -> tuple[MarkedText, list[tuple[int, int]], bool]:
    """The final string with its spans, the character range of every message, and whether it was a chat."""
    read = parse if markup else MarkedText
    if isinstance(source, str):
        source = read(source)
    if isinstance(source, MarkedText):
        if not source.text:
            raise ValueError("source='' has no text; give at least one word")
        return source, [(0, len(source.text))], False
    if not tokenizer.chat_template:
        raise ValueError("source is a chat, but this tokenizer has no chat template; give plain text instead")
    marked = []
    for i, message in enumerate(source):
        content = message.get("content")
        if not isinstance(content, str | MarkedText):
            raise ValueError(f"message {i} has content {content!r}; give a string or MarkedText")
        marked.append(read(content) if isinstance(content, str) else content)

    def template(contents: list[str]) -> str:
        messages = [{**m, "content": c} for m, c in zip(source, contents, strict=True)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    # Rendering once with a private mark in place of each content shows where the template puts it; searching for the
    # text itself would find it in the wrong message.
    frame = template([_SENTINEL.format(i) for i in range(len(marked))])
    final = template([m.text for m in marked])
    text, ranges, spans = "", [], []
    for i, content in enumerate(marked):
        before, found, frame = frame.partition(_SENTINEL.format(i))
        after = frame.partition(_SENTINEL.format(i + 1))[0]
        plain, text = content.text, text + before
        # Many templates strip what they are given.
        forms = (plain, plain.strip(), plain.lstrip(), plain.rstrip())
        kept = next((form for form in forms if final.startswith(text + form + after)), None)
        if not found or kept is None:
            raise ValueError(
                f"the chat template changes message {i} ({plain[:40]!r}), so its marks cannot be placed; "
                "render the chat yourself and give the string"
            )
        shift = len(text) - plain.index(kept)
        ranges.append((len(text), len(text) + len(kept)))
        spans += [Span(s.start + shift, s.end + shift, s.weight) for s in content.spans]
        text += kept
    return MarkedText(final, tuple(spans)), ranges, True


def _tokenise(
    tokenizer: PreTrainedTokenizerBase,
    marked: MarkedText,
    ranges: list[tuple[int, int]],
    chat: bool,
    max_length: int | None,
) -> dict[str, list]:
    """One row, unpadded: ids, mask, weights, marked, special and message of every token."""
    coded = tokenizer(
        marked.text, add_special_tokens=not chat, return_offsets_mapping=True, return_special_tokens_mask=True,
        truncation=max_length is not None, max_length=max_length,
    )  # fmt: skip
    ids, limit = coded["input_ids"], tokenizer.model_max_length
    if max_length is None and len(ids) > limit:
        raise ValueError(
            f"source has {len(ids)} tokens, more than the {limit} that fit; shorten it or set max_length={limit}"
        )
    controls = set(tokenizer.all_special_ids)
    weights, hit, message, kept = [], [], [], set()
    for start, end in coded["offset_mapping"]:
        piece = marked.text[start:end]
        start += len(piece) - len(piece.lstrip())
        end = max(start, end - (len(piece) - len(piece.rstrip())))
        over = [s for s in marked.spans if start < end and s.start < end and start < s.end]
        kept.update(over)
        weight = max((s.weight for s in over), default=None)
        weights.append(0.0 if weight is None else weight)
        hit.append(weight is not None)
        message.append(next((i for i, (a, b) in enumerate(ranges) if start < b and a < end), -1))
    for span in sorted(set(marked.spans) - kept):
        what = "" if kept else ", and nothing else is marked: this prompt is not steered"
        warnings.warn(
            f"the mark on {marked.text[span.start : span.end][:40]!r} was cut off or covers no token{what}",
            stacklevel=3,
        )
    special = [bool(s) or i in controls for s, i in zip(coded["special_tokens_mask"], ids, strict=True)]
    return {
        "ids": ids,
        "mask": [1] * len(ids),
        "weights": weights,
        "marked": hit,
        "special": special,
        "message": message,
    }

"""`SpanCache`, a transformers cache whose local layers keep only what later tokens can still see (sections 1.4, 4.2).

A full layer keeps every key. A local layer keeps the sinks of every row and the keys that its window or block still
reaches, so its bytes stop growing. What is dropped is never needed again: rotary positions are already in the keys.

Columns are counted in the text of the batch, padding included; a row's positions start at its first real token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from zq_lib.masformer.spans import SpanPlan


class Held(NamedTuple):
    """Where the keys that a local layer returned stand in the text."""

    columns: Tensor  # [B or 1, S] int64, -1 for a key to be left out
    length: int  # of the text so far, new tokens included
    gaps: bool  # whether some column is -1
    exact: bool  # a single new query sees all of them, whatever its head


class LocalLayer(CacheLayerMixin):
    """The cache of one local layer: sinks, then the last keys that are still in reach.

    `held` tells where the keys of the latest `update` stand. A sink that is still among the last keys has column -1 in
    its own slot, so that no key is counted twice.
    """

    is_sliding = True

    def __init__(self, spans: tuple[int, ...], kind: str, sinks: int) -> None:
        super().__init__()
        self.spans, self.kind, self.sinks = spans, kind, sinks
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None  # [B, G, slots + tail, D]
        self.seen = self.tail = self.slots = 0  # tokens so far; how many of the last are kept; sinks kept apart
        self.slot_columns: Tensor | None = None  # [B, slots], -1 for a sink that is not in its slot
        self.gaps = False  # whether one is not
        self.first: Tensor | None = None  # [B] column of each row's first real token; None when all are 0
        self.held: Held | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values, [B, G, T, D] (T may be 0)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append `key_states`, `value_states` [B, G, T, D]; return those kept so far and the new ones, in that order.

        Everything that a new query can see is in what this returns, however long T is; `held` tells the columns.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, key_states], 2)
        values = torch.cat([self.values, value_states], 2)
        self.seen += key_states.shape[2]
        self.tail += key_states.shape[2]
        self.keys, self.values = keys, values
        exact = key_states.shape[2] == 1 and len(self.spans) == 1 and self.first is None
        self.held = Held(self._columns(), self.seen, self.gaps, exact and not self.gaps and not self.record_past)
        if not self.record_past:
            self._forget()
        return keys, values

    def _columns(self) -> Tensor:
        tail = torch.arange(self.seen - self.tail, self.seen, device=self.keys.device)[None]  # [1, tail]
        if not self.slots:
            return tail
        return torch.cat([self.slot_columns, tail.expand(self.keys.shape[0], -1)], 1)

    def _reach(self) -> int:
        """How many of the last keys the next token can see: the most over heads and, with blocks, over rows."""
        if self.kind == "window":
            return max(self.spans) - 1
        position = torch.tensor([self.seen]) if self.first is None else (self.seen - self.first).clamp(min=0)  # [B]
        extra = 1 if self.kind == "two_block" else 0
        return max(int((position % span).max()) + extra * span for span in self.spans)

    def _forget(self) -> None:
        """Drop what no later query sees, and move sinks that leave the tail into their slots."""
        tail = min(self._reach(), self.tail)
        if tail == self.tail:
            return
        kept = [x[:, :, x.shape[2] - tail :] for x in (self.keys, self.values)]
        if not self.sinks:  # a copy, or the whole text would stay alive behind a slice of it
            self.keys, self.values, self.tail = kept[0].clone(), kept[1].clone(), tail
            return
        if self.slots and not self.gaps:
            saved = [x[:, :, : self.slots] for x in (self.keys, self.values)]
        else:
            saved = self._save_sinks(self.seen - tail)
        self.keys, self.values = (torch.cat(pair, 2) for pair in zip(saved, kept, strict=True))
        self.tail, self.slots = tail, self.sinks

    def _save_sinks(self, start: int) -> list[Tensor]:
        """Keys and values of the sinks, [B, G, sinks, D] each, as far as they stand before column `start`."""
        slot = torch.arange(self.sinks, device=self.device)
        first = slot[:1] if self.first is None else self.first
        wanted = (first[:, None] + slot).expand(self.keys.shape[0], -1)  # [B, sinks]
        old = self.seen - self.tail
        index = torch.where(wanted < old, slot, self.slots + wanted - old)
        index = index.clamp(max=self.keys.shape[2] - 1)[:, None, :, None]  # what has not come yet is left out below
        self.slot_columns = torch.where(wanted < start, wanted, -1)
        self.gaps = bool((self.slot_columns < 0).any())
        return [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.keys, self.values)]

    def get_seq_length(self) -> int:
        """Tokens seen so far, dropped ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: that of the whole text, from which the attention takes the columns held."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Keep everything from now on until `crop` is called after each call (assisted generation)."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        """Whether a small `crop` can be done: it cannot once keys that it would bring back are gone."""
        return self.record_past or self.tail == self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a number of at most 0).

        Raises ValueError when the earlier keys that the shorter text would see again have been dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} is positive; give how many to remove as a negative number"
            )
        if not self.is_initialized:
            return
        remove = min(-tokens_to_remove, self.seen)
        before = self.seen, self.tail
        self.seen, self.tail = self.seen - remove, self.tail - remove
        if self.tail < self.seen and self.tail < self._reach():
            self.seen, self.tail = before
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a local layer has dropped the keys that the shorter text would "
                "see again; call activate_past_recording() before the tokens to be removed, or run the text anew"
            )
        if remove:
            self.keys, self.values = (x[:, :, : x.shape[2] - remove].clone() for x in (self.keys, self.values))
        self._forget()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.first is not None:
            self.first = change(self.first)
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.slot_columns = None if self.slot_columns is None else change(self.slot_columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._change(lambda x: x[indices.to(x.device), ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._clear()

    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        stored = (self.keys, self.values, self.slot_columns, self.first)
        return sum(x.nbytes for x in stored if x is not None)


class SpanCache(Cache):
    """Drop-in `past_key_values` for a model that follows a plan; `generate` on an attached model makes one by itself.

    >>> with masformer.attach(model, plan):
    ...     model.generate(**inputs, past_key_values=masformer.SpanCache(plan))

    Args: `plan`, or a model that carries one (attached, or saved by one that was). Raises ValueError for another model.
    """

    def __init__(self, plan: SpanPlan | PreTrainedModel) -> None:
        self.plan = plan if isinstance(plan, SpanPlan) else plan_of(plan)
        super().__init__(
            layers=[
                DynamicLayer()
                if self.plan.reach(layer) is None
                else LocalLayer(self.plan.spans(layer), self.plan.kind, self.plan.sinks)
                for layer in range(len(self.plan.layers))
            ]
        )

    def set_padding(self, attention_mask: Tensor) -> None:
        """Tell which columns of the prompt are padding, [B, P] with 0 for padding; an attached model does it itself."""
        real = attention_mask.bool()
        first = torch.where(real.any(-1), real.to(torch.uint8).argmax(-1), real.shape[1])  # [B]
        first = first if bool(first.any()) else None
        for layer in self.layers:
            if isinstance(layer, LocalLayer):
                layer.first = first

    def held(self, layer: int) -> Held | None:
        """Where the keys that `layer` returned last stand in the text; None for a full layer, which has them all."""
        local = self.layers[layer]
        return local.held if isinstance(local, LocalLayer) else None

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LocalLayer):
                total += layer.nbytes()
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total


def plan_of(model: PreTrainedModel) -> SpanPlan:
    """The plan that a model's config carries. Raises ValueError when it carries none."""
    found = getattr(model.config, "masformer", None)
    if found is None:
        raise ValueError(f"model={type(model).__name__} carries no plan; give one, or attach to the model first")
    return SpanPlan.from_dict(found)

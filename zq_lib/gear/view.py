"""What one attention call sees of a layer's cache: packed blocks and exact tokens, as they were at that moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zq_lib.gear.packed import Block

NAME = "zq_gear"  # of the attention implementation that reads views


@dataclass(frozen=True, eq=False)
class View:
    """Columns in stored order: the first `sinks` of the exact tensors, the blocks' tokens, the rest of the exact ones.

    exact_keys, exact_values  [B, G, E, D] in the model's dtype: sinks, buffer and the newest tokens.
    columns                   [B, P] int64 or None: where each of the first P stored columns belongs in the text. A row
                              with left padding has its sinks behind the padding; later columns are in place.
    backend                   which path the attention takes: "auto", "torch" or "triton".
    """

    blocks: tuple[Block, ...]
    exact_keys: Tensor
    exact_values: Tensor
    sinks: int = 0
    columns: Tensor | None = None
    backend: str = "auto"

    @property
    def length(self) -> int:
        """S, all columns."""
        return self.exact_keys.shape[2] + sum(block.length for block in self.blocks)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, S, D] in the order of the text, restored."""
        if not self.blocks:
            return self.exact_keys, self.exact_values
        stored = self.sinks + sum(block.keys.count * block.keys.tokens for block in self.blocks)
        return self._restore(self.exact_keys, "keys", stored), self._restore(self.exact_values, "values", stored)

    def _restore(self, exact: Tensor, side: str, stored: int) -> Tensor:
        """One side. A cropped block's hidden tokens are written too, and then overwritten by what follows."""
        b, heads, _, d = exact.shape
        out = torch.empty(b, heads, max(self.length, stored), d, device=exact.device)
        if self.sinks:
            out[:, :, : self.sinks] = exact[:, :, : self.sinks]
        column = self.sinks
        for block in self.blocks:
            getattr(block, side).restore_into(out, column)
            column += block.length
        out[:, :, column : self.length] = exact[:, :, self.sinks :]
        return self._in_text_order(out[:, :, : self.length].to(exact.dtype))

    def _in_text_order(self, x: Tensor) -> Tensor:
        if self.columns is None:
            return x
        moved = self.columns.shape[1]
        index = self.columns.argsort(-1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.cat([x[:, :, :moved].gather(2, index), x[:, :, moved:]], 2)

    def in_stored_order(self, x: Tensor) -> Tensor:
        """A mask or bias over the text's columns, [B or 1, ..., S], as the columns are stored."""
        if self.columns is None:
            return x
        b, moved = self.columns.shape
        x = x.expand(b, *x.shape[1:])
        index = self.columns.view(b, *[1] * (x.dim() - 2), moved).expand(*x.shape[:-1], moved)
        return torch.cat([x[..., :moved].gather(-1, index), x[..., moved:]], -1)

    def handles(self) -> tuple[Tensor, Tensor]:
        """Stand-ins for keys and values with the right shape and no storage, which carry this view to the attention.

        They are NaN, so that a model which computes with them instead is not silently wrong.
        """
        found = []
        for exact in (self.exact_keys, self.exact_values):
            handle = exact.new_full((1,), torch.nan).expand(*exact.shape[:2], self.length, exact.shape[3])
            handle.zq_view = self
            found.append(handle)
        return tuple(found)


def view_of(key: Tensor) -> View | None:
    """The view that a key tensor stands for, or None for an ordinary one."""
    return getattr(key, "zq_view", None)

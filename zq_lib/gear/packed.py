"""The compressed form of keys or values, X ~ codes * scale + zero + A B^T + outliers, and what it weighs.

A block is m equally long segments of n tokens: a prompt is one long segment, the pages of a generation are m short ones
that grow by one at a time. Every tensor has the batch as its first and the segment as its second dimension, so blocks
are selected, repeated and joined without knowing what is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from zq_lib.core import backend
from zq_lib.gear.config import Codec
from zq_lib.gear.lowrank import factorise, to_int8
from zq_lib.gear.outliers import PAGE, outlier_mask, page_starts, to_entries
from zq_lib.gear.packing import pack, row_bytes, unpack
from zq_lib.gear.quantize import encode, group_view, ranges

COMPONENTS = {
    "codes": ("codes",),
    "metadata": ("scale", "zero"),
    "low rank": ("left", "right", "left_scale", "right_scale"),
    "outliers": ("out_token", "out_channel", "out_delta", "out_start"),
}
ENTRIES = ("out_token", "out_channel", "out_delta")


@dataclass(frozen=True, eq=False)
class Packed:
    """Keys or values of one block.

    kind, bits       "key" or "value"; bits of a code.
    tokens, width    n tokens of a segment; head width D.
    group            elements along the grouped axis that share scale and zero.
    codes            [B, m, G, n, D bits / 8] uint8, planar (`packing`).
    scale, zero      float16 or float32: [B, m, G, n/g, D] per channel, [B, m, G, n, D/g] per token, or
                     [B, m, 1, n, 1] over all heads.
    left, right      factors A [B, m, G, n, R] and B [B, m, G, D, R], float16, or int8 with left_scale, right_scale
                     [B, m, G, 1, R]; None without low rank.
    out_*            outliers sorted by head and token: token in its page of 64, channel, what is missing there
                     [B, m, N] each, and where each head's pages start [B, m, G pages + 1]; None without outliers.
    """

    kind: str
    bits: int
    tokens: int
    width: int
    group: int
    per_channel: bool
    codes: Tensor
    scale: Tensor
    zero: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    left_scale: Tensor | None = None
    right_scale: Tensor | None = None
    out_token: Tensor | None = None
    out_channel: Tensor | None = None
    out_delta: Tensor | None = None
    out_start: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def layout(self) -> tuple:
        """What two blocks must share to be joined."""
        shapes = tuple((name, x.dtype, x.shape[2:]) for name, x in self.tensors().items())
        return (self.kind, self.bits, self.tokens, self.width, self.group, self.per_channel, shapes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed, for example moved or selected."""
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def join(self, other: Self) -> Self:
        """The segments of both, in order."""
        mine, theirs = self.tensors(), other.tensors()
        return replace(self, **{name: torch.cat([x, theirs[name]], 1) for name, x in mine.items()})

    def segments(self, start: int, stop: int) -> Self:
        """Some of the segments, without copying."""
        if start == 0 and stop >= self.count:
            return self
        return self.map(lambda x: x[:, start:stop])

    def can_be_cut(self, size: int) -> bool:
        """Whether segments of `size` tokens would hold the same: no part may belong to more tokens than that."""
        return self.left is None and self.out_delta is None and not (self.per_channel and size % self.group)

    def cut(self, size: int) -> Self:
        """The same in segments of `size` tokens."""
        pieces = self.tokens // size

        def split(x: Tensor) -> Tensor:
            return x.unflatten(3, (pieces, -1)).movedim(3, 2).flatten(1, 2).contiguous()  # [B, m pieces, G, ...]

        return replace(self.map(split), tokens=size)

    def tokens_between(self, start: int, stop: int) -> Self:
        """The tokens start..stop of the only segment; `start` at a page and a key group. Copies only outliers."""
        if self.count != 1:
            raise ValueError(f"a block of {self.count} segments has no single range of tokens; take one segment first")
        pages, first, last = -(-self.tokens // PAGE), start // PAGE, -(-stop // PAGE)
        changed = {"codes": self.codes[:, :, :, start:stop]}
        if not self.per_channel:
            changed |= {name: getattr(self, name)[:, :, :, start:stop] for name in ("scale", "zero")}
        elif self.group < self.tokens:
            of = slice(start // self.group, -(-stop // self.group))
            changed |= {name: getattr(self, name)[:, :, :, of] for name in ("scale", "zero")}
        if self.left is not None:
            changed["left"] = self.left[:, :, :, start:stop]
        group = min(self.group, stop - start) if self.per_channel else self.group
        part = replace(self, tokens=stop - start, group=group, **changed)
        return part if self.out_delta is None else part._outliers_of_pages(pages, first, last)

    def _outliers_of_pages(self, pages: int, first: int, last: int) -> Self:
        """Outliers of the pages first..last of every head. Rows may have different numbers: zeros fill up."""
        found = {name: [] for name in ENTRIES}
        starts = self.out_start[:, 0].tolist()
        for row, start in enumerate(starts):
            spans = [slice(start[h + first], start[h + last]) for h in range(0, self.heads * pages, pages)]
            for name, kept in found.items():
                kept.append(torch.cat([getattr(self, name)[row, 0, part] for part in spans]))
        filled = {name: pad_sequence(kept, batch_first=True)[:, None] for name, kept in found.items()}
        counts = self.out_start.diff(dim=-1).unflatten(2, (-1, pages))[..., first:last].flatten(2)
        begin = pad(counts.cumsum(-1), (1, 0))
        begin[..., -1] = filled["out_delta"].shape[-1]  # fillers fall into the last page and add nothing
        return replace(self, **filled, out_start=begin.to(torch.int32))

    @property
    def heads(self) -> int:
        """G, key/value heads."""
        return self.codes.shape[2]

    @property
    def count(self) -> int:
        """m, segments."""
        return self.codes.shape[1]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A [B, m, G, n, R] and B [B, m, G, D, R] in float32, or None."""
        if self.left is None:
            return None
        if self.left_scale is None:
            return self.left.float(), self.right.float()
        return self.left.float() * self.left_scale.float(), self.right.float() * self.right_scale.float()

    def _backbone_into(self, out: Tensor) -> None:
        """Write codes * scale + zero to `out` [B, m, G, n, D] float32, which may be part of a larger tensor."""
        out.copy_(unpack(self.codes, self.bits))
        if self.per_channel:
            split, axis = out.unflatten(3, (-1, self.group)), 4
        else:
            split, axis = out.unflatten(4, (self.scale.shape[-1], -1)), 5
        split.mul_(self.scale.float().unsqueeze(axis)).add_(self.zero.float().unsqueeze(axis))

    def backbone(self) -> Tensor:
        """codes * scale + zero, [B, m, G, n, D] float32."""
        out = torch.empty(*self.codes.shape[:4], self.width, device=self.codes.device)
        self._backbone_into(out)
        return out

    def _add_low_rank(self, out: Tensor) -> None:
        """Add A B^T to `out` [B, m, G, n, D], as above."""
        if (found := self.factors()) is None:
            return
        a, b = found
        if self.count > 1:  # a part of a larger tensor has no three dimensions then
            out += a @ b.mT
        else:  # in place; the product is faster with B^T in rows
            out.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2).mT.contiguous())

    def _add_outliers(self, out: Tensor) -> None:
        """Add what is missing at outliers to `out` [B, m, G, n, D], as above."""
        if self.out_delta is None:
            return
        index = page_starts(out.shape[:4], out.stride()[:4], out.device)
        index = index.repeat_interleave(self.out_start.diff(dim=-1).flatten(), output_size=self.out_token.numel())
        index.add_(self.out_token.flatten(), alpha=out.stride(3)).add_(self.out_channel.flatten())
        reach = out.untyped_storage().nbytes() // out.itemsize - out.storage_offset()
        out.as_strided((reach,), (1,)).index_add_(0, index, self.out_delta.flatten().float())

    def restore_into(self, out: Tensor, start: int = 0) -> None:
        """Write the m n restored tokens to out[:, :, start:]. `out` [B, G, S, D] float32, contiguous."""
        size = self.count * self.tokens
        here = out[:, :, start : start + size].unflatten(2, (self.count, -1)).transpose(1, 2)  # [B, m, G, n, D]
        self._backbone_into(here)
        self._add_low_rank(here)
        self._add_outliers(here)

    def dequantize(self) -> Tensor:
        """The restored tensor, [B, G, m n, D] float32."""
        b, m, heads, n, _ = self.codes.shape
        out = torch.empty(b, heads, m * n, self.width, device=self.codes.device)
        self.restore_into(out)
        return out

    def nbytes(self) -> dict[str, int]:
        """Bytes by component."""
        stored = self.tensors()
        return {part: sum(stored[n].nbytes for n in names if n in stored) for part, names in COMPONENTS.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """Keys and values of m segments; the first `length` tokens count (a crop hides the others)."""

    keys: Packed
    values: Packed
    length: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        return replace(self, keys=self.keys.map(change), values=self.values.map(change))

    def cut(self, size: int) -> Self:
        """The same in segments of `size` tokens, which later ones can join; as it is where that would change it."""
        if not (self.keys.can_be_cut(size) and self.values.can_be_cut(size)):
            return self
        return replace(self, keys=self.keys.cut(size), values=self.values.cut(size))

    def join(self, other: Self) -> Self | None:
        """Both as one block, or None when their layouts differ or some of this one is hidden."""
        whole = self.length == self.keys.tokens * self.keys.count
        alike = self.keys.layout() == other.keys.layout() and self.values.layout() == other.values.layout()
        if not whole or not alike:
            return None
        return Block(self.keys.join(other.keys), self.values.join(other.values), self.length + other.length)

    def crop(self, length: int) -> Self:
        """The first `length` tokens. Whole segments go; the rest of a cut one stays stored and is hidden."""
        count = -(-length // self.keys.tokens)

        def cut(x: Tensor) -> Tensor:
            return x[:, :count].clone()  # a view would keep the bytes alive

        block = self.map(cut) if count < self.keys.count else self
        return replace(block, length=length)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Restored keys and values, [B, G, length, D] float32."""
        return self.keys.dequantize()[:, :, : self.length], self.values.dequantize()[:, :, : self.length]


def check_width(codec: Codec, width: int) -> None:
    """Raise ValueError when heads of this width cannot be stored with these settings."""
    row_bytes(width, codec.bits)
    if not codec.per_channel():
        group_view(codec, (1, 1, 1, 1, width))


def compress(x: Tensor, codec: Codec, *, prompt: bool, valid: Tensor | None = None, seed: int = 0) -> Packed:
    """Compress one segment.

    Args: `x` [B, G, n, D], any float dtype; `prompt` chooses between the two ranks; `valid` [B, n] bool marks padding,
    which takes no part in ranges, outliers and residual; `seed` is added to the codec's. Raises ValueError for NaN or
    infinite input and for settings that do not fit the shape.
    """
    if not torch.isfinite(x).all():
        raise ValueError(
            f"the {codec.kind}s hold NaN or infinite numbers, which cannot be compressed; run the model in bfloat16 or "
            "float32, and check its inputs"
        )
    # contiguous here and below: a product rounds by the layout, which would differ between a row alone and in a batch
    x = x.detach().float().contiguous().unsqueeze(1)  # [B, 1, G, n, D]
    if valid is not None:
        valid = None if valid.all() else valid[:, None, None, :, None]
    outliers = outlier_mask(x, codec, valid)
    keep = outliers if outliers is None else ~outliers
    if valid is not None:
        keep = valid.expand(x.shape) if keep is None else keep & valid
    quantised, group = _quantise(x, codec, keep)
    packed = Packed(codec.kind, codec.bits, x.shape[3], x.shape[4], group, codec.per_channel(), **quantised)
    rank = codec.rank if prompt else codec.rank_decode
    if rank == 0 and outliers is None:
        return packed
    missing, found = x - packed.backbone(), {}  # what the backbone gets wrong
    if rank:
        residual = missing if keep is None else torch.where(keep, missing, 0.0)
        factors = factorise(residual.contiguous(), rank, codec, codec.seed + seed)
        found |= _store_factors(*factors, codec)
    if outliers is not None:
        delta = missing
        if rank and codec.outlier_mode == "exact":
            a, b = replace(packed, **found).factors()
            delta = missing - a @ b.mT
        names = ("out_token", "out_channel", "out_delta", "out_start")
        delta = torch.nan_to_num(delta.clamp(-65504, 65504))
        found |= dict(zip(names, to_entries(outliers, delta), strict=True))
    return replace(packed, **{name: t.contiguous() for name, t in found.items()})


def _quantise(x: Tensor, codec: Codec, keep: Tensor | None) -> tuple[dict[str, Tensor], int]:
    """Codes, scale and zero as they are stored, and the group's size: fused on a GPU, bit-equal to this elsewhere."""
    view, dtype = group_view(codec, x.shape), getattr(torch, codec.meta_dtype)
    group = view.shape[view.axis] if view.axis > 0 else x.shape[4]
    able, why = not codec.clip and view.axis > 0, "clipped ranges and ranges over all heads are not in the kernel"
    if backend.choose(codec.backend, x.device, able, why) == "triton":
        from zq_lib.gear.kernels import quantize_pack

        kind = "key" if codec.per_channel() else "value"  # of the grouping
        one = None if keep is None else keep[:, 0].contiguous()
        stored = quantize_pack(x[:, 0], kind, codec.bits, group, one, dtype)
        return {name: t.unsqueeze(1) for name, t in zip(("codes", "scale", "zero"), stored, strict=True)}, group
    scale, zero = ranges(x, keep, codec, view)
    codes = encode(x.reshape(view.shape), scale, zero, codec.bits).to(torch.uint8).view(x.shape)
    stored = {"codes": pack(codes, codec.bits)}
    stored |= {name: t.reshape(view.stored).to(dtype) for name, t in (("scale", scale), ("zero", zero))}
    return {name: t.contiguous() for name, t in stored.items()}, group


def _store_factors(a: Tensor, b: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Factors in their storage form. A column's size is split evenly, so that neither side leaves float16."""
    size = (a.norm(dim=-2, keepdim=True) * b.norm(dim=-2, keepdim=True)).sqrt()
    unit = torch.finfo(a.dtype).tiny

    def to_size(x: Tensor) -> Tensor:
        return x * (size / x.norm(dim=-2, keepdim=True).clamp(min=unit))

    a, b = to_size(a), to_size(b)
    if codec.factor_bits == 16:
        return {"left": a.to(torch.float16), "right": b.to(torch.float16)}
    (left, left_scale), (right, right_scale) = to_int8(a), to_int8(b)
    return {"left": left, "right": right, "left_scale": left_scale, "right_scale": right_scale}

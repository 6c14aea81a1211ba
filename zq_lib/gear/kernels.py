"""GEAR on a GPU: attention of one query on packed blocks, and quantisation with packing.

| here | paper | what |
|---|---|---|
| `packed_decode`, `decode` | section 3, X ~ D + L + S | softmax(q K^T) V with K and V read in their packed form |
| `merge` | - | parts of one softmax joined by their log-sum-exp |
| `quantize_pack` | section 2, Quant | scale, zero and codes of every group, in bytes |

The algebra is in `kernels_decode.py`, the rounding in `kernels_quantize.py`. Here are the host wrappers, which check
shapes and memory layout, choose launch settings and record each launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, WIDEST_HEAD, operand, padded, run
from zq_lib.gear import kernels_decode, kernels_quantize
from zq_lib.gear.kernels_common import MERGE, Settings, columns, packed_operand, settings, slice_width
from zq_lib.gear.kernels_specs import MERGED_AT_ONCE, specs
from zq_lib.gear.packed import Block, Packed
from zq_lib.gear.view import View

MOST_SPLITS = 64
TILES_PER_SPLIT = 1 if INTERPRETED else 4  # fewer would not pay for their share of the merge (untimed)
MOST_GROUPS = 16  # channel groups of a token, each a dot product of its own
POINTERS = ("codes", "scale", "zero", "left", "right", "left_scale", "right_scale")
OUTLIERS = ("out_token", "out_channel", "out_delta", "out_start")


def packed_decode(
    query: Tensor,
    block: Block,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query on one packed block.

    Args: `query` [B, H, 1, D], fp32, fp16 or bf16; `block` with G heads, H a multiple of G; `mask` [B, length] bool,
    True = visible; `bias` [B, length] float32 in natural logarithms, times `gate` [B, H] float32, is added to the
    scores; both or none. `splits`: programs per head, None to choose. Returns out [B, H, D] and log-sum-exp [B, H] in
    float32. Rows that see nothing give 0 and -inf. Raises ValueError for what `supported` refuses.
    """
    view = View((block,), *(query.new_empty(query.shape[0], block.keys.heads, 0, query.shape[-1]) for _ in range(2)))
    _check(view, query, mask, bias, gate)
    count = _splits(query, block.keys.heads, _tiles(query, block)) if splits is None else splits
    part, part_lse = _parts(query, count)
    _launch_packed(query, block, scale, mask, bias, gate, part, part_lse, 0, count)
    return _merge(part, part_lse, torch.float32)


def decode(
    query: Tensor,
    view: View,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention of one query on all that a layer holds: [B, H, 1, D] -> [B, H, D] in the query's type.

    `mask` [B, S] bool and `bias` [B, S] float32 are in stored order (`View.in_stored_order`); the rest as in
    `packed_decode`.

    >>> out = decode(query, layer.view(), scale=query.shape[-1] ** -0.5)
    """
    _check(view, query, mask, bias, gate)
    heads, kept = view.exact_keys.shape[1:3]
    counts = [_splits(query, heads, _tiles(query, block)) for block in view.blocks]
    launch = settings("exact", query.dtype, query.shape[-1])
    if kept:
        counts.append(_splits(query, heads, triton.cdiv(kept, launch.tokens)))
    part, part_lse = _parts(query, sum(counts))
    column = view.sinks
    for i, block in enumerate(view.blocks):
        shown = slice(column, column + block.length)
        here = [None if x is None else x[:, shown] for x in (mask, bias)]
        _launch_packed(query, block, scale, *here, gate, part, part_lse, sum(counts[:i]), counts[i])
        column += block.length
    if kept:
        hidden = column - view.sinks
        _launch_exact(query, view, scale, mask, bias, gate, part, part_lse, sum(counts[:-1]), counts[-1], hidden)
    return _merge(part, part_lse, query.dtype)[0]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join parts of one softmax, each out [B, H, D] and log-sum-exp [B, H] in float32, into one such part."""
    shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in parts]
    if not shapes or any(shape != shapes[0] or shape[0][:-1] != shape[1] for shape in shapes):
        raise ValueError(
            f"parts have the shapes {shapes}; give pairs of [B, H, D] and [B, H], at least one, all alike."
        )
    part, part_lse = (torch.stack(x, 2).to(torch.float32).contiguous() for x in zip(*parts, strict=True))
    return _merge(part, part_lse, torch.float32)


def quantize_pack(
    x: Tensor, kind: str, bits: int, group: int, keep: Tensor | None = None, meta_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x [B, G, n, D] in bytes, with the scale and zero of every group, bit-equal to the torch path.

    `kind` "key": a group is `group` tokens of a channel; "value": `group` channels of a token. Elements where `keep`
    [B, G, n, D] bool is False take no part in the range of their group; a group without any gets 0 and 0. Returns codes
    [B, G, n, D bits / 8] uint8 and twice [B, G, n/group, D] or [B, G, n, D/group]. Raises ValueError for shapes that do
    not fit and for a range that `meta_dtype` cannot hold.
    """
    return kernels_quantize.launch(x, kind, bits, group, keep, meta_dtype)


def supported(view: View, query: Tensor) -> tuple[bool, str]:
    """Whether the kernels can do this call, and if not, why: what a dispatcher asks before it picks them."""
    if query.dtype not in DTYPES:
        return False, f"the query is {query.dtype}, not float32, float16 or bfloat16"
    if query.dim() != 4 or query.shape[2] != 1 or 0 in query.shape:
        return False, f"the query has shape {tuple(query.shape)}, not [B, H, 1, D]"
    B, H, _, D = query.shape
    if D > WIDEST_HEAD:
        return False, f"the head width {D} is above {WIDEST_HEAD}"
    keys, values = view.exact_keys, view.exact_values
    if keys.shape != values.shape or keys.dim() != 4 or keys.shape[::3] != (B, D) or H % max(keys.shape[1], 1):
        return (
            False,
            f"query {tuple(query.shape)}, exact keys {tuple(keys.shape)} and values {tuple(values.shape)} are not "
            "[B, H, 1, D] and twice [B, G, E, D]",
        )
    if not view.length:
        return False, "the cache is empty"
    for side in (side for block in view.blocks for side in (block.keys, block.values)):
        if (side.codes.shape[0], side.heads, side.width) != (B, keys.shape[1], D):
            return False, f"a block of codes {tuple(side.codes.shape)} does not fit queries {tuple(query.shape)}"
        if not side.per_channel and side.scale.shape[-1] > MOST_GROUPS:
            return False, f"groups of {side.group} channels are more than {MOST_GROUPS} for a head of width {D}"
    return True, ""


def _check(view: View, query: Tensor, mask: Tensor | None, bias: Tensor | None, gate: Tensor | None) -> None:
    able, why = supported(view, query)
    if not able:
        raise ValueError(f"the packed attention cannot run this call: {why}; use the torch path instead.")
    if query.stride(-1) != 1:
        raise ValueError(f"query has stride {query.stride(-1)} along channels; call .contiguous() on it.")
    B, H = query.shape[:2]
    wanted = {"mask": (mask, torch.bool, (B, view.length)), "bias": (bias, torch.float32, (B, view.length))}
    wanted["gate"] = (gate, torch.float32, (B, H))
    for name, (x, dtype, shape) in wanted.items():
        if x is not None and (x.dtype != dtype or tuple(x.shape) != shape):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; give {dtype} {shape}.")
    if (bias is None) != (gate is None):
        raise ValueError("bias and gate belong together; give both or neither.")
    for block in view.blocks:
        for side in (block.keys, block.values):
            for name, x in side.tensors().items():
                if not x.is_contiguous():
                    raise ValueError(f"{name} of the {side.kind}s is not contiguous; call .contiguous() on it.")


def _tiles(query: Tensor, block: Block) -> int:
    """How many tiles hold the tokens of a block that count; a tile stays within one key group."""
    size, group = _tile(query, block), _group(block.keys)
    segments, rest = divmod(block.length, block.keys.tokens)
    groups, rest = divmod(segments * block.keys.tokens + rest, group)
    return groups * triton.cdiv(group, size) + triton.cdiv(rest, size)


def _tile(query: Tensor, block: Block) -> int:
    return min(_settings(query, block).tokens, columns(_group(block.keys), query.dtype))


def _settings(query: Tensor, block: Block) -> Settings:
    parts = any(part is not None for side in (block.keys, block.values) for part in (side.left, side.out_delta))
    return settings("parts" if parts else "packed", query.dtype, query.shape[-1])


def _group(keys: Packed) -> int:
    """Tokens of a segment that share the scales of their keys; all, when every token has its own."""
    return keys.group if keys.per_channel else keys.tokens


def _splits(query: Tensor, heads: int, tiles: int) -> int:
    """Into how many slices to cut the tiles: enough programs for four per processor, each with tiles enough to pay."""
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(query.device).multi_processor_count
    slices = triton.cdiv(4 * processors, query.shape[0] * heads)
    return max(1, min(MOST_SPLITS, triton.cdiv(tiles, TILES_PER_SPLIT), slices))


def _parts(query: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Where the slices write: [B, H, slots, D] and [B, H, slots] float32."""
    B, H, _, D = query.shape
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=query.device) for shape in ((B, H, slots, D), (B, H, slots))
    )


def _pointers(side: Packed) -> tuple[Tensor | None, ...]:
    return tuple(getattr(side, name) for name in POINTERS + OUTLIERS)


def _rank(side: Packed) -> int:
    return 0 if side.left is None else side.left.shape[-1]


def _optional(bias: Tensor | None, mask: Tensor | None) -> tuple[tuple, tuple]:
    """The pointers BIAS and MASK, dense along columns, and their strides along the batch."""
    found = [None if x is None else x if x.stride(1) == 1 else x.contiguous() for x in (bias, mask)]
    strides = tuple(0 if x is None else x.stride(0) for x in found)
    return (found[0], None if mask is None else found[1].view(torch.uint8)), strides


def _launch_packed(
    query: Tensor, block: Block, scale: float, mask: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    part: Tensor, part_lse: Tensor, slot: int, splits: int,
) -> None:  # fmt: skip
    """Host wrapper of `kernels_decode.packed`: fill `splits` slots of the parts from `slot` on."""
    B, H, _, D = query.shape
    keys, values = block.keys, block.values
    launch = _settings(query, block)
    pointers, strides = _optional(bias, mask)
    args = (
        query, None if gate is None else gate.contiguous(), *pointers, part, part_lse,
        *_pointers(keys), *_pointers(values),
        *query.stride()[:2], *strides,
        keys.heads, H // keys.heads, keys.count, keys.tokens, block.length, _group(keys), _tiles(query, block),
        *(0 if side.out_delta is None else side.out_delta.shape[-1] for side in (keys, values)),
        *(side.scale.shape[2] for side in (keys, values)),
        float(scale), splits, part.shape[2], slot,
    )  # fmt: skip
    run(
        kernels_decode.packed, "gear.packed", B * keys.heads * splits, query, args, launch,
        **_packed_meta(keys, values, H, launch.entries, _tile(query, block), query.dtype),
    )  # fmt: skip


def _packed_meta(
    keys: Packed, values: Packed, heads: int, entries: int, tile: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The constants of one specialisation of `kernels_decode.packed`."""
    return dict(
        D=keys.width, BLOCK_M=padded(heads // keys.heads), BLOCK_N=tile, BLOCK_E=entries,
        K_BITS=keys.bits, K_WIDE=padded(slice_width(keys.width, keys.bits)), K_RANK=_rank(keys),
        K_SIDE=columns(_rank(keys), dtype), K_GROUPS=0 if keys.per_channel else keys.scale.shape[-1],
        V_BITS=values.bits, V_WIDE=columns(slice_width(values.width, values.bits), dtype), V_RANK=_rank(values),
        V_SIDE=columns(_rank(values), dtype), V_GROUPS=values.scale.shape[-1],
        WHOLE=_group(keys) == keys.tokens, DOT=packed_operand(dtype),
    )  # fmt: skip


def _launch_exact(
    query: Tensor, view: View, scale: float, mask: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    part: Tensor, part_lse: Tensor, slot: int, splits: int, hidden: int,
) -> None:  # fmt: skip
    """Host wrapper of `kernels_decode.exact`: fill `splits` slots of the parts from `slot` on."""
    B, H, _, D = query.shape
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (view.exact_keys, view.exact_values))
    G = keys.shape[1]
    launch = settings("exact", query.dtype, D)
    pointers, strides = _optional(bias, mask)
    args = (
        query, keys, values, None if gate is None else gate.contiguous(), *pointers, part, part_lse,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *strides,
        G, H // G, keys.shape[2], view.sinks, hidden, float(scale), splits, part.shape[2], slot,
    )  # fmt: skip
    run(
        kernels_decode.exact, "gear.exact", B * G * splits, query, args, launch,
        D=D, BLOCK_D=padded(D), BLOCK_M=padded(H // G), BLOCK_N=launch.tokens, DOT=operand(query.dtype),
    )  # fmt: skip


def _merge(part: Tensor, part_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Host wrapper of `kernels_decode.merge`: out [B, H, D] of `dtype`, log-sum-exp [B, H] float32."""
    B, H, slots, D = part.shape
    out, lse = torch.empty(B, H, D, dtype=dtype, device=part.device), part_lse.new_empty(B, H)
    run(
        kernels_decode.merge, "gear.merge", B * H, part, (part, part_lse, out, lse, slots), MERGE,
        D=D, BLOCK_D=padded(D), BLOCK_S=MERGED_AT_ONCE,
    )  # fmt: skip
    return out, lse


SPECS = specs()

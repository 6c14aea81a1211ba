"""Quantise and pack in one pass over memory: scale, zero and bytes of codes, bit-equal to `quantize.ranges` and `pack`.

A tile is [tokens, slices, bytes]: channel s D/slices + j of a token is slice s of byte j, so packing is a sum of
shifted codes over the slices. Scale and zero are rounded to their storage type before they make codes. Divisions are
those of IEEE and rounding is half to even, as in torch on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zq_lib.core.kernels_launch import WIDEST_HEAD, run
from zq_lib.gear.kernels_common import settings
from zq_lib.gear.packing import row_bytes

HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: from there on fp32 holds whole numbers only
BYTES_PER_PROGRAM = 16  # of a key row: narrow, for one program reads all tokens of its channels


@triton.jit
def _range(low, high, LEVELS: tl.constexpr, META: tl.constexpr):
    """Scale and zero in their storage type; 0 for a group without elements."""
    empty = low > high
    low, high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    return tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32)).to(META), low.to(META)


@triton.jit
def _encode(x, scale, zero, LEVELS: tl.constexpr):
    """clamp(round_half_even((x - zero) / scale), 0, LEVELS) as int32; 0 where scale is 0. All broadcast against x."""
    some = scale > 0
    code = tl.div_rn(x - zero, tl.broadcast_to(tl.where(some, scale, 1.0), x.shape))
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
    code = (code + HALF_EVEN) - HALF_EVEN
    return tl.where(some, code, 0.0).to(tl.int32)


@triton.jit
def _store_codes(CODES, row, code, inside, BITS: tl.constexpr, D: tl.constexpr, byte, SLICES: tl.constexpr):
    """Pack code [T, SLICES, BYTES] and store it in rows of D BITS / 8 bytes. `row` int64 [T], `byte` [BYTES]."""
    base = CODES + (row * (D * BITS // 8))[:, None]
    whole = inside[:, None] & (byte < D // SLICES)[None, :]
    spot = tl.arange(0, SLICES)[None, :, None]
    if BITS != 3:
        tl.store(base + byte[None, :], tl.sum(code << (spot * BITS), 1).to(tl.uint8), mask=whole)
    else:  # 8 slices of one high bit; two of them make one slice of the plane of the two low bits
        T: tl.constexpr = code.shape[0]
        BYTES: tl.constexpr = code.shape[2]
        low = tl.reshape((code & 3) << (spot // 2 * 2), [T, 4, 2, BYTES])
        pointers = base[:, None, :] + (tl.arange(0, 2)[:, None] * (D // 8) + byte[None, :])[None, :, :]
        tl.store(pointers, tl.sum(low, 1).to(tl.uint8), mask=tl.broadcast_to(whole[:, None, :], [T, 2, BYTES]))
        tl.store(base + D // 4 + byte[None, :], tl.sum((code >> 2) << spot, 1).to(tl.uint8), mask=whole)


@triton.jit
def _load(X, KEEP, token, channel, inside, strides_x, stride_kt, stride_kd, fill: tl.constexpr):
    """x [T, SLICES, BYTES] in fp32; `fill` where it is outside, or where KEEP is given and says no."""
    pointers = X + (token * strides_x)[:, None, None] + channel[None, :, :]
    if KEEP is not None:
        kept = KEEP + (token * stride_kt)[:, None, None] + (channel * stride_kd)[None, :, :]
        inside = inside & (tl.load(kept, mask=inside, other=0) != 0)
    return tl.where(inside, tl.load(pointers, mask=inside, other=0.0).to(tl.float32), fill)


@triton.jit
def quantize_keys(
    X, KEEP, CODES, SCALE, ZERO,
    stride_xb, stride_xg, stride_xt, stride_kb, stride_kg, stride_kt, stride_kd, G, n, group,
    D: tl.constexpr, BITS: tl.constexpr, SLICES: tl.constexpr, BYTES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Groups along tokens: one program per (batch, head, group, BYTES bytes of a row); reads its channels twice."""
    LEVELS: tl.constexpr = 2**BITS - 1
    WIDE: tl.constexpr = D // SLICES
    blocks: tl.constexpr = (WIDE + BYTES - 1) // BYTES
    groups = n // group
    byte = tl.program_id(0) % blocks * BYTES + tl.arange(0, BYTES)
    part = (tl.program_id(0) // blocks % groups).to(tl.int64)
    bg = (tl.program_id(0) // blocks // groups).to(tl.int64)
    channel = tl.arange(0, SLICES)[:, None] * WIDE + byte[None, :]  # [SLICES, BYTES]
    valid = (tl.arange(0, SLICES) >= 0)[:, None] & (byte < WIDE)[None, :]
    X += bg // G * stride_xb + bg % G * stride_xg
    if KEEP is not None:
        KEEP += bg // G * stride_kb + bg % G * stride_kg
    low = tl.full([SLICES, BYTES], float("inf"), tl.float32)
    high = tl.full([SLICES, BYTES], float("-inf"), tl.float32)
    for first in range(0, group, BLOCK_T):
        offset = first + tl.arange(0, BLOCK_T)
        inside = (offset < group)[:, None, None] & valid[None, :, :]
        token = part * group + offset
        x = _load(X, KEEP, token, channel, inside, stride_xt, stride_kt, stride_kd, float("inf"))
        low = tl.minimum(low, tl.min(x, 0))
        high = tl.maximum(high, tl.max(tl.where(x == float("inf"), float("-inf"), x), 0))
    scale, zero = _range(low, high, LEVELS, SCALE.dtype.element_ty)
    meta = (bg * groups + part) * D + channel
    tl.store(SCALE + meta, scale, mask=valid)
    tl.store(ZERO + meta, zero, mask=valid)
    scale, zero = scale.to(tl.float32)[None, :, :], zero.to(tl.float32)[None, :, :]
    for first in range(0, group, BLOCK_T):
        offset = first + tl.arange(0, BLOCK_T)
        inside = (offset < group)[:, None, None] & valid[None, :, :]
        token = part * group + offset
        x = _load(X, None, token, channel, inside, stride_xt, 0, 0, 0.0)
        code = _encode(x, scale, zero, LEVELS)
        _store_codes(CODES, bg * n + token, code, offset < group, BITS, D, byte, SLICES)


@triton.jit
def quantize_values(
    X, KEEP, CODES, SCALE, ZERO,
    stride_xb, stride_xg, stride_xt, stride_kb, stride_kg, stride_kt, stride_kd, G, n,
    D: tl.constexpr, BITS: tl.constexpr, SLICES: tl.constexpr, BYTES: tl.constexpr, BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS groups along the channels of a token: one program per (batch, head, BLOCK_T tokens)."""
    LEVELS: tl.constexpr = 2**BITS - 1
    WIDE: tl.constexpr = D // SLICES
    blocks = tl.cdiv(n, BLOCK_T)
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    byte = tl.arange(0, BYTES)
    channel = tl.arange(0, SLICES)[:, None] * WIDE + byte[None, :]  # [SLICES, BYTES]
    valid = (tl.arange(0, SLICES) >= 0)[:, None] & (byte < WIDE)[None, :]
    inside = (token < n)[:, None, None] & valid[None, :, :]
    X += bg // G * stride_xb + bg % G * stride_xg
    if KEEP is not None:
        KEEP += bg // G * stride_kb + bg % G * stride_kg
    x = _load(X, None, token, channel, inside, stride_xt, 0, 0, 0.0)
    kept = x if KEEP is None else _load(X, KEEP, token, channel, inside, stride_xt, stride_kt, stride_kd, float("inf"))
    code = tl.zeros([BLOCK_T, SLICES, BYTES], tl.int32)
    for i in tl.static_range(GROUPS):
        mine = inside & (channel // (D // GROUPS) == i)[None, :, :]
        low = tl.min(tl.min(tl.where(mine, kept, float("inf")), 2), 1)
        mine = mine & (kept != float("inf"))
        high = tl.max(tl.max(tl.where(mine, kept, float("-inf")), 2), 1)
        scale, zero = _range(low, high, LEVELS, SCALE.dtype.element_ty)
        meta = (bg * n + token) * GROUPS + i
        tl.store(SCALE + meta, scale, mask=token < n)
        tl.store(ZERO + meta, zero, mask=token < n)
        scale, zero = scale.to(tl.float32)[:, None, None], zero.to(tl.float32)[:, None, None]
        code = tl.where((channel // (D // GROUPS) == i)[None, :, :], _encode(x, scale, zero, LEVELS), code)
    _store_codes(CODES, bg * n + token, code, token < n, BITS, D, byte, SLICES)


def launch(
    x: Tensor, kind: str, bits: int, group: int, keep: Tensor | None, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Host wrapper of both kernels; see `kernels.quantize_pack`."""
    _check(x, kind, bits, group, keep, meta_dtype)
    B, G, n, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    stored = (B, G, n // group, D) if kind == "key" else (B, G, n, D // group)
    codes = torch.empty(B, G, n, row_bytes(D, bits), dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(stored, dtype=meta_dtype, device=x.device) for _ in range(2))
    args = (
        x, None if keep is None else keep.view(torch.uint8), codes, scale, zero,
        *x.stride()[:3], *((0,) * 4 if keep is None else keep.stride()), G, n,
    )  # fmt: skip
    setting = settings("quantize", x.dtype, D)
    if kind == "key":
        meta = tile(D, bits, setting.tokens, BYTES_PER_PROGRAM)
        grid = B * G * (n // group) * triton.cdiv(D // meta["SLICES"], meta["BYTES"])
        run(quantize_keys, "gear.quantize_keys", grid, x, (*args, group), setting, **meta)
    else:
        meta = tile(D, bits, setting.tokens, WIDEST_HEAD)
        grid = B * G * triton.cdiv(n, meta["BLOCK_T"])
        run(quantize_values, "gear.quantize_values", grid, x, args, setting, **meta, GROUPS=D // group)
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        raise ValueError(f"a {kind} range does not fit {meta_dtype} metadata; use meta_dtype=torch.float32")
    return codes, scale, zero


def tile(D: int, bits: int, tokens: int, most: int) -> dict[str, Any]:
    """The constants of a tile for heads of width D: a power of two of bytes, at most `most`."""
    slices = 8 if bits == 3 else 8 // bits
    return dict(D=D, BITS=bits, SLICES=slices, BYTES=min(most, triton.next_power_of_2(D // slices)), BLOCK_T=tokens)


def _check(x: Tensor, kind: str, bits: int, group: int, keep: Tensor | None, meta_dtype: torch.dtype) -> None:
    if kind not in ("key", "value") or bits not in (2, 3, 4, 8) or meta_dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"kind={kind!r}, bits={bits!r}, meta_dtype={meta_dtype} is not possible; use 'key' or 'value', bits "
            "2, 3, 4 or 8, and torch.float16 or torch.float32"
        )
    if x.dim() != 4 or 0 in x.shape or x.shape[-1] > WIDEST_HEAD or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; give floats [B, G, n, D], none of them 0 and D up to {WIDEST_HEAD}"
        )
    along = x.shape[2] if kind == "key" else x.shape[3]
    if not 0 < group <= along or along % group:
        raise ValueError(f"group={group} does not divide the {along} elements that {kind} groups run along")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != x.shape):
        raise ValueError(f"keep is {keep.dtype} {tuple(keep.shape)}; give torch.bool {tuple(x.shape)}")

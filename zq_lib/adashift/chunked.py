"""One step on any device in torch; on a CPU chunk by chunk, so that all operations on a chunk find it in the cache.

The gradient is copied once, into its slot of the ring, and its phi is taken in the same pass (sections 5.1 and 5.4).
The infinity norm is 13 times slower than `aminmax` on a CPU, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zq_lib.adashift.batch import Batch, Settings, Slot
from zq_lib.adashift.spatial import NAMED, NONE, PHIS, by_rows, spatial
from zq_lib.adashift.state import AGE_LIMIT, precision
from zq_lib.adashift.window import place, weights

CHUNK = 131_072  # elements: 0.5 MB of each tensor; measured a third faster than 32,768, and 262,144 is no faster
REBUILD = 1_000  # steps after which m is made anew from the ring where its rounding errors never fade (beta1 = 1)

Scale = float | Tensor  # 1 / (sqrt(vhat) + eps), zero where nothing moves


class Piece(NamedTuple):
    """Views of the same elements of a slot's tensors; `old` is the slot of the ring to be overwritten."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    old: Tensor | None
    v: Tensor | None  # elementwise, for phi = none
    age: Tensor | None
    scale: Scale


def step(batch: Batch, settings: Settings, chunk: int | None = CHUNK) -> None:
    """Update every parameter and its state in place; `chunk=None` works on whole tensors."""
    shares = weights(settings.n, settings.beta1)
    for slot in batch.slots():
        _update(slot, settings, shares[0], shares[-1], chunk if slot.param.device.type == "cpu" else None)


def _update(slot: Slot, s: Settings, newest: float, oldest: float, chunk: int | None) -> None:
    t = int(slot.step.item()) + 1
    at, moving, number = place(t, s.n), t > s.n, _is_number(slot, s)
    waiting = None if slot.phi_ring is None else slot.phi_ring.select(0, at)  # `[at]` takes three times as long
    scale: Scale = 0.0
    if moving and waiting is not None:
        scale = _number_scale(slot, waiting.item(), s) if number else _scale(slot.v, slot.age, waiting, s)
        if slot.v.ndim:
            scale = scale.view(-1, *[1] * (slot.param.ndim - 1))  # [rows, 1, ...]
    if s.beta1 == 1 and t % REBUILD == 0:
        slot.exp_avg.copy_(slot.ring.mean(0, dtype=slot.exp_avg.dtype))
    parts = [_step_piece(piece, s, newest, oldest, moving, number) for piece in _pieces(slot, at, scale, s, chunk)]
    if number:
        waiting.fill_(_together(parts, s.phi, slot.param.numel()))
    elif waiting is not None:
        waiting.copy_(torch.cat(parts) if slot.v.ndim else parts[0])
    slot.step.fill_(t)


def _is_number(slot: Slot, s: Settings) -> bool:
    """Whether plain numbers will do: they are quicker than tensors of one element, where reading them costs nothing."""
    return slot.v.device.type == "cpu" and slot.v.ndim == 0 and s.phi in NAMED


def _number_scale(slot: Slot, squares: float, s: Settings) -> float:
    """`_scale` for one block on the CPU."""
    v = s.beta2 * slot.v.item() + (1 - s.beta2) * squares
    alive = v != 0
    age = slot.age.item() + alive
    slot.v.fill_(v)
    slot.age.fill_(age)
    return 1 / (math.sqrt(v / (1 - s.beta2**age)) + s.eps) if alive else 0.0


def _scale(v: Tensor, age: Tensor, squares: Tensor, s: Settings) -> Tensor:
    """Update v and its age in place. A NaN counts as alive: it has to show. expm1, as 1 - beta2^c cancels in fp32."""
    v.mul_(s.beta2).add_(squares, alpha=1 - s.beta2)
    alive = v != 0
    age.add_(alive & (age < AGE_LIMIT) if age.dtype == torch.int16 else alive)
    vhat = v / -torch.expm1(age.to(v.dtype) * math.log(s.beta2)) if s.beta2 else v
    return vhat.sqrt().add_(s.eps).reciprocal_().masked_fill_(~alive, 0)


def _pieces(slot: Slot, at: int, scale: Scale, s: Settings, chunk: int | None) -> Iterator[Piece]:
    old = None if slot.ring is None else slot.ring.select(0, at)
    v, age = (slot.v, slot.age) if s.phi == NONE else (None, None)
    tensors: list[Any] = [slot.param, slot.grad, slot.exp_avg, old, v, age]
    numel = slot.param.numel()
    if chunk is None or numel <= chunk or s.phi not in PHIS:
        yield Piece(*tensors, scale)
    elif by_rows(slot.param, s.block):
        rows = max(1, chunk * slot.param.shape[0] // numel)
        split = [[None] * -(-len(slot.param) // rows) if x is None else x.split(rows) for x in tensors]
        scales = scale.split(rows) if isinstance(scale, Tensor) else [scale] * len(split[0])
        yield from map(Piece, *split, scales)
    elif all(x is None or x.is_contiguous() for x in tensors):
        split = [[None] * -(-numel // chunk) if x is None else x.view(-1).split(chunk) for x in tensors]
        yield from map(Piece, *split, [scale] * len(split[0]))
    else:
        yield Piece(*tensors, scale)


def _step_piece(x: Piece, s: Settings, newest: float, oldest: float, moving: bool, number: bool) -> float | Tensor:
    """Move one piece and return phi of its gradient, or what `_together` needs for it."""
    work, param, g = precision(x.param), x.param, x.grad
    if param.dtype != work or g.dtype != work:
        param, g = param.to(work), g.to(work)
    scale = x.scale
    if s.maximize:
        g = g.neg()
    if s.weight_decay and not s.decoupled:
        g = g.add(param, alpha=s.weight_decay)
    part = _part(g, s.phi) if number else spatial(g.square(), s.phi, s.block) if s.phi != NONE else 0.0
    if moving and s.phi == NONE:
        scale = _scale(x.v, x.age, x.old.to(work).square(), s)
    m = g if x.exp_avg is None else _window(x.exp_avg, x.old, g, s, newest, oldest)
    if x.exp_avg is None and x.old is not None:
        x.old.copy_(g)
    if moving:
        _move(param, m, scale, s)
        if param is not x.param:
            x.param.copy_(param)
    return part


def _window(m: Tensor, old: Tensor, g: Tensor, s: Settings, newest: float, oldest: float) -> Tensor:
    """m_t = beta1 (m_{t-1} - w_{n-1} g_{t-n}) + w_0 g_t, in place; g_t takes the slot of g_{t-n}."""
    if s.beta1 < 1 and old.dtype == g.dtype:
        # The same as a mean of means, one pass less: (1 - beta1) times (g - beta1^n old) / (1 - beta1^n).
        m.lerp_(old.lerp_(g, 1 / (1 - s.beta1**s.n)), 1 - s.beta1)
        old.copy_(g)
        return m
    m.mul_(s.beta1).add_(old, alpha=-s.beta1 * oldest)
    old.copy_(g)  # rounded to the ring's precision: m gets exactly what it will lose again
    return m.add_(old, alpha=newest)


def _move(param: Tensor, m: Tensor, scale: Scale, s: Settings) -> None:
    if isinstance(scale, float):
        if scale == 0:
            return
        if s.decoupled and s.weight_decay:
            param.mul_(1 - s.lr * s.weight_decay)
    elif s.decoupled and s.weight_decay:
        param.addcmul_(param, (scale != 0).to(param.dtype), value=-s.lr * s.weight_decay)
    if s.max_step is not None:
        param.add_((m * scale).clamp_(-s.max_step, s.max_step), alpha=-s.lr)
    elif isinstance(scale, float):
        param.add_(m, alpha=-s.lr * scale)
    else:
        param.addcmul_(m, scale, value=-s.lr)


def _part(g: Tensor, phi: str) -> float:
    """What one piece adds: its largest magnitude, or its sum of squares."""
    if phi == "max":
        low, high = torch.aminmax(g)
        return max(-low.item(), high.item())  # both are NaN if one entry is
    flat = g.reshape(-1)
    return flat.dot(flat).item()


def _together(parts: list[float], phi: str, numel: int) -> float:
    """phi of a whole tensor from its pieces."""
    if phi == "max":
        largest = math.nan if any(map(math.isnan, parts)) else max(parts)  # Python's max may drop a NaN
        return largest * largest
    return sum(parts) / numel if phi == "mean" else sum(parts)

"""Inputs and comparisons that the interpreter and the GPU tests of GEAR's kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.core.backend import Launch, launches
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.gear import GearConfig
from zq_lib.gear.kernels import packed_decode
from zq_lib.gear.packed import Block, compress


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queries(B: int, H: int, D: int = 64) -> Tensor:
    """[B, H, 1, D]"""
    return normal(B, H, 1, D, seed=7)


def block(
    config: GearConfig, n: int, m: int = 1, B: int = 1, G: int = 1, D: int = 64, *, keys: float = 1.0,
    values: float = 1.0, seed: int = 0, tensors: tuple[Tensor, Tensor] | None = None,
) -> Block:  # fmt: skip
    """m segments of n tokens, keys with channels of different size and offset; `keys`, `values`: how large they are."""
    found = None
    for i in range(m):
        spread = 0.5 + 3 * torch.rand(D, generator=torch.Generator().manual_seed(seed + 50))
        both = tensors or (
            keys * (normal(B, G, n, D, seed=seed + 2 * i) * spread + spread),
            values * normal(B, G, n, D, seed=seed + 2 * i + 1),
        )
        prompt = n >= config.long_segment()
        codecs = (config.keys, config.values)
        sides = (compress(x, codec, prompt=prompt, seed=i) for x, codec in zip(both, codecs, strict=True))
        new = Block(*sides, length=n)
        found = new if found is None else found.join(new)
    return found


def attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None, bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain dense attention of one query in fp64: out [B, H, D], log-sum-exp [B, H]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = (query.double() @ keys.mT)[:, :, 0] * scale
    if bias is not None:
        scores = scores + gate[:, :, None].double() * bias[:, None].double()
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0], scores.logsumexp(-1)


def check(
    packed: Block, heads: int, dtype: torch.dtype = torch.float32, scale: float | None = None,
    splits: int | None = None, **named: Tensor,
) -> list[Launch]:  # fmt: skip
    """Assert `packed_decode` against dense attention on the restored tensors, and untouched inputs."""
    B, D = packed.keys.codes.shape[0], packed.keys.width
    query = queries(B, heads, D).to(dtype).to(packed.keys.codes.device)
    scale = D**-0.5 if scale is None else scale
    inputs = [query, *packed.keys.tensors().values(), *packed.values.tensors().values(), *named.values()]
    before = [x.clone() for x in inputs]
    with launches() as seen:
        out, lse = packed_decode(query, packed, scale=scale, splits=splits, **named)
    wanted, wanted_lse = attention(query, *packed.dequantize(), scale, **named)
    bound = tolerance(dtype, seen[0].path)
    assert out.dtype == lse.dtype == torch.float32 and out.is_contiguous()
    assert relative_rms(out, wanted) <= bound.output
    assert relative_rms(lse, wanted_lse) <= (1e-5 if dtype == torch.float32 else bound.output)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    return seen

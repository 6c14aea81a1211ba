"""What `make gpu` times for GEAR: one decode step on packed blocks against dense attention, and quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.kernels import GpuCase
from zq_lib.core.numerics import CODE_TIES, relative_rms, tolerance
from zq_lib.gear.config import GearConfig
from zq_lib.gear.kernels import INTERPRETED, packed_decode, quantize_pack
from zq_lib.gear.outliers import PAGE
from zq_lib.gear.packed import Block, Packed
from zq_lib.gear.packing import pack, row_bytes
from zq_lib.gear.quantize import encode, group_view, ranges

SETTINGS = {
    "KIVI 2 bits": dict(bits=2),
    "GEAR-L 2 bits": dict(bits=2, rank=4),
    "GEAR 2 bits": dict(bits=2, rank=4, outliers=0.02),
    "KIVI 4 bits": dict(bits=4),
}
GROUP = 64


def cases(
    device: str = "cuda",
    *,
    lengths: Sequence[int] = (8192, 16384, 32768, 65536),
    batches: Sequence[int] = (8, 1),
    heads: tuple[int, int] = (32, 8),
    width: int = 128,
    dtype: torch.dtype = torch.float16,
) -> Iterator[GpuCase]:
    """One case per setting, batch and length; `heads` is (H, G). The goal is 2x at batch 8 and 32k tokens."""
    for B in batches:
        for S in lengths:
            for name, setting in SETTINGS.items():
                yield _decode_case(name, setting, B, S, heads, width, dtype, device)
    for kind in ("key", "value"):
        for bits in (2, 4):
            yield _quantize_case(kind, bits, batches[0], lengths[0], heads[1], width, dtype, device)


def random_block(
    B: int, G: int, n: int, D: int, device: str, *, bits: int, rank: int = 0, outliers: float = 0.0
) -> Block:
    """A prompt of n tokens in KIVI's grouping whose restored numbers are about normal, without compressing anything."""
    source = torch.Generator(device).manual_seed(0)
    top = 2**bits - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device, dtype=torch.float16)

    def side(kind: str) -> Packed:
        meta = (B, 1, G, n // GROUP, D) if kind == "key" else (B, 1, G, n, D // GROUP)
        codes = torch.randint(256, (B, 1, G, n, row_bytes(D, bits)), generator=source, device=device, dtype=torch.uint8)
        scale = (normal(*meta) * 0.1).exp() * (3 / top)
        found = dict(codes=codes, scale=scale, zero=scale * (-top / 2) + 0.1 * normal(*meta))
        if rank:
            found |= dict(left=0.1 * normal(B, 1, G, n, rank), right=normal(B, 1, G, D, rank))
        if outliers:
            pages = -(-n // PAGE)
            share = round(outliers * PAGE * D)
            shape = (B, 1, G * pages, share)
            token = torch.randint(min(n, PAGE), shape, generator=source, device=device).sort(-1).values
            channel = torch.randint(D, shape, generator=source, device=device)
            start = torch.arange(0, G * pages * share + 1, share, dtype=torch.int32, device=device)
            found |= dict(
                out_token=token.to(torch.uint8).flatten(2), out_channel=channel.to(torch.uint8).flatten(2),
                out_delta=normal(B, 1, G * pages * share), out_start=start.expand(B, 1, -1).contiguous(),
            )  # fmt: skip
        return Packed(kind, bits, n, D, GROUP, kind == "key", **found)

    return Block(side("key"), side("value"), n)


def _decode_case(
    name: str, setting: dict, B: int, S: int, heads: tuple[int, int], D: int, dtype: torch.dtype, device: str
) -> GpuCase:
    H, G = heads
    scale = D**-0.5
    held: list = []  # made at the first use and dropped with the case: 64k tokens of a batch take gigabytes

    def tensors() -> tuple[Tensor, Block, Tensor, Tensor]:
        if not held:
            block = random_block(B, G, S, D, device, **setting)
            query = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            rows = (block.map(lambda x, b=b: x[b : b + 1]).dequantize() for b in range(B))
            keys, values = (torch.cat(x) for x in zip(*([y.to(dtype) for y in row] for row in rows), strict=True))
            held.extend((query, block, keys, values))
        return tuple(held)

    def ours() -> Tensor:
        query, block, _, _ = tensors()
        return packed_decode(query, block, scale=scale)[0]

    def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)[:, :, 0]

    def peer() -> Tensor:
        query, _, keys, values = tensors()
        return dense(query, keys, values)

    def parity() -> tuple[float, float]:
        """The first and the last row of the batch against fp64 attention on what is restored."""
        query, block, _, _ = tensors()
        out, worst = ours(), 0.0
        for b in {0, B - 1}:
            restored = block.map(lambda x, b=b: x[b : b + 1]).dequantize()
            wanted = dense(query[b : b + 1].double(), *(x.double() for x in restored))
            worst = max(worst, relative_rms(out[b : b + 1], wanted))
        return worst, tolerance(dtype, "interpreter" if INTERPRETED else "triton").output

    packed = _packed_bytes(S, D, **setting) * B * G
    size = dict(B=B, H=H, G=G, S=S, D=D, dtype=str(dtype).removeprefix("torch."))
    runs = {"triton, packed": ours, "sdpa, dense": peer}
    return GpuCase(f"decode, {name}", size, parity, runs, 4 * B * H * S * D, packed)


def _packed_bytes(n: int, D: int, *, bits: int, rank: int = 0, outliers: float = 0.0) -> float:
    """Bytes of the keys and values of one head."""
    codes_and_ranges = n * D * bits / 8 + 4 * n * D / GROUP
    return 2 * (codes_and_ranges + 2 * rank * (n + D) + 4 * outliers * n * D)


def _quantize_case(kind: str, bits: int, B: int, n: int, G: int, D: int, dtype: torch.dtype, device: str) -> GpuCase:
    x = torch.randn(B, G, n, D, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    config = GearConfig.plain(bits, group=GROUP)
    codec = config.keys if kind == "key" else config.values

    def plain() -> Tensor:
        segment = x.float()[:, None]
        view = group_view(codec, segment.shape)
        scale, zero = ranges(segment, None, codec, view)
        codes = encode(segment.reshape(view.shape), scale, zero, bits)
        return pack(codes.to(torch.uint8).view(segment.shape), bits)[:, 0]

    def ours() -> Tensor:
        return quantize_pack(x, kind, bits, GROUP)[0]

    def parity() -> tuple[float, float]:
        return (ours() != plain()).double().mean().item(), CODE_TIES

    runs: dict[str, Callable[[], Tensor]] = {"triton": ours, "torch": plain}
    moved = x.nbytes * (2 if kind == "key" else 1) + x.numel() * (bits / 8 + 4 / GROUP)
    size = dict(B=B, G=G, n=n, D=D, bits=bits, dtype=str(dtype).removeprefix("torch."))
    return GpuCase(f"quantize, {kind}s", size, parity, runs, 5 * x.numel(), moved)

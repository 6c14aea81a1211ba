"""What GEAR's tests share: settings, random inputs, and every tensor that an object holds."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from zq_lib.core.models import tiny
from zq_lib.gear import GearConfig
from zq_lib.gear.cache import GearLayer
from zq_lib.gear.packed import Packed, compress

# 8 bits and factors of full rank: restored almost exactly, so whatever differs from a dense cache is a mistake
LOSSLESS = GearConfig(
    bits=8, group=8, buffer=8, rank=8, rank_decode=8, outliers=0.0, sinks=2, meta_dtype="float32", iterations=2
)
FULL = GearConfig(bits=2, group=8, buffer=8, rank=2, rank_decode=1, outliers=0.25, sinks=2, prompt_segment=16)
ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma", "gemma3")
DENSE = SimpleNamespace(_attn_implementation="sdpa")  # of a model config, all that a layer reads


def ids(rows: int = 1, tokens: int = 30, seed: int = 0) -> Tensor:
    """Random ids in 3..127, [rows, tokens]."""
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int = 3, tokens: int = 30, step: int = 5) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, row b with `step` b padding tokens on the left."""
    x = ids(rows, tokens)
    mask = torch.ones_like(x)
    for b in range(rows):
        mask[b, : step * b] = 0
    return x.masked_fill(mask == 0, 0), mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(config: GearConfig = FULL) -> GearLayer:
    """A layer of no model."""
    return GearLayer(config, DENSE)


def packed(x: Tensor, kind: str = "key", prompt: bool = True, valid: Tensor | None = None, **settings) -> Packed:  # noqa: ANN003
    """x [B, G, n, D] compressed with some settings, plain ones where not given."""
    config = GearConfig.plain(**settings)
    return compress(x, config.keys if kind == "key" else config.values, prompt=prompt, valid=valid)


def error(x: Tensor, restored: Tensor) -> float:
    """Relative Frobenius error."""
    return float((x.double() - restored.double()).norm() / x.double().norm())


def held(thing: object, name: str = "", seen: set[int] | None = None) -> dict[str, Tensor]:
    """Every tensor that can be reached from an object through attributes, lists and dicts, by its path."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | type):
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {name: thing}
    if isinstance(thing, dict):
        inside = thing.items()
    elif isinstance(thing, list | tuple | set):
        inside = enumerate(thing)
    else:
        inside = getattr(thing, "__dict__", {}).items()
    found: dict[str, Tensor] = {}
    for key, value in inside:
        found |= held(value, f"{name}.{key}", seen)
    return found


def assert_same(a: object, b: object) -> None:
    """Both hold the same tensors under the same names, bit for bit."""
    mine, theirs = held(a), held(b)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        other = theirs[name]
        assert x.dtype == other.dtype and torch.equal(x, other), name


def frozen(thing: object) -> dict[str, tuple[int, bytes]]:
    """The compressed tensors as they are now: where they lie and what they hold."""
    return {
        name: (x.data_ptr(), x.flatten().clone().view(torch.uint8).numpy().tobytes())
        for name, x in held(thing).items()
        if ".blocks." in name
    }


__all__ = [
    "ARCHITECTURES", "DENSE", "FULL", "LOSSLESS", "assert_same", "error", "frozen", "held", "ids", "layer",
    "left_padded", "normal", "packed", "tiny",
]  # fmt: skip

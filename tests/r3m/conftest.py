"""A linear reward with labels, and preferences of a few tokens for tiny language models."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Problem(NamedTuple):
    """Features [n, D] of first minus second, true weights [D], true margins [n], and test features."""

    features: Tensor
    weight: Tensor
    margin: Tensor
    test: Tensor

    def accuracy(self, weight: Tensor) -> float:
        """Share of the test pairs that are ranked as by the truth."""
        return float(((self.test @ weight) * (self.test @ self.weight) > 0).double().mean())


@pytest.fixture
def linear() -> Callable[..., Problem]:
    """`linear(n, width, seed)`: pairs whose true reward is linear, with weights of norm 2."""

    def build(n: int = 300, width: int = 6, seed: int = 0) -> Problem:
        source = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
        weight = draw(width)
        weight *= 2 / weight.norm()
        features = draw(n, width)
        return Problem(features, weight, features @ weight, draw(4000, width))

    return build


@pytest.fixture
def token_rows() -> Callable[..., list[dict]]:
    """`token_rows(count)`: rows of `encode` with prompts and completions of unequal lengths; the chosen is rising."""

    def build(count: int = 8, words: int = 60, seed: int = 0) -> list[dict]:
        source = torch.Generator().manual_seed(seed)
        rows = []
        for example in range(count):
            sizes = (torch.randint(1, 6, (3,), generator=source)).tolist()
            prompt, chosen, rejected = (torch.randint(3, words, (k,), generator=source).tolist() for k in sizes)
            row = {"prompt_ids": prompt, "chosen_ids": sorted(chosen) + [5], "rejected_ids": sorted(rejected)[::-1]}
            rows.append(row | {"example": example})
        return rows

    return build


class Largest(TorchDispatchMode):
    """The largest sum of memory that tensors made inside, and alive at the same time, have. Views of tensors from
    outside are theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple] = {}
        self.outside: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.outside |= given - set(self.seen)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.outside:
                self.seen[storage._cdata] = (weakref.ref(t), storage.nbytes())
        self.seen = {k: v for k, v in self.seen.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return out


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """`peak(call)`: the bytes of the tensors that a call makes, at its worst moment."""

    def measure(call: Callable[[], object]) -> int:
        with Largest() as memory:
            call()
        return memory.peak

    return measure

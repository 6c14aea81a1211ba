"""Which implementation runs, and a record of what ran.

An operation that has a torch and a Triton path asks `choose` which one to take. An argument other than "auto" wins over
`with use(...)`, which wins over the environment variable ZQ_BACKEND; "auto" is what is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton")

_chosen: ContextVar[str | None] = ContextVar("zq_backend", default=None)


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter. Triton reads the same variable when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def requested(backend: str | None = None) -> str:
    """The backend that was asked for: the argument unless it is None or "auto", then `use`, then ZQ_BACKEND."""
    return _requested(backend)[0]


def choose(backend: str | None, device: torch.device | str, supported: bool = True, why: str = "") -> str:
    """Return "torch" or "triton" for a call on tensors of `device`.

    `supported` says whether the kernel can do this case, and `why` not. "auto" takes Triton only on a GPU and only when
    supported, and never the interpreter. A "triton" that cannot be honoured raises rather than run another path.
    """
    name, origin = _requested(backend)
    on_gpu = torch.device(device).type == "cuda"  # torch calls ROCm devices "cuda" too
    if name == "auto":
        return "triton" if on_gpu and supported else "torch"
    if name == "triton" and not supported:
        raise ValueError(
            f'{origin} is "triton" but {why or "the kernel does not support this call"}; use "torch" here.'
        )
    if name == "triton" and not on_gpu and not interpreting():
        raise ValueError(
            f'{origin} is "triton" but the tensors are on "{device}", not on a GPU; use "torch", or set '
            "TRITON_INTERPRET=1 before Python starts to step through the kernels on toy sizes."
        )
    return name


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Set the default backend inside a `with` block: `with use("torch"): ...`. Blocks nest."""
    token = _chosen.set(_checked(backend, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _requested(backend: str | None) -> tuple[str, str]:
    """The requested backend and who asked for it."""
    if backend is not None and _checked(backend, "backend") != "auto":
        return backend, "backend"
    if (name := _chosen.get()) is not None:
        return name, "use(...)"
    return _checked(os.environ.get("ZQ_BACKEND") or "auto", "ZQ_BACKEND"), "ZQ_BACKEND"


def _checked(backend: str, origin: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{origin} is {backend!r}; use one of {', '.join(map(repr, BACKENDS))}.")
    return backend


@dataclass(frozen=True)
class Launch:
    """One run of an operation: its name, the path ("triton" on a GPU, "interpreter" or "torch"), grid and settings."""

    kernel: str
    path: str
    grid: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


# Module state rather than context variables: on a GPU autograd runs backward passes in a thread of its own.
_last: Launch | None = None
_collectors: list[list[Launch]] = []


def record(launch: Launch) -> None:
    """Remember a launch. Each host wrapper calls this once per kernel that it starts."""
    global _last
    _last = launch
    for collected in tuple(_collectors):
        collected.append(launch)


def last_launch() -> Launch | None:
    """The most recent launch of this process, or None before the first."""
    return _last


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside a `with` block: `with launches() as seen: ...`. Blocks nest."""
    collected: list[Launch] = []
    _collectors.append(collected)
    try:
        yield collected
    finally:
        _collectors[:] = [other for other in _collectors if other is not collected]

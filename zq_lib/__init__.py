"""zq_lib: nine methods from paper to running code. Importing it loads none of its heavy dependencies."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["__version__", "adalora", "adashift", "gear", "losparse", "masformer", "pasta", "ted"]


def __getattr__(name: str) -> ModuleType:
    """Import a method on first use, so that `from zq_lib import pasta` is the only cost anyone pays."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'zq_lib' has no attribute {name!r}; methods: {', '.join(__all__[1:])}")

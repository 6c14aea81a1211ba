"""What two or more methods share. The names a notebook needs are re-exported here and imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"setup": "seeding", "show": "figures", "table": "figures", "Explorer": "widgets", "check": "exercises"}
__all__ = ["Explorer", "check", "setup", "show", "table"]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name`; torch, matplotlib and ipywidgets cost nothing until then."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module 'zq_lib.core' has no attribute {name!r}; names: {', '.join(__all__)}")

"""The results that a page opens with, kept as JSON whose differences can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def rounded(value: Any, digits: int = 4) -> Any:
    """JSON types only: arrays become lists, tuples too, and floats keep so many significant digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list | tuple) else value


def write(path: Path, data: Mapping[str, Any], depth: int = 2) -> None:
    """Write nested dicts as JSON, opened to `depth` levels with one entry per line; what lies deeper is one line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(_opened(data, depth, "") + "\n", encoding="utf-8")


def _opened(value: Any, depth: int, indent: str) -> str:
    if not depth or not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {_opened(v, depth - 1, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

"""Filters on disk, to be reused and trained on: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from zq_lib.ted.config import TedConfig
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.layers import bare, blocks, width

WEIGHTS, FACTS = "ted_filters.safetensors", "ted_filters.json"


def save_filters(filters: TaskFilters, folder: str | Path) -> Path:
    """Write filters, heads and the running variance; the model itself is not written. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "config": filters.config.to_json(), "layers": filters.layers, "dim": filters.dim, "task": filters.task,
        "origin": filters.origin, "depth": len(blocks(filters.model)), "width": width(filters.model),
    }  # fmt: skip
    save_file({name: t.contiguous() for name, t in filters.state_dict().items()}, folder / WEIGHTS)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def load_filters(model: nn.Module, folder: str | Path) -> TaskFilters:
    """Read what `save_filters` wrote, for the model that the filters were trained behind.

    Raises FileNotFoundError for a folder without them, ValueError for a model of another depth or width.
    """
    folder = Path(folder)
    if not (folder / FACTS).exists():
        raise FileNotFoundError(f"{folder.name!r} holds no filters; it needs {FACTS} and {WEIGHTS}")
    facts = json.loads((folder / FACTS).read_text())
    own = (len(blocks(bare(model))), width(bare(model)))
    if own != (facts["depth"], facts["width"]):
        raise ValueError(
            f"the filters belong to a model of {facts['depth']} blocks and width {facts['width']}, and this one has "
            f"{own[0]} and {own[1]}; give the model they were trained behind"
        )
    filters = TaskFilters(model, TedConfig.from_json(facts["config"]), facts["layers"], facts["dim"], facts["task"])
    filters.load_state_dict(load_file(folder / WEIGHTS))
    filters.origin = facts["origin"]
    return filters

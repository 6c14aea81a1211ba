"""Stop and go on as if nothing had happened: what a method keeps, the optimiser and the random state in one folder.

Tensors are kept as safetensors and everything else as JSON; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer


def write(
    folder: str | Path, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: Optimizer | None
) -> None:
    """Write `<name>.safetensors` and `<name>.json`, with the optimiser's state if given, and torch's random state."""
    folder, facts, tensors = Path(folder), dict(facts), dict(tensors) | {"random": torch.get_rng_state()}
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    if optimizer is not None:
        state = optimizer.state_dict()
        facts["optimizer"] = {"groups": state["param_groups"], "numbers": {}}
        for index, entries in state["state"].items():
            for field, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{field}"] = value
                else:
                    facts["optimizer"]["numbers"].setdefault(str(index), {})[field] = value
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(facts))


def read(
    folder: str | Path, name: str, method: str, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors that `write` wrote. Raises FileNotFoundError for a folder without them, ValueError when an
    optimiser is to be restored that was not saved."""
    folder = Path(folder)
    if not (folder / f"{name}.json").exists():
        raise FileNotFoundError(
            f"{folder.name!r} holds no {method} checkpoint; it needs {name}.json and {name}.safetensors"
        )
    facts, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    if optimizer is not None and "optimizer" not in facts:
        raise ValueError("the checkpoint was saved without an optimiser; save it with handle.save(folder, optimizer)")
    return facts, tensors


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
    """Put the optimiser, if given, and torch's random state back as they were, once parameters have their shapes."""
    if optimizer is not None:
        entries: dict[int, dict[str, Any]] = {int(i): dict(n) for i, n in facts["optimizer"]["numbers"].items()}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".", 2)
                entries.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": entries, "param_groups": facts["optimizer"]["groups"]})
    torch.set_rng_state(tensors["random"])
    if "random_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random_cuda"])


def check_same_run(saved: Mapping[str, Any], config: str, layers: Sequence[str], total: int | None) -> None:
    """Raise ValueError unless a checkpoint's "config" (JSON), "layers" and "total_steps" are those of this run, backend
    and a `total` not yet known apart."""
    theirs, own = json.loads(saved["config"]), json.loads(config)
    for field in own:
        if field not in ("backend", "total_steps") and theirs.get(field) != own[field]:
            raise ValueError(
                f"the checkpoint was made with {field}={theirs.get(field)!r} and this run has {own[field]!r}; a run "
                "can only go on with the config it began with"
            )
    if saved["layers"] != list(layers):
        raise ValueError(
            f"the checkpoint has {len(saved['layers'])} layers, the first is {saved['layers'][0]!r}, and this model "
            f"has {len(layers)}; attach to the model it was made with"
        )
    if total not in (None, saved["total_steps"]):
        raise ValueError(
            f"the checkpoint was made for total_steps={saved['total_steps']} and this run has {total}; "
            "a run can only go on with the schedule it began with"
        )

"""Stop and go on as if nothing had happened: the adaptation, the optimiser and the random state in one folder.

Tensors are kept as safetensors and everything else as JSON; nothing is pickled. A run resumed from here is bit for bit
the run that was not interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from zq_lib.adalora.importance import Importance
from zq_lib.adalora.trace import RankTrace

if TYPE_CHECKING:
    from zq_lib.adalora.adaptation import Adaptation

TENSORS, FACTS, TRACE = "adalora.safetensors", "adalora.json", "adalora_trace.npz"


def state_of(handle: Adaptation) -> dict[str, Any]:
    """Config as JSON, step, names of the layers, flags, and all tensors: parameters, statistics and the mask."""
    tensors: dict[str, Tensor] = {"keep": handle.keep}
    for path, adapter in handle.triplets.items():
        for part in ("left", "values", "right"):
            tensors[f"adapter.{path}.{part}"] = getattr(adapter, part)
    for path, module in handle.trained.items():
        for name, p in module.named_parameters():
            tensors[f"trained.{path}.{name}"] = p
    if handle.importance is not None:
        tensors |= {"sensitivity": handle.importance.sensitivity, "uncertainty": handle.importance.uncertainty}
    return {
        "config": handle.config.to_json(),
        "layers": list(handle.triplets),
        "total_steps": handle.schedule.total,
        "step": handle.step,
        "finished": handle.finished,
        "shrunk": handle.shrunk,
        "tensors": {name: t.detach().clone() for name, t in tensors.items()},
    }


@torch.no_grad()
def restore(handle: Adaptation, state: Mapping[str, Any]) -> None:
    """Put `state` into a handle that was attached with the same config to the same layers."""
    saved, own = json.loads(state["config"]), json.loads(handle.config.to_json())
    for field in own:
        if field not in ("backend", "total_steps") and saved.get(field) != own[field]:
            raise ValueError(
                f"the checkpoint was made with {field}={saved.get(field)!r} and this run has {own[field]!r}; a run can "
                "only go on with the config it began with"
            )
    if state["layers"] != list(handle.triplets):
        raise ValueError(
            f"the checkpoint has {len(state['layers'])} layers, the first is {state['layers'][0]!r}, and this model "
            f"has {len(handle.triplets)}; attach to the model it was made with"
        )
    if handle._schedule is None:
        handle.set_total_steps(state["total_steps"])
    elif handle.schedule.total != state["total_steps"]:
        raise ValueError(
            f"the checkpoint was made for total_steps={state['total_steps']} and this run has {handle.schedule.total}; "
            "a run can only go on with the schedule it began with"
        )
    tensors = state["tensors"]
    for path, adapter in handle.triplets.items():
        values = tensors[f"adapter.{path}.values"]
        if values.shape[0] != adapter.rank:
            adapter.resize(values.shape[0])
        for part in ("left", "values", "right"):
            getattr(adapter, part).copy_(tensors[f"adapter.{path}.{part}"])
    for path, module in handle.trained.items():
        for name, p in module.named_parameters():
            p.copy_(tensors[f"trained.{path}.{name}"])
    handle.keep = tensors["keep"].clone()
    handle.step, handle.finished, handle.shrunk = state["step"], state["finished"], state["shrunk"]
    config = handle.config
    if "sensitivity" in tensors:
        importance = handle.importance or Importance(
            handle.adapters, config.score, config.beta1, config.beta2, config.backend
        )
        importance.sensitivity.copy_(tensors["sensitivity"])
        importance.uncertainty.copy_(tensors["uncertainty"])
        handle.importance = importance
    else:
        handle.importance = None
        if not handle.shrunk and handle.schedule.prunes:
            handle._mask_gradients()


def save(handle: Adaptation, folder: str | Path, optimizer: Optimizer | None = None) -> None:
    """Write the state of the adaptation, of the optimiser if given, torch's random state and the trace to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = state_of(handle)
    tensors = facts.pop("tensors") | {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    if optimizer is not None:
        state = optimizer.state_dict()
        facts["optimizer"] = {"groups": state["param_groups"], "numbers": {}}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    facts["optimizer"]["numbers"].setdefault(str(index), {})[name] = value
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts))
    handle.trace.save(folder / TRACE)


def load(handle: Adaptation, folder: str | Path, optimizer: Optimizer | None = None) -> None:
    """Read what `save` wrote. Raises FileNotFoundError for a folder without it, ValueError as `restore` does and when
    an optimiser is to be restored that was not saved."""
    folder = Path(folder)
    if not (folder / FACTS).exists():
        raise FileNotFoundError(f"{folder.name!r} holds no AdaLoRA checkpoint; it needs {FACTS} and {TENSORS}")
    facts, tensors = json.loads((folder / FACTS).read_text()), load_file(folder / TENSORS)
    if optimizer is not None and "optimizer" not in facts:
        raise ValueError("the checkpoint was saved without an optimiser; save it with handle.save(folder, optimizer)")
    restore(handle, {**facts, "tensors": tensors})
    handle.trace = RankTrace.load(folder / TRACE)
    if optimizer is not None:
        entries: dict[int, dict[str, Any]] = {int(i): dict(n) for i, n in facts["optimizer"]["numbers"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, field = name.split(".", 2)
                entries.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": entries, "param_groups": facts["optimizer"]["groups"]})
    torch.set_rng_state(tensors["random"])
    if "random_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random_cuda"])

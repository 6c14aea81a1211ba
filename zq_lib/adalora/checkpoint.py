"""Stop an adaptation and go on as if nothing had happened: the resumed run is bit for bit the uninterrupted one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zq_lib.adalora.importance import Importance
from zq_lib.adalora.trace import RankTrace
from zq_lib.core import checkpoint

if TYPE_CHECKING:
    from zq_lib.adalora.adaptation import Adaptation

NAME, TRACE = "adalora", "adalora_trace.npz"


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
    total = None if handle._schedule is None else handle.schedule.total
    checkpoint.check_same_run(state, handle.config.to_json(), list(handle.triplets), total)
    if total is None:
        handle.set_total_steps(state["total_steps"])
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
    facts = state_of(handle)
    checkpoint.write(folder, NAME, facts, facts.pop("tensors"), optimizer)
    handle.trace.save(Path(folder) / TRACE)


def load(handle: Adaptation, folder: str | Path, optimizer: Optimizer | None = None) -> None:
    """Read what `save` wrote. Raises FileNotFoundError for a folder without it, ValueError as `restore` does and when
    an optimiser is to be restored that was not saved."""
    facts, tensors = checkpoint.read(folder, NAME, "AdaLoRA", optimizer)
    restore(handle, {**facts, "tensors": tensors})
    handle.trace = RankTrace.load(Path(folder) / TRACE)
    checkpoint.restore(facts, tensors, optimizer)

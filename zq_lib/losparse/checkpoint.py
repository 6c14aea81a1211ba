"""Stop a compression and go on as if nothing had happened, before the rows are cut or after.

A run resumed from here is bit for bit the run that was not interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from zq_lib.core import checkpoint
from zq_lib.losparse.importance import RowImportance
from zq_lib.losparse.trace import DensityTrace

if TYPE_CHECKING:
    from zq_lib.losparse.compression import Compression

NAME, TRACE, MODEL = "losparse", "losparse_trace.json", "model."


def save(handle: Compression, folder: str | Path, optimizer: Optimizer | None = None, weights: bool = True) -> None:
    """Write the state of the compression, of the whole model (it is all trained) unless `weights` is False, of the
    optimiser if given, torch's random state and the trace to `folder`."""
    tensors: dict[str, Tensor] = {"keep": handle.keep}
    if handle.importance is not None:
        tensors["average"] = handle.importance.average
        if handle.importance.window is not None:
            tensors["window"] = handle.importance.window
    if weights:
        seen: set[int] = set()
        for name, t in handle.model.state_dict().items():
            if not t.numel() or t.data_ptr() not in seen:  # what is tied is tied in the fresh model too
                seen.add(t.data_ptr())
                tensors[MODEL + name] = t.detach()
    facts = {
        "config": handle.config.to_json(),
        "layers": list(handle.layers),
        "total_steps": handle.schedule.total,
        "step": handle.step,
        "fixed": handle.fixed,
        "shrunk": handle.shrunk,
    }
    checkpoint.write(folder, NAME, facts, tensors, optimizer)
    handle.trace.save(Path(folder) / TRACE)


@torch.no_grad()
def load(handle: Compression, folder: str | Path, optimizer: Optimizer | None = None) -> None:
    """Read what `save` wrote into a handle that was attached with the same config to the same layers.

    Raises FileNotFoundError for a folder without it, and ValueError for another config, model or number of steps, and
    when an optimiser is to be restored that was not saved.
    """
    facts, tensors = checkpoint.read(folder, NAME, "LoSparse", optimizer)
    own, total = handle.config, handle.total_steps
    checkpoint.check_same_run(facts, own.to_json(), handle.layers, total)
    if total is None:
        handle.set_total_steps(facts["total_steps"])
    weights = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    if weights:
        unknown = handle.model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(
                f"the checkpoint has {unknown[0]!r}, which this model has not; give the model it was made for"
            )
    device = handle.keep.device
    handle.keep = tensors["keep"].to(device)
    handle.step, handle.fixed, handle.shrunk = facts["step"], facts["fixed"], facts["shrunk"]
    for hook in handle._grad_masks:
        hook.remove()
    handle._grad_masks, handle.importance = [], None
    if "average" in tensors:
        handle.importance = RowImportance(
            [m.sparse for m in handle.layers.values()], own.score, own.form, own.interval, own.beta, own.backend
        )
        handle.importance.average.copy_(tensors["average"])
        if "window" in tensors:
            handle.importance.window.copy_(tensors["window"])
    if handle.fixed and not handle.shrunk:
        handle._mask_gradients()
    handle.trace = DensityTrace.load(Path(folder) / TRACE)
    checkpoint.restore(facts, tensors, optimizer)

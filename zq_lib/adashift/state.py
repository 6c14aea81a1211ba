"""What the optimiser keeps for a parameter: ordinary tensors, none that its settings do not need (section 5.1).

For a scalar phi, phi(g_t^2) is taken when g_t arrives and waits in a ring of n numbers, so v never needs the old
gradient; that one is needed only to leave the window. With beta1 = 0 neither ring nor moment exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zq_lib.adashift.spatial import NONE, blocks_shape

AGE_LIMIT = torch.iinfo(torch.int16).max
FORGOTTEN = 1e-14  # the correction 1 - beta2^age is 1 to this precision where a short age stops counting


def precision(param: Tensor) -> torch.dtype:
    """What moments and v are kept in: eps = 1e-10 does nothing in half precision."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def layout(param: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of everything that a parameter's state holds under a group's settings."""
    n, (beta1, beta2), phi, work = group["n"], group["betas"], group["phi"], precision(param)
    blocks, shape = blocks_shape(param, phi, group["block"]), tuple(param.shape)
    # Two bytes an entry suffice where beta2 has been forgotten by the time they overflow.
    short = phi == NONE and beta2**AGE_LIMIT < FORGOTTEN
    found = {"step": ((), torch.float32), "v": (blocks, work), "age": (blocks, torch.int16 if short else torch.int32)}
    if phi != NONE:
        found["phi_ring"] = ((n, *blocks), work)
    if beta1 > 0:
        found["exp_avg"] = (shape, work)
    if beta1 > 0 or phi == NONE:
        found["ring"] = ((n, *shape), group["ring_dtype"] or work)
    return found


def create(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state before the first step: zeros."""
    state = {
        name: torch.zeros(shape, dtype=dtype, device="cpu" if name == "step" else param.device)
        for name, (shape, dtype) in layout(param, group).items()
    }
    if "exp_avg" in state:
        state["exp_avg"] = torch.zeros_like(param, dtype=precision(param), memory_format=torch.preserve_format)
    return state


def check(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any], which: str) -> None:
    """Raise ValueError unless a state is what `param` and `group` need. Dtypes are not compared."""
    wanted = layout(param, group)
    if odd := sorted(set(state) ^ set(wanted)):
        raise ValueError(
            f"the state of {which} holds {', '.join(sorted(state)) or 'nothing'} where these settings need "
            f"{', '.join(sorted(wanted))} (differing: {', '.join(odd)}): it comes from another optimiser, or beta1 or "
            "phi was changed; start with an empty state"
        )
    for name, (shape, _) in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"the state of {which} has {name} of shape {tuple(state[name].shape)} where a parameter of shape "
                f"{tuple(param.shape)} with n={group['n']} and block={group['block']!r} needs {shape}; n, block and "
                "shapes are fixed after the first step"
            )


def restored(saved: Mapping[str, Tensor], param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a saved state in the precision it should have, which is not always the parameter's own."""
    return {
        name: saved[name].detach().to("cpu" if name == "step" else param.device, dtype, copy=True)
        for name, (_, dtype) in layout(param, group).items()
    }

"""AdaShift as a `torch.optim.Optimizer`: a second moment from the gradient of n steps ago (section 1.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zq_lib.adashift import chunked
from zq_lib.adashift.batch import Batch, Settings, Slot
from zq_lib.adashift.config import FRAGILE_EPS, AdaShiftConfig
from zq_lib.adashift.spatial import Phi, name
from zq_lib.adashift.state import check, create, restored
from zq_lib.core import backend

SETTINGS = tuple(field.name for field in fields(AdaShiftConfig))
FIXED = ("n", "phi", "block")  # what the shape of the state rests on; beta1 = 0 shows in the state itself


@dataclass(frozen=True)
class ParameterReport:
    """One parameter: steps it has seen, share of its blocks that never had a gradient, largest lr / (sqrt(vhat) + eps)
    of its blocks, and bytes of state."""

    which: str
    steps: int
    frozen: float
    largest_rate: float
    state_bytes: int


class AdaShift(Optimizer):
    """Adam whose divisor has not seen the gradients it divides; see `AdaShiftConfig` for what every argument means.

    Groups may differ in all settings. Steps are counted for each parameter, so one that joins late, or is frozen for a
    while, starts or goes on as if it were alone. Nothing of it moves during its first n steps, in which learning rate
    schedulers already count. State: `step`, `v`, `age`, and where needed `phi_ring`, `exp_avg`, `ring`; plain tensors,
    so `torch.load(weights_only=True)` reads a checkpoint back, bit for bit. Under `torch.compile` the step runs
    outside the graph.

    Raises ValueError for settings out of range, complex parameters, sparse gradients, a state dict of another optimiser
    or other shapes, and settings changed after the first step that the state rests on (n, phi, block, beta1 to or from
    zero).

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = AdaShift([weight], lr=1e-2, phi="max")
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        n: int = 10,
        phi: str | Phi = "max",
        eps: float | None = None,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        *,
        block: str = "tensor",
        ring_dtype: torch.dtype | None = None,
        max_step: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        given = locals()
        AdaShiftConfig(**{key: given[key] for key in SETTINGS})  # a wrong default is an error even if no group uses it
        super().__init__(params, {key: given[key] for key in SETTINGS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where the group names some; they start at their own step one."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            config = AdaShiftConfig(**{key: group[key] for key in SETTINGS})
            for i, param in enumerate(group["params"]):
                if not param.is_floating_point():
                    raise ValueError(
                        f"parameter {i} of the group is {param.dtype}; AdaShift takes real numbers, so give it "
                        "torch.view_as_real of a complex tensor"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        group |= {"lr": config.lr, "eps": config.eps, "betas": tuple(config.betas)}
        if config.fragile:
            warnings.warn(
                f"phi='none' with eps={config.eps:g} diverges on most networks: entries whose gradients are almost "
                f"always zero make steps without bound; use eps=1e-5, or at least {FRAGILE_EPS:g}",
                stacklevel=4,  # past torch's Optimizer to who made this one
            )
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the groups: nothing the kernels remember is valid any more, and who unscales gradients."""
        self._caches: dict[Any, dict[Any, Any]] = {}
        self._checked: dict[Tensor, Any] = {}
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step; returns what `closure` returned, which is called with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo
    def _update(self) -> None:
        for index, group in enumerate(self.param_groups):
            alike: dict[Any, list[Tensor]] = {}
            for i, param in enumerate(group["params"]):
                if param.grad is None or param.numel() == 0:
                    continue
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"{_which(group, index, i)} has a sparse gradient; make it dense (sparse=False in "
                        'nn.Embedding), and give it block="row" if rows are what should have a v'
                    )
                alike.setdefault((param.device, param.dtype), []).append(param)
                self._check(param, group, index, i)
            for (device, dtype), params in alike.items():
                self._update_alike(group, params, self._caches.setdefault((index, device, dtype), {}))

    def _check(self, param: Tensor, group: Mapping[str, Any], index: int, i: int) -> None:
        """Make a state, or see that it still fits; once for every shape and settings that it rests on."""
        fits = (param.shape, group["betas"][0] > 0, *(group[key] for key in FIXED))
        if self._checked.get(param) != fits or not self.state[param]:
            if not self.state[param]:
                self.state[param] = create(param, group)
            check(self.state[param], param, group, _which(group, index, i))
            self._checked[param] = fits

    def _update_alike(self, group: Mapping[str, Any], params: list[Tensor], cache: dict[Any, Any]) -> None:
        """One step of parameters of one device and dtype."""
        settings = Settings(
            beta1=group["betas"][0], beta2=group["betas"][1],
            **{key: group[key] for key in ("lr", "n", "phi", "block", "eps", "weight_decay", "decoupled", "maximize",
                                           "max_step")},
        )  # fmt: skip
        fused = self._fused(group, params, settings)
        device = params[0].device
        slots = []
        for param in params:
            state = self.state[param]
            where = device if fused else torch.device("cpu")  # read by the kernels there, by Python here
            if state["step"].device != where:
                state["step"] = state["step"].to(where)
            slots.append(Slot(param, param.grad, *(state.get(field) for field in Slot._fields[2:])))
        scale, found_inf = (_on(getattr(self, key, None), device) for key in ("grad_scale", "found_inf"))
        if fused:
            from zq_lib.adashift.kernels import fused_step

            dense = [slot._replace(grad=slot.grad.contiguous()) for slot in slots]
            fused_step(Batch.of(dense), settings, cache, scale, found_inf)
            return
        if found_inf is not None and float(found_inf):
            return
        if scale is not None:
            slots = [slot._replace(grad=slot.grad / scale.to(slot.grad.dtype)) for slot in slots]
        plain = Settings(**{**vars(settings), "lr": float(settings.lr)})
        chunked.step(Batch.of(slots), plain, None if group["foreach"] is False else chunked.CHUNK)

    def _fused(self, group: Mapping[str, Any], params: list[Tensor], settings: Settings) -> bool:
        """Whether the Triton kernels run. Raises ValueError where they were asked for and cannot."""
        asked = {True: "triton", False: "torch", None: None}[group["fused"]]
        device, why = params[0].device, ""
        if device.type == "cuda" or backend.requested(asked) == "triton":
            from zq_lib.adashift.kernels import unsupported

            if not all(p.is_contiguous() for p in params):
                why = "a parameter is not contiguous"
            elif callable(settings.phi):
                why = "phi is a function"
            else:
                why = unsupported(params, settings)
        fused = backend.choose(asked, device, not why, why) == "triton"
        if group["capturable"] and not fused:
            raise ValueError(
                f"capturable=True needs the kernels, which do not run here ({why or f'parameters are on {device}'}); "
                "set capturable=False"
            )
        return fused

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a function phi is saved by its name."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group["phi"] = name(group["phi"])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken, bit for bit; the tensors are copied.

        Raises ValueError for a state dict of another optimiser, of other shapes, or made with another n, phi or block.
        """
        own = [{key: group[key] for key in FIXED} for group in self.param_groups]
        for index, (saved, group) in enumerate(zip(state_dict["param_groups"], own, strict=False)):
            if missing := [key for key in SETTINGS if key not in saved]:
                raise ValueError(f"group {index} of the state dict lacks {missing[0]!r}: it is of another optimiser")
            for key in FIXED:
                if saved[key] != name(group[key]) if key == "phi" else saved[key] != group[key]:
                    raise ValueError(
                        f"group {index} was saved with {key}={saved[key]!r} and this optimiser has "
                        f"{key}={name(group[key]) if key == 'phi' else group[key]!r}; make it with the saved one"
                    )
        pairs = [
            (number, param, {**saved, "phi": group["phi"]}, _which(saved, index, i))
            for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False))
            for i, (number, param) in enumerate(zip(saved["params"], group["params"], strict=False))
        ]
        states = state_dict["state"]
        for number, param, group, which in pairs:
            if number in states:
                check(states[number], param, group, which)
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group["phi"] = kept["phi"]
        for number, param, group, _ in pairs:  # torch casts to the parameter's dtype, and half precision is not enough
            if number in states:
                self.state[param] = restored(states[number], param, group)
        self._prepare()

    def report(self) -> list[ParameterReport]:
        """What the optimiser knows of each parameter that has had a gradient."""
        found = []
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if not (state := self.state.get(param)):
                    continue
                alive = state["v"] != 0
                vhat = state["v"][alive] / (1 - group["betas"][1] ** state["age"][alive].double())
                rates = float(group["lr"]) / (vhat.sqrt() + group["eps"])
                found.append(
                    ParameterReport(
                        _which(group, index, i), int(state["step"]), 1 - float(alive.double().mean()),
                        float(rates.max()) if len(rates) else 0.0, sum(x.nbytes for x in state.values()),
                    )
                )  # fmt: skip
        return found


def _which(group: Mapping[str, Any], index: int, i: int) -> str:
    """How messages name a parameter."""
    names = group.get("param_names")
    return names[i] if names else f"parameter {i} of group {index}"


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)

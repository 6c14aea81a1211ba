"""The importance of every entry, smoothed over steps, for all adapters at once on one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zq_lib.adalora.adapter import Triplets
from zq_lib.core.backend import Launch, choose, record

ALIGN = 32  # entries; 128 bytes, so that every tensor starts on a cache line


class Importance:
    """Sensitivity I-bar and uncertainty U-bar of all entries of n adapters of equal rank R (section 3.2).

    The adapters' parameters become views of one buffer, so that one step costs a handful of operations instead of
    ten for each of the 3n tensors; parameters that were moved since are taken in again. Statistics are kept in the
    parameters' type, which is fp32 unless the model is in fp64.

    `kind` is a `AdaLoraConfig.score`. Raises TypeError for parameters cast below fp32, ValueError if they are on
    several devices.
    """

    def __init__(self, adapters: Sequence[Triplets], kind: str, beta1: float, beta2: float, backend: str) -> None:
        self.adapters, self.kind, self.beta1, self.beta2, self.backend = list(adapters), kind, beta1, beta2, backend
        self.parameters = [p for a in adapters for p in (a.left, a.values, a.right)]
        self.offsets, self.size = [], 0
        for p in self.parameters:
            self.offsets.append(self.size)
            self.size += -(-p.numel() // ALIGN) * ALIGN
        self._table = None  # what the kernel needs to find every tensor
        self._by_kernel = False  # whether the latest update ran there, and left the sums of the scores
        self._adopt()
        self.sensitivity = torch.zeros_like(self.weights)
        self.uncertainty = torch.zeros_like(self.weights)

    def _adopt(self) -> None:
        """Copy the parameters into one buffer and let them live there."""
        first = self.parameters[0]
        if len({p.device for p in self.parameters}) > 1:
            raise ValueError("the adapters are on several devices; put the model on one device before attach")
        if first.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the adapters are {first.dtype}, but importance needs fp32; cast the model before attach")
        self.weights = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.weights)
        self._first, self._second = torch.empty_like(self.weights), torch.empty_like(self.weights)
        self._homes, self._grad_views = self.views(self.weights), self.views(self.grads)
        for p, home in zip(self.parameters, self._homes, strict=True):
            p.data = home.copy_(p.data)
        self._addresses = [p.data_ptr() for p in self.parameters]
        self._table = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat buffer cut into the shapes of the parameters."""
        places = zip(self.offsets, self.parameters, strict=True)
        return [flat[start : start + p.numel()].view(p.shape) for start, p in places]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights and gradients. A parameter without gradient counts as unused: I = 0.

        Raises RuntimeError when no parameter has a gradient.
        """
        grads = [p.grad for p in self.parameters]
        if not any(g is not None for g in grads):
            raise RuntimeError(
                "no adapter has a gradient, so there is nothing to score: the order is backward, optimizer.step, "
                "zero_grad, and the loss must depend on the adapted layers"
            )
        if [p.data_ptr() for p in self.parameters] != self._addresses:
            self._adopt()
            self.sensitivity = self.sensitivity.to(self.weights)
            self.uncertainty = self.uncertainty.to(self.weights)
        if self.kind == "magnitude":
            return
        smoothing = (0.0 if self.kind == "sensitivity" else self.beta1), self.beta2
        able = self.weights.dtype == torch.float32 and all(g is None or g.dtype == torch.float32 for g in grads)
        if choose(self.backend, self.weights.device, able, "adapters or gradients are not float32") == "triton":
            from zq_lib.adalora.kernels import ImportanceTable

            if self._table is None:
                self._table = ImportanceTable(self.adapters, self.offsets)
            summed = self.kind != "adalora"
            self._table.update(self.weights, grads, self.sensitivity, self.uncertainty, *smoothing, summed)
            self._by_kernel = True
            return
        self._by_kernel = False
        record(Launch("adalora.importance", "torch"))
        self._gather(grads)
        self._smooth(*smoothing)

    def _gather(self, grads: list[Tensor | None]) -> None:
        if all(g is not None for g in grads):
            torch._foreach_copy_(self._grad_views, grads)
            return
        for view, grad in zip(self._grad_views, grads, strict=True):
            view.copy_(grad) if grad is not None else view.zero_()

    def _smooth(self, beta1: float, beta2: float) -> None:
        """Equations 8 to 10, rounded as one operation after the other would, in two scratch buffers."""
        raw = torch.mul(self.weights, self.grads, out=self._first).abs_()
        self.sensitivity.mul_(beta1).add_(torch.mul(raw, 1 - beta1, out=self._second))
        self.uncertainty.mul_(beta2).add_(raw.sub_(self.sensitivity).abs_().mul_(1 - beta2))

    @torch.no_grad()
    def scores(self) -> Tensor:
        """S of every triplet, [n, R] (equation 7)."""
        if self.kind == "magnitude":
            return torch.stack([a.values.detach().abs() for a in self.adapters])
        if self._by_kernel:
            return self._table.scores()
        if self.kind == "adalora":
            flat = torch.mul(self.sensitivity, self.uncertainty, out=self._first)
        else:
            flat = self.sensitivity
        parts = self.views(flat)
        rows = []
        for left, values, right in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
            rows.append(values + (right.mean(1) + left.mean(0)))
        return torch.stack(rows)

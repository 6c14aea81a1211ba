"""The importance of every row of every S, smoothed over steps: two floats for each row, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zq_lib.core.backend import Launch, choose, record


class RowImportance:
    """Gamma of all rows of n matrices S, [rows] fp32, in the order of `matrices` (section 4.2, equations 6 and 7).

    The mean over a row commutes with the smoothing over steps, so `average` (I-bar) and, for the form "window", the
    mean of the running `window` are all the memory: 4 or 8 bytes a row. `kind` is a `LoSparseConfig.score`; "random"
    draws its scores once, from torch's generator. All matrices are on one device.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], kind: str, form: str, interval: int, beta: float, backend: str
    ) -> None:
        self.matrices, self.kind, self.form = list(matrices), kind, form
        self.interval, self.beta, self.backend = interval, beta, backend
        self.counts = [p.shape[0] for p in matrices]
        size, device = sum(self.counts), matrices[0].device
        start = torch.rand(size) if kind == "random" else torch.zeros(size)
        self.average = start.to(device)
        smoothed = kind == "sensitivity"
        self.window = torch.zeros(size, device=device) if smoothed and form == "window" else None
        self._table = None  # what the kernel needs to find every row

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the current matrices and gradients. A matrix without gradient counts as unused: I = 0."""
        if self.kind != "sensitivity":
            return
        self._follow()
        grads = [p.grad for p in self.matrices]
        place = step % self.interval if self.window is not None else None
        table = self._kernel(grads)
        if table is not None:
            window = self.average if self.window is None else self.window
            table.update(grads, window, self.average, self.beta, place)
            return
        record(Launch("losparse.importance", "torch"))
        now = self._now(grads)
        if place is None:
            self.average.mul_(self.beta).add_(now * (1 - self.beta))
        elif place == 0:
            self.average.mul_(self.beta).add_(self.window * (1 - self.beta))
            self.window.copy_(now)
        else:
            self.window.mul_(place).add_(now).div_(place + 1)

    def _now(self, grads: Sequence[Tensor | None]) -> Tensor:
        """mean_j |S_ij dL/dS_ij| of every row, one matrix after the other in one scratch buffer."""
        wide = torch.promote_types(self.matrices[0].dtype, torch.float32)
        scratch = torch.empty(max(p.numel() for p in self.matrices), dtype=wide, device=self.average.device)
        now = torch.zeros_like(self.average)
        for matrix, grad, out in zip(self.matrices, grads, now.split(self.counts), strict=True):
            if grad is not None and matrix.numel():
                product = scratch[: matrix.numel()].view(matrix.shape)
                if matrix.dtype == wide:
                    torch.mul(matrix.data, grad, out=product)
                else:  # in fp16 the product itself would underflow
                    product.copy_(matrix.data).mul_(grad)
                out.copy_(product.abs_().mean(1))
        return now

    def _follow(self) -> None:
        """Go where the model has gone since."""
        device = self.matrices[0].device
        if self.average.device != device:
            self.average, self._table = self.average.to(device), None
            self.window = None if self.window is None else self.window.to(device)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Gamma of every row, [rows] fp32; a new tensor."""
        if self.kind != "magnitude":
            return self.average.clone()
        return torch.cat([p.data.float().square().mean(1).sqrt() for p in self.matrices])

    @torch.no_grad()
    def zero(self, keep: Tensor) -> None:
        """Zero the rows of all matrices where `keep` [rows] bool is False; gradients and moments stay as they are."""
        table = self._kernel([])
        if table is not None:
            table.zero(keep)
            return
        for matrix, part in zip(self.matrices, keep.split(self.counts), strict=True):
            matrix.data.mul_(part[:, None])  # 8 times as fast on a CPU as a masked fill along rows

    def _kernel(self, grads: Sequence[Tensor | None]) -> Any:
        """The table of the Triton kernels where these run, or None."""
        first = self.matrices[0]
        types = (torch.float32, torch.float16, torch.bfloat16)
        alike = all(t.dtype == first.dtype and t.is_contiguous() for t in (*self.matrices, *grads) if t is not None)
        able = alike and first.dtype in types
        why = "matrices and gradients are not all of one type below fp64"
        if choose(self.backend, first.device, able, why) != "triton":
            return None
        if self._table is None:
            from zq_lib.losparse.kernels import RowImportanceTable

            self._table = RowImportanceTable(self.matrices)
        return self._table

"""Adapters in SVD form for the four kinds of layer: W = W0 + s P diag(l) Q without ever building W in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.core.backend import Launch, choose, record
from zq_lib.core.surgery import reshape_parameter


class Triplets(nn.Module):
    """One adapter of one matrix: `left` P [N, R], `values` l [R], `right` Q [R, K] and their fixed `scale`.

    l starts at 0, so nothing changes at first; P and Q are Gaussian. Stored in fp32 whatever the model is in (fp64 for
    a model in fp64). Loading a state with another R resizes the adapter, because pruning changes R.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float, like: Tensor, std: float, dropout: float):
        super().__init__()
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        new = {"device": like.device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(outputs, rank, **new).normal_(0, std))
        self.values = nn.Parameter(torch.zeros(rank, **new))
        self.right = nn.Parameter(torch.empty(rank, inputs, **new).normal_(0, std))
        self.scale, self.active = scale, True
        self.dropout = nn.Dropout(dropout)

    @property
    def rank(self) -> int:
        """How many triplets there are now."""
        return self.values.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one triplet, N + K (its value is not counted, as in the budget)."""
        return self.left.shape[0] + self.right.shape[1]

    def delta(self) -> Tensor:
        """s P diag(l) Q, [N, K]."""
        return (self.left * (self.scale * self.values)) @ self.right

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Give the parameters room for `rank` triplets, with undefined content; the Parameter objects stay the same."""
        reshape_parameter(self.left, self.left.new_empty(self.left.shape[0], rank))
        reshape_parameter(self.values, self.values.new_empty(rank))
        reshape_parameter(self.right, self.right.new_empty(rank, self.right.shape[1]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        values = state_dict.get(prefix + "values")
        if values is not None and values.shape[0] != self.rank:
            self.resize(values.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Adapted(nn.Module, ABC):
    """A layer with adapters around it. Attributes that it does not have are those of the layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.backend = "auto"
        self._original: Tensor | None = None  # the weight before merging

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @staticmethod
    @abstractmethod
    def size(base: nn.Module) -> tuple[int, int]:
        """Outputs N and inputs K of the layer's weight, seen as a matrix."""

    @abstractmethod
    def update(self, adapter: Triplets, x: Tensor, out: Tensor) -> Tensor:
        """`out` plus what `adapter` adds for the layer's input `x`."""

    def as_weight(self, delta: Tensor) -> Tensor:
        """A change [N, K] in the layout of the layer's weight."""
        return delta

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the weight at the moment."""
        return self._original is not None

    def running(self) -> list[Triplets]:
        """The adapters that take part in the forward pass."""
        return [] if self.merged else [a for a in self.adapters.values() if a.active and a.rank]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for adapter in self.running():
            out = self.update(adapter, x, out)
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active adapters into the weight, computed in fp32 and then cast. The old weight is kept."""
        if not self.merged:
            running, weight = self.running(), self.base.weight
            self._original = weight.detach().clone()
            for adapter in running:
                delta = self.as_weight(adapter.delta()).view(weight.shape)
                weight.copy_((weight.to(delta.dtype) + delta).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the layer its old weight back, bit for bit."""
        if self._original is not None:
            self.base.weight.copy_(self._original)
            self._original = None


class AdaptedLinear(Adapted):
    """`nn.Linear` with adapters; one adapter on a GPU runs in one fused kernel."""

    @staticmethod
    def size(base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[0], base.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        running = self.running()
        if len(running) == 1 and not (running[0].dropout.p and running[0].training):
            adapter = running[0]
            able, why = _fusable(x, self.base.weight, adapter.rank)
            if choose(self.backend, x.device, able, why) == "triton":
                from zq_lib.adalora.kernels import fused_linear

                return fused_linear(
                    x, self.base.weight, self.base.bias, adapter.left, adapter.values, adapter.right, adapter.scale
                )
        return super().forward(x)

    def update(self, adapter: Triplets, x: Tensor, out: Tensor) -> Tensor:
        record(Launch("adalora.linear", "torch"))
        inner = F.linear(adapter.dropout(x), adapter.right.to(x.dtype))  # [..., R]
        inner = (inner.to(adapter.values.dtype) * (adapter.scale * adapter.values)).to(out.dtype)
        rows = inner.reshape(-1, adapter.rank)
        # P^T laid out by rows: with few columns both products of the backward pass are two to five times faster so.
        flat = torch.addmm(out.reshape(-1, out.shape[-1]), rows, adapter.left.to(out.dtype).T.contiguous())
        return flat.view(out.shape)


class AdaptedConv1D(AdaptedLinear):
    """transformers' `Conv1D`, a linear layer whose weight is [K, N]."""

    forward = Adapted.forward

    @staticmethod
    def size(base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def as_weight(self, delta: Tensor) -> Tensor:
        return delta.T


class AdaptedEmbedding(Adapted):
    """`nn.Embedding`: a linear layer on one-hot rows, so P is [width, R] and Q [R, vocabulary]. No dropout."""

    @staticmethod
    def size(base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def update(self, adapter: Triplets, x: Tensor, out: Tensor) -> Tensor:
        inner = F.embedding(x, adapter.right.T, self.base.padding_idx) * (adapter.scale * adapter.values)  # [..., R]
        return out + F.linear(inner, adapter.left).to(out.dtype)

    def as_weight(self, delta: Tensor) -> Tensor:
        return delta.T


class AdaptedConv2d(Adapted):
    """`nn.Conv2d` without groups: R filters of the layer's size, then a 1 x 1 convolution to its outputs."""

    @staticmethod
    def size(base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[0], base.weight[0].numel()

    def update(self, adapter: Triplets, x: Tensor, out: Tensor) -> Tensor:
        filters = adapter.right.view(-1, *self.base.weight.shape[1:])  # [R, C, height, width]
        inner = self.base._conv_forward(adapter.dropout(x), filters.to(x.dtype), None)  # [B, R, H, W]
        inner = inner * (adapter.scale * adapter.values).to(x.dtype)[:, None, None]
        return out + F.conv2d(inner, adapter.left[:, :, None, None].to(x.dtype))


# By name, because Conv1D is transformers' and importing that takes seconds that a plain torch program need not spend.
KINDS: dict[str, type[Adapted]] = {
    "torch.nn.modules.linear.Linear": AdaptedLinear,
    "transformers.pytorch_utils.Conv1D": AdaptedConv1D,
    "torch.nn.modules.sparse.Embedding": AdaptedEmbedding,
    "torch.nn.modules.conv.Conv2d": AdaptedConv2d,
}


def kind_of(layer: nn.Module) -> type[Adapted] | None:
    """The wrapper for a layer, or None. Exact types only: a subclass may compute something else."""
    return KINDS.get(f"{type(layer).__module__}.{type(layer).__name__}")


def why_not(module: nn.Module) -> str:
    """Why a layer cannot be adapted; empty if it can."""
    if kind_of(module) is None:
        names = ", ".join(kind.rpartition(".")[2] for kind in KINDS)
        return f"is a {type(module).__name__}, and only {names} can be adapted"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"is a Conv2d with {module.groups} groups, and only groups=1 can be adapted"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is an Embedding with max_norm, which changes its weight while it runs"
    return ""


def _fusable(x: Tensor, weight: Tensor, rank: int) -> tuple[bool, str]:
    if rank > 128:
        return False, f"the adapter has rank {rank} and the kernel takes at most 128"
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"input and weight are {x.dtype} and {weight.dtype}, not both float32, float16 or bfloat16"
    if torch.is_autocast_enabled(x.device.type):
        return False, "autocast is on"
    return True, ""

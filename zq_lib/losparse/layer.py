"""A linear layer as U V + S: dense S while rows are being chosen, then S with the rows that are left."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zq_lib.core.surgery import reshape_parameter
from zq_lib.losparse.factors import factorise
from zq_lib.losparse.linear import low_rank_sparse_linear

# By name, because Conv1D is transformers' and importing that takes seconds that a plain torch program need not spend.
KINDS = {"torch.nn.modules.linear.Linear": "Linear", "transformers.pytorch_utils.Conv1D": "Conv1D"}


class LowRankSparse(nn.Module):
    """y = (x V^T) U^T + x S^T + b for any input [..., K] (equation 3), in the type and on the device of the layer it
    replaces.

    | here     | paper | shape                                                                                |
    | -------- | ----- | ------------------------------------------------------------------------------------ |
    | `left`   | U     | [N, r]                                                                               |
    | `right`  | V     | [r, K]                                                                               |
    | `sparse` | S     | [N, K] in training, where a masked row is zeros; [n, K] once shrunk                  |
    | `rows`   | –     | None in training; [n] int64 once shrunk: the outputs to which the rows of S belong   |
    | `bias`   | b     | [N] or None, the very parameter of the replaced layer                                |

    `kind` is the replaced layer's class, "Linear" or "Conv1D". Loading a state with other rows reshapes the layer.

    >>> layer = LowRankSparse.from_dense(nn.Linear(6, 4), rank=2)
    >>> layer.shrink(torch.tensor([0, 3]))
    >>> layer(torch.zeros(2, 5, 6)).shape, layer.sparse.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 6]))
    """

    def __init__(self, left: Tensor, right: Tensor, sparse: Tensor, bias: nn.Parameter | None, kind: str) -> None:
        super().__init__()
        self.left, self.right, self.sparse = nn.Parameter(left), nn.Parameter(right), nn.Parameter(sparse)
        self.register_parameter("bias", bias)
        self.register_buffer("rows", None)
        self.kind, self.backend = kind, "auto"

    @classmethod
    @torch.no_grad()
    def from_dense(cls, module: nn.Module, rank: int, factors: tuple[Tensor, Tensor] | None = None) -> Self:
        """The same function as `module`, a Linear or a Conv1D: `factors` (U [N, r], V [r, K]), or those of the SVD.

        Any factors will do, for S is what they leave (equations 4 and 5). Raises ValueError for another kind of layer,
        a rank that the matrix does not have, or factors of another shape.
        """
        if reason := why_not(module):
            raise ValueError(f"module {reason}")
        kind = KINDS[_name(module)]
        weight = module.weight.detach().T if kind == "Conv1D" else module.weight.detach()  # [N, K]
        outputs, inputs = weight.shape
        exact = weight.double() if weight.dtype == torch.float64 else weight.float()
        if factors is None:
            if not 0 <= rank <= min(outputs, inputs):
                raise ValueError(f"rank={rank} must lie between 0 and {min(outputs, inputs)} for {outputs} x {inputs}")
            factors = factorise(exact, rank)
        left, right = (f.detach().to(weight) for f in factors)
        if left.shape != (outputs, rank) or right.shape != (rank, inputs):
            raise ValueError(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} do not fit a weight of {outputs} x "
                f"{inputs} at rank {rank}; give [{outputs}, {rank}] and [{rank}, {inputs}]"
            )
        sparse = (exact - left.to(exact) @ right.to(exact)).to(weight)
        layer = cls(left.contiguous(), right.contiguous(), sparse.contiguous(), module.bias, kind)
        for part in (layer.left, layer.right, layer.sparse):
            part.requires_grad_(module.weight.requires_grad)
        return layer.train(module.training)

    # --- what it is --------------------------------------------------------------------------------------------------
    @property
    def out_features(self) -> int:
        """N, the outputs."""
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        """K, the inputs."""
        return self.right.shape[1]

    @property
    def rank(self) -> int:
        """r, the columns of U."""
        return self.left.shape[1]

    @property
    def shrunk(self) -> bool:
        """Whether only the kept rows of S are stored."""
        return self.rows is not None

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the replaced layer's layout: [N, K], for a Conv1D [K, N]. Computed at every call."""
        full = self.left @ self.right + self.dense_sparse()
        return full.T if self.kind == "Conv1D" else full

    def dense_sparse(self) -> Tensor:
        """S as [N, K], with zeros where rows were cut."""
        if not self.shrunk:
            return self.sparse
        return self.sparse.new_zeros(self.out_features, self.in_features).index_copy(0, self.rows, self.sparse)

    def parameter_count(self) -> int:
        """r (N + K) + n K, and the bias."""
        return sum(p.numel() for p in self.parameters())

    def dense_parameter_count(self) -> int:
        """Parameters of the layer that it replaces."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.bias.numel())

    def flops(self, tokens: int = 1) -> int:
        """Multiply-adds for `tokens` input vectors: r (N + K) + n K each."""
        return tokens * (self.rank * (self.out_features + self.in_features) + self.sparse.numel())

    @property
    def break_even(self) -> int:
        """The most rows with which the layer is cheaper than a dense one: r (N + K) + n K < N K."""
        spare = self.out_features * self.in_features - self.rank * (self.out_features + self.in_features)
        return max(0, -(-spare // self.in_features) - 1)

    @property
    def pays(self) -> bool:
        """Whether it takes fewer multiply-adds than a dense layer."""
        return self.flops() < self.out_features * self.in_features

    def extra_repr(self) -> str:
        rows = len(self.rows) if self.shrunk else self.out_features
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, rows={rows}, kind={self.kind}"

    # --- what it does ------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        if self.shrunk:
            return low_rank_sparse_linear(
                x, left=self.left, right=self.right, sparse=self.sparse, rows=self.rows, bias=self.bias,
                backend=self.backend,
            )  # fmt: skip
        return F.linear(x, self.sparse, self.bias) + F.linear(F.linear(x, self.right), self.left)

    @torch.no_grad()
    def shrink(self, rows: Tensor) -> None:
        """Keep only `rows` of S: sorted indices [n], int64. Raises ValueError for indices that are not, and when the
        layer has shrunk already."""
        if self.shrunk:
            raise ValueError("the layer has shrunk already, and rows that were cut do not come back")
        rows = rows.to(self.sparse.device)
        if rows.dtype != torch.int64 or rows.dim() != 1 or not _ascending(rows, self.out_features):
            raise ValueError(
                f"rows must be ascending int64 indices below {self.out_features}, got {rows.dtype} of shape "
                f"{tuple(rows.shape)}; use mask.nonzero()[:, 0]"
            )
        reshape_parameter(self.sparse, self.sparse.data.index_select(0, rows))
        self.rows = rows

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A new layer of the replaced class with the whole matrix, and with this layer's bias parameter."""
        whole = self.left.to(_wide(self.left)) @ self.right.to(_wide(self.right))
        weight = (whole + self.dense_sparse().to(whole)).to(self.left.dtype)
        outputs, inputs, flag = *weight.shape, self.sparse.requires_grad
        if self.kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(1, 1)
            layer.nf, layer.nx, weight = outputs, inputs, weight.T.contiguous()
        else:
            layer = nn.Linear(1, 1, bias=False, device="meta")
            layer.in_features, layer.out_features = inputs, outputs
        layer.weight = nn.Parameter(weight, requires_grad=flag)
        layer.bias = self.bias
        return layer.train(self.training)

    @torch.no_grad()
    def resize(self, rank: int, rows: int | None) -> None:
        """Make room for another rank and number of rows, with undefined content; None is the state of training."""
        count = self.out_features if rows is None else rows
        for p, shape in (
            (self.left, (self.out_features, rank)),
            (self.right, (rank, self.in_features)),
            (self.sparse, (count, self.in_features)),
        ):
            if p.shape != shape:
                reshape_parameter(p, p.data.new_empty(shape))
        self.rows = None if rows is None else torch.arange(rows, device=self.sparse.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        right, rows = state_dict.get(prefix + "right"), state_dict.get(prefix + "rows")
        if right is not None:
            self.resize(len(right), None if rows is None else len(rows))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def size_of(module: nn.Module) -> tuple[int, int]:
    """Outputs N and inputs K of a Linear or Conv1D."""
    outputs, inputs = module.weight.shape
    return (inputs, outputs) if KINDS.get(_name(module)) == "Conv1D" else (outputs, inputs)


def why_not(module: nn.Module) -> str:
    """Why a layer cannot be compressed; empty if it can. Exact types only: a subclass may compute something else."""
    weight = getattr(module, "weight", None)
    if quantised(module):
        return f"is a quantised {type(module).__name__}; compress the model before it is quantised"
    if _name(module) not in KINDS:
        return f"is a {type(module).__name__}, and only {' and '.join(KINDS.values())} can be compressed"
    if weight is None or weight.is_meta or weight.layout != torch.strided:
        return "has no dense weight in memory; load the weights first"
    return ""


def quantised(module: nn.Module) -> bool:
    """Whether a layer holds its weight as codes: integers, a subclass of Tensor, or torch's quantised modules."""
    weight = getattr(module, "weight", None)
    if "quantized" in type(module).__module__ or "bitsandbytes" in type(module).__module__:
        return True
    if not isinstance(module, nn.Linear) and _name(module) not in KINDS:
        return False
    if not isinstance(weight, Tensor):
        return True
    plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
    return not plain or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _ascending(rows: Tensor, below: int) -> bool:
    if not len(rows):
        return True
    return bool((rows[1:] > rows[:-1]).all()) and int(rows[0]) >= 0 and int(rows[-1]) < below

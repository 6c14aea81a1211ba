"""AdaShift's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from zq_lib.adashift.spatial import BLOCKS, NONE, PHIS, Phi

RING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FRAGILE_EPS = 1e-7  # below it phi = none diverges on ordinary networks (section 7.3)


class PaperExperiment(NamedTuple):
    """The published settings of max-AdaShift in one experiment."""

    lr: float
    beta1: float
    n: int
    eps: float


PAPER_EXPERIMENTS: dict[str, PaperExperiment] = {
    "counter-example": PaperExperiment(1e-3, 0.9, 10, 1e-10),
    "logistic regression": PaperExperiment(1e-2, 0.9, 10, 1e-10),
    "MLP": PaperExperiment(1e-2, 0.0, 10, 1e-8),
    "ResNet": PaperExperiment(1e-2, 0.9, 10, 1e-10),
    "DenseNet, Tiny-ImageNet": PaperExperiment(1e-2, 0.9, 30, 1e-10),
    "WGAN critic": PaperExperiment(2e-4, 0.0, 1, 1e-10),
    "translation": PaperExperiment(1e-2, 0.0, 40, 1e-10),
}


@dataclass(frozen=True)
class AdaShiftConfig:
    """Everything that a parameter group of `AdaShift` can set, under the same names.

    lr            learning rate; None takes 1e-2 for phi = "max", whose divisor is the largest, and 1e-3 otherwise. A
                  tensor of one element is allowed.
    betas         beta1 weighs the window (0: newest gradient alone, 1: plain mean, which Adam does not allow), beta2
                  is the decay of v.
    n             shift, and length of the window. Nothing moves during the first n steps.
    phi           "max", "mean", "l2" (sum of squares) or "none" (v elementwise); or a function that makes one number of
                  a tensor of squares.
    eps           added to the root; None takes 1e-10, and 1e-5 for "none".
    weight_decay  none is applied while nothing moves.
    decoupled     weight decay as in AdamW; False adds it to the gradient.
    block         what has one v: "tensor", or each "row" of it (an output, an embedding).
    ring_dtype    what the n kept gradients are stored in; None is the precision of the moments (fp32, fp64 for fp64).
    max_step      bound of |m| / (sqrt(vhat) + eps), not in the paper; None is no bound.
    maximize      goes up instead of down.
    foreach       False works on whole tensors instead of chunks that stay in the processor's cache.
    fused         True asks for the Triton kernels, False refuses them, None takes them on a GPU.
    capturable    the step may be captured in a CUDA graph; needs the kernels.
    """

    lr: float | Tensor | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    n: int = 10
    phi: str | Phi = "max"
    eps: float | None = None
    weight_decay: float = 0.0
    decoupled: bool = True
    block: str = "tensor"
    ring_dtype: torch.dtype | None = None
    max_step: float | None = None
    maximize: bool = False
    foreach: bool | None = None
    fused: bool | None = None
    capturable: bool = False

    def __post_init__(self) -> None:
        if not callable(self.phi) and self.phi not in PHIS:
            raise ValueError(
                f"phi={self.phi!r} is not known; choose one of {', '.join(PHIS)}, or give a function that makes one "
                "number of a tensor of squares"
            )
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-2 if self.phi == "max" else 1e-3)
        if self.eps is None:
            object.__setattr__(self, "eps", 1e-5 if self.phi == NONE else 1e-10)
        self._check_numbers()
        if self.block not in BLOCKS:
            raise ValueError(f"block={self.block!r} is not known; choose one of {', '.join(BLOCKS)}")
        if self.block == "row" and (self.phi == NONE or callable(self.phi)):
            raise ValueError(f"block='row' needs a phi of {', '.join(PHIS[:-1])}, not {self.phi!r}; use block='tensor'")
        if self.ring_dtype not in (None, *RING_DTYPES):
            raise ValueError(f"ring_dtype={self.ring_dtype!r} cannot hold gradients; use None or torch.bfloat16")
        if self.foreach and self.fused:
            raise ValueError("foreach=True and fused=True exclude each other; set one of them")
        if self.capturable and self.fused is False:
            raise ValueError("capturable=True needs the kernels that fused=False refuses; leave fused=None")

    def _check_numbers(self) -> None:
        lr = self.lr
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; give one number")
        if not _number(float(lr) if isinstance(lr, Tensor) else lr) or lr < 0:
            raise ValueError(f"lr={lr!r} must be a finite number of at least 0, for example 1e-3")
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2 or not all(map(_number, self.betas)):
            raise ValueError(f"betas={self.betas!r} must be two numbers, for example (0.9, 0.999)")
        beta1, beta2 = self.betas
        if not 0 <= beta1 <= 1:
            raise ValueError(f"betas[0]={beta1!r} must lie in [0, 1]; 1 is the plain mean of the window")
        if not 0 <= beta2 < 1:
            raise ValueError(f"betas[1]={beta2!r} must lie in [0, 1), for example 0.999")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n={self.n!r} must be a whole number of at least 1; without a shift this would be Adam")
        for name in ("eps", "weight_decay"):
            if not _number(value := getattr(self, name)) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
        if self.max_step is not None and (not _number(self.max_step) or self.max_step <= 0):
            raise ValueError(f"max_step={self.max_step!r} must be a positive number, or None for no bound")

    @property
    def fragile(self) -> bool:
        """Whether v is elementwise and eps too small to bound the steps of entries that are almost always zero."""
        return self.phi == NONE and self.eps < FRAGILE_EPS

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """The lab's setting: the mean, which shares Adam's learning rate."""
        return cls(**{"lr": 3e-3, "phi": "mean", **changes})

    @classmethod
    def paper(cls, experiment: str = "ResNet") -> Self:
        """max-AdaShift as published for an experiment of `PAPER_EXPERIMENTS`."""
        if experiment not in PAPER_EXPERIMENTS:
            raise ValueError(f"experiment={experiment!r} is not known; choose one of {', '.join(PAPER_EXPERIMENTS)}")
        row = PAPER_EXPERIMENTS[experiment]
        return cls(lr=row.lr, betas=(row.beta1, 0.999), n=row.n, eps=row.eps)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

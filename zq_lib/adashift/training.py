"""Real training at the size of a minute: handwritten digits, an MLP, and the optimisers side by side (section 7.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from zq_lib.adashift.optimizer import AdaShift
from zq_lib.core import data
from zq_lib.core.lab import Row
from zq_lib.core.seeding import seed_everything

BATCH, WIDTH, CLASSES, TEST = 64, 256, 10, 500


@dataclass(frozen=True)
class Contender:
    """An optimiser with its best learning rate of a grid of three, and how it is made."""

    name: str
    lr: float
    make: Callable[..., Optimizer]

    def __call__(self, params: Iterable[nn.Parameter], lr: float | None = None) -> Optimizer:
        """The optimiser of these parameters, at another rate if one is given."""
        return self.make(params, lr=self.lr if lr is None else lr)


def _shifted(**settings: Any) -> Callable[..., Optimizer]:
    return lambda params, lr: AdaShift(params, lr=lr, **settings)


CONTENDERS = (
    Contender("Adam", 3e-3, Adam),
    Contender("AMSGrad", 3e-3, lambda params, lr: Adam(params, lr=lr, amsgrad=True)),
    Contender("AdamW", 3e-3, AdamW),
    Contender("AdaShift mean", 3e-3, _shifted(phi="mean")),
    Contender("AdaShift max", 3e-2, _shifted(phi="max")),
    Contender("AdaShift none", 1e-3, _shifted(phi="none")),
    Contender("AdaShift max, n 1, beta1 0", 1e-2, _shifted(phi="max", n=1, betas=(0.0, 0.999))),
    Contender("SGD", 0.3, SGD),
)


@dataclass(frozen=True)
class Digits:
    """Images [N, 64] from 0 to 1 and classes [N], to learn from and to judge on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's 1,797 digits of 8 x 8, shuffled: 1,297 to learn from, 500 to judge on.

    Raises ModuleNotFoundError without scikit-learn.
    """
    pictures, classes = data.digits()
    order = np.random.default_rng(seed).permutation(len(classes))
    images = torch.tensor(pictures[order], dtype=torch.float32).flatten(1)
    labels = torch.tensor(classes[order])
    return Digits(images[:-TEST], labels[:-TEST], images[-TEST:], labels[-TEST:])


def mlp(linear: bool = False) -> nn.Module:
    """64-256-256-10 with ReLU, or, as in the paper, with no activation."""
    between = nn.Identity if linear else nn.ReLU
    return nn.Sequential(nn.Linear(64, WIDTH), between(), nn.Linear(WIDTH, WIDTH), between(), nn.Linear(WIDTH, CLASSES))


def train(
    digits: Digits, make: Callable[[Iterable[nn.Parameter]], Optimizer], seed: int, epochs: int, linear: bool = False
) -> tuple[Row, list[float]]:
    """Train an MLP from `seed`: its loss on the training images, its accuracy on the others, and each batch's loss.

    A run that leaves the finite numbers stops there, with accuracy 0.
    """
    seed_everything(seed)
    model = mlp(linear)
    optimizer, losses = make(model.parameters()), []
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.labels)).split(BATCH):
            loss = F.cross_entropy(model(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return {"loss": math.nan, "accuracy": 0.0}, losses
    with torch.no_grad():
        loss = float(F.cross_entropy(model(digits.images), digits.labels))
        accuracy = float((model(digits.test_images).argmax(-1) == digits.test_labels).float().mean())
    return {"loss": loss, "accuracy": accuracy if math.isfinite(loss) else 0.0}, losses

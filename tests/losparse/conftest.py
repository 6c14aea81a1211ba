"""A toy network with layers of different shapes, batches for it, and a loop that trains it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Tokens through an embedding and three blocks of linear layers of different shapes to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 28), "down": nn.Linear(28, 12, bias=False)}) for _ in range(3)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x.mean(1))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [
        (torch.randint(20, (16, 5), generator=source), torch.randint(4, (16,), generator=source)) for _ in range(60)
    ]


@pytest.fixture
def train() -> Callable[..., None]:
    """`train(model, optimizer, batches)`: the plain loop, without a word about rows."""

    def loop(model, optimizer, batches, clip: float | None = None) -> None:
        for ids, labels in batches:
            loss = nn.functional.cross_entropy(model(ids), labels)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(list(model.parameters()), clip)
            optimizer.step()
            optimizer.zero_grad()

    return loop

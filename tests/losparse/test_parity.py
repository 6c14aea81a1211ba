"""The row-wise pruner against the published rule, entry by entry: masks and parameters bit for bit over 400 steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zq_lib.losparse import attach

T, TI, TF, EVERY, TARGET, BETA = 400, 40, 120, 5, 0.25, 0.85
SHAPES = {"fc1": (10, 33), "fc2": (33, 17), "fc3": (17, 40), "fc4": (40, 3)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SHAPES.items():
            setattr(self, name, nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.fc4(torch.tanh(self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))


class PublishedPruner:
    """The rule as published: full-size statistics, a score for every entry, the k-th smallest of all of them."""

    def __init__(self, model: nn.Module, form: str) -> None:
        self.sparse = {name: getattr(model, name).sparse for name in SHAPES}
        self.form = form
        self.average = {n: torch.zeros_like(p.data) for n, p in self.sparse.items()}
        self.window = {n: torch.zeros_like(p.data) for n, p in self.sparse.items()}
        self.masks: list[list[bool]] = []

    def step(self, t: int) -> None:
        for name, p in self.sparse.items():
            now = (p.data * p.grad).abs()
            if self.form == "ema":
                self.average[name] = BETA * self.average[name] + (1 - BETA) * now
            elif t % EVERY == 0:
                self.average[name] = BETA * self.average[name] + (1 - BETA) * self.window[name]
                self.window[name] = now
            else:
                place = t % EVERY
                self.window[name] = (place * self.window[name] + now) / (place + 1)
        if t <= TI or (t <= T - TF and t % EVERY):
            return
        if t <= T - TF:
            share = TARGET + (1 - TARGET) * (1 - (t - TI) / (T - TF - TI)) ** 3
        else:
            share = TARGET
        rows = {n: a.mean(1, keepdim=True) for n, a in self.average.items()}
        entries = torch.cat([r.expand_as(self.average[n]).flatten() for n, r in rows.items()])
        threshold = entries.kthvalue(int(len(entries) * (1 - share))).values
        for name, p in self.sparse.items():
            p.data.masked_fill_(rows[name] < threshold, 0.0)
        self.masks.append([bool(x) for r in rows.values() for x in (r >= threshold)[:, 0]])


def _data(seed: int):
    source = torch.Generator().manual_seed(seed)
    for _ in range(T):
        x = torch.randn(16, 10, generator=source)
        yield x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3]], 1)


@pytest.mark.parametrize("form", ["window", "ema"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_and_parameters_equal_the_published_rules_bit_for_bit_over_400_steps(seed: int, form: str) -> None:
    torch.manual_seed(seed)
    ours = Net()
    handle = attach(
        ours, low_rank=0.1, remaining=TARGET, targets=tuple(SHAPES), total_steps=T, warmup=TI, final=TF,
        interval=EVERY, beta=BETA, form=form, shrink=False,
    )  # fmt: skip
    theirs = copy.deepcopy(ours)
    pruner = PublishedPruner(theirs, form)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=5e-3) for m in (ours, theirs)]
    masks = 0
    for t, (x, y) in enumerate(_data(seed)):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            if model is theirs:
                pruner.step(t)
            optimizer.zero_grad()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), (t, name)
        if len(pruner.masks) > masks:
            masks += 1
            assert handle.keep.tolist() == pruner.masks[-1], t
    assert masks == len(handle.trace) == (T - TF - TI) // EVERY + TF - 1
    kept = handle.report().layers
    assert len({layer.density for layer in kept}) > 1, "one threshold gives uneven densities"
    total = sum(layer.outputs * layer.inputs for layer in kept)
    excess = sum(layer.rows * layer.inputs for layer in kept) - TARGET * total
    assert 0 <= excess <= 40, "the row at the threshold stays"
    handle.merge()

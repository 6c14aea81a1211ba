"""Our allocator against PEFT's on the same gradients: bit for bit over 500 steps and three seeds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zq_lib.adalora import AdaLoraConfig, attach
from zq_lib.adalora.adapter import Triplets

peft = pytest.importorskip("peft")
T, TI, TF, EVERY, R, TARGET = 500, 60, 150, 7, 6, 3
SHAPES = {"fc1": (10, 33), "fc2": (33, 17), "fc3": (17, 40), "fc4": (40, 3)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SHAPES.items():
            setattr(self, name, nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.fc4(torch.tanh(self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))


def _peft(model: nn.Module):
    config = peft.AdaLoraConfig(
        init_r=R, target_r=TARGET, total_step=T, tinit=TI, tfinal=TF, deltaT=EVERY, lora_alpha=16, lora_dropout=0.0,
        target_modules=list(SHAPES), beta1=0.85, beta2=0.85,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _penalty(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    eye = torch.eye(R)
    return sum(torch.norm(p.T @ p - eye) + torch.norm(q @ q.T - eye) for p, q in pairs) / (2 * len(pairs))


def _data(seed: int):
    source = torch.Generator().manual_seed(seed)
    for _ in range(T):
        x = torch.randn(16, 10, generator=source)
        yield x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3]], 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_ranks_and_parameters_equal_pefts_bit_for_bit_over_500_steps(seed: int) -> None:
    """The forward is PEFT's in both, so only the allocators can differ."""
    torch.manual_seed(seed)
    theirs = _peft(Net())
    ours = copy.deepcopy(theirs)
    for p in theirs.base_model.model.modules():
        if isinstance(p, peft.tuners.adalora.layer.SVDLinear):
            assert p.lora_A["default"].shape[0] == R
    config = AdaLoraConfig(
        init_rank=R, target_rank=TARGET, total_steps=T, warmup=TI, final=TF, interval=EVERY, alpha=16,
        ties="threshold", shrink=False, orthogonality=0.0,
    )  # fmt: skip
    host = Net()
    handle = attach(host, config, targets=tuple(SHAPES))
    handle.detach()  # no hooks: the allocator alone, moved by hand
    layers = [getattr(ours.base_model.model, name) for name in SHAPES]
    for layer, adapter in zip(layers, handle.adapters, strict=True):
        _share(layer, adapter)
    modules = {
        id(m): [getattr(m.base_model.model, n) for n in SHAPES] for m in (theirs, ours)
    }  # to compute the same penalty
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3) for m in (theirs, ours)]
    masks = 0
    for t, (x, y) in enumerate(_data(seed)):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            pairs = [(m.lora_B["default"], m.lora_A["default"]) for m in modules[id(model)]]
            loss = (model(x) - y).square().mean() + 0.1 * _penalty(pairs)
            loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(t)
        for layer, adapter in zip(layers, handle.adapters, strict=True):
            adapter.values.grad = layer.lora_E["default"].grad.view(-1)
        handle.after_step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for a, b in zip(modules[id(theirs)], modules[id(ours)], strict=True):
            for part in ("lora_A", "lora_B", "lora_E"):
                assert torch.equal(getattr(a, part)["default"], getattr(b, part)["default"]), (t, part)
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            masks += 1
            assert handle.keep.tolist() == [pattern[f"{name}.lora_E.default"] for name in SHAPES], t
    assert masks > 400 and len(handle.trace) >= 40
    assert int(handle.keep.sum()) == TARGET * len(SHAPES) and len(set(handle.ranks().values())) > 1


def _share(layer: nn.Module, adapter: Triplets) -> None:
    """Let an adapter of ours be the very parameters of a PEFT layer."""
    with torch.no_grad():
        adapter.left.copy_(layer.lora_B["default"])
        adapter.values.copy_(layer.lora_E["default"].view(-1))
        adapter.right.copy_(layer.lora_A["default"])
    layer.lora_B["default"], layer.lora_A["default"] = adapter.left, adapter.right
    layer.lora_E["default"].data = adapter.values.data.view(-1, 1)


def test_the_whole_training_follows_pefts_closely_with_our_own_forward_and_hooks() -> None:
    """Sums run in another order, so the parameters drift apart in the last digits; the final ranks are the same."""
    torch.manual_seed(0)
    base = Net()
    theirs, ours = _peft(copy.deepcopy(base)), copy.deepcopy(base)
    config = AdaLoraConfig(
        init_rank=R, target_rank=TARGET, total_steps=T, warmup=TI, final=TF, interval=EVERY, alpha=16,
        orthogonality=0.1,
    )  # fmt: skip
    handle = attach(ours, config, targets=tuple(SHAPES))
    layers = [getattr(theirs.base_model.model, n) for n in SHAPES]
    with torch.no_grad():
        for layer, adapter in zip(layers, handle.adapters, strict=True):
            adapter.left.copy_(layer.lora_B["default"])
            adapter.right.copy_(layer.lora_A["default"])
    first = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-3)
    second = torch.optim.AdamW(handle.parameters(), lr=5e-3)
    for t, (x, y) in enumerate(_data(0)):
        pairs = [(m.lora_B["default"], m.lora_A["default"]) for m in layers]
        ((theirs(x) - y).square().mean() + 0.1 * _penalty(pairs)).backward()
        first.step()
        theirs.base_model.update_and_allocate(t)
        first.zero_grad()
        (ours(x) - y).square().mean().backward()
        second.step()
        second.zero_grad()
    pattern = theirs.peft_config["default"].rank_pattern
    assert [sum(v) for v in pattern.values()] == list(handle.ranks().values())
    with torch.no_grad():
        assert (theirs(x) - ours(x)).abs().max() < 5e-2
    handle.detach()

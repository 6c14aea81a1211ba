"""What every optimiser of torch can do: closures, schedulers, mixed precision, compilation, several processes."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import nn

from zq_lib.adashift import AdaShift
from zq_lib.core import backend


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(start, one) -> None:
    param, optimizer = one(start, n=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses[0] == losses[1] and losses[-1] < losses[1]


def test_schedulers_and_a_rate_in_a_tensor_set_the_size_of_the_steps(start, gradient, run, one) -> None:
    param, optimizer = one(start, lr=0.1, n=1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)
    run(optimizer, [param], gradient, 2)
    moved = param.detach().clone()
    schedule.step()
    run(optimizer, [param], gradient, 2, first=3)
    assert torch.equal(param, moved) and not torch.equal(moved, start)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)  # sets betas[0] as well
    assert optimizer.param_groups[0]["betas"][0] == 0.95
    tensor, other = one(start, lr=torch.tensor(0.1), n=1)
    run(other, [tensor], gradient, 2)
    assert torch.allclose(tensor, moved, rtol=0, atol=1e-8)


def test_mixed_precision_scales_gradients_back_and_skips_a_step_that_overflows(start, one) -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    ends, scaler = [], torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for scaled in (False, True):
        param, optimizer = one(start.float(), n=2)
        for t in range(8):
            loss = (inputs @ param).square().mean()
            if not scaled:
                loss.backward()
                optimizer.step()
            else:
                if t == 4:  # a step that must leave no trace
                    before = {key: value.clone() for key, value in optimizer.state[param].items()}
                    scaler.scale(loss * float("inf")).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    assert all(torch.equal(before[key], value) for key, value in optimizer.state[param].items())
                    optimizer.zero_grad()
                scaler.scale((inputs @ param).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        ends.append(param.detach())
    assert torch.allclose(*ends, atol=1e-6) and not torch.equal(ends[0], start.float())


def test_a_scaler_that_hands_its_scale_to_the_optimiser_is_understood_without_kernels(start, gradient, one) -> None:
    param, optimizer = one(start, n=1)
    twin, other = one(start, n=1)
    other.grad_scale, other.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for t in (1, 2, 3):
        param.grad, twin.grad = gradient(start, t), 8 * gradient(start, t)
        optimizer.step()
        other.step()
    assert torch.allclose(param, twin, rtol=0, atol=1e-15) and torch.equal(twin.grad, 8 * gradient(start, 3))
    other.found_inf = torch.tensor(1.0)
    before = twin.detach().clone()
    other.step()
    assert torch.equal(before, twin) and int(other.state[twin]["step"]) == 3


def test_a_compiled_training_step_takes_the_same_path(start, gradient, run, one) -> None:
    param, optimizer = one(start, n=2)
    run(optimizer, [param], gradient, 6)
    twin, other = one(start, n=2)
    step = torch.compile(lambda: other.step(), backend="eager")
    for t in range(1, 7):
        twin.grad = gradient(twin.detach(), t)
        step()
    assert torch.equal(param, twin)


def test_kernels_that_cannot_run_are_refused_where_they_were_asked_for(start, gradient, run, one, monkeypatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    param, optimizer = one(start.float(), fused=True)
    with pytest.raises(ValueError, match='backend is "triton" but the tensors are on "cpu"'):
        run(optimizer, [param], gradient, 1)
    param, optimizer = one(start.float(), capturable=True)
    with pytest.raises(ValueError, match="capturable=True needs the kernels, which do not run here"):
        run(optimizer, [param], gradient, 1)


SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from zq_lib.adashift import AdaShift

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = AdaShift(wrapped.parameters(), n=3)
data = torch.randn(20, 16, 4)
for x in data:
    mine = x[rank::2]
    wrapped(mine).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
torch.manual_seed(0)
alone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
other = AdaShift(alone.parameters(), n=3)
for x in data:
    alone(x).square().mean().backward()
    other.step()
    other.zero_grad()
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump([[p.detach().flatten().tolist() for p in m.parameters()] for m in (model, alone)], file)
dist.destroy_process_group()
"""


def test_two_processes_walk_together_and_as_one_process_with_both_halves(two_processes) -> None:
    (one, alone), (two, _) = two_processes(SCRIPT)
    assert one == two
    for mine, theirs in zip(one, alone, strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-5)


def test_parity_with_an_independent_implementation(start, gradient, run, one) -> None:
    other_package = pytest.importorskip("pytorch_optimizer")
    if tuple(map(int, version("pytorch_optimizer").split(".")[:2])) < (4, 1):
        pytest.skip("before 4.1 it read the wrong end of its queue")
    reduce = {"max": torch.max, "mean": torch.mean, "none": None}
    for phi, function in reduce.items():
        for n in (1, 5, 10):
            for beta1 in (0.0, 0.9):
                settings = {"lr": 1e-2, "betas": (beta1, 0.999), "eps": 1e-6}
                param, optimizer = one(start, n=n, phi=phi, **settings)
                twin = nn.Parameter(start.clone())
                other = other_package.AdaShift([twin], keep_num=n, reduce_func=function, **settings)
                run(optimizer, [param], gradient, 200)
                run(other, [twin], gradient, 200)
                assert float((param - twin).detach().abs().max()) <= 1e-12, (phi, n, beta1)
                assert not torch.equal(param, start)


def test_the_optimiser_takes_the_place_of_adam_in_a_training_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(256, 8)
    y = (x[:, 0] > x[:, 1]).long()
    optimizer = AdaShift(model.parameters(), phi="mean", lr=1e-2)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.15

"""The optimiser against the reference, and the settings of section 4 one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zq_lib.adashift import AdaShift, chunked
from zq_lib.adashift.reference import trajectory

SPATIAL = {
    "max": {"phi": "max"},
    "mean": {"phi": "mean"},
    "l2": {"phi": "l2"},
    "none": {"phi": "none", "eps": 1e-5},
    "row max": {"phi": "max", "block": "row"},
    "row mean": {"phi": "mean", "block": "row"},
    "row l2": {"phi": "l2", "block": "row"},
    "function": {"phi": lambda squares: squares.median()},
}
SHAPE = (5, 3)


LONG = {(10, 0.9), (3, 1.0)}  # `zq bench adashift parity` walks a thousand steps for all of them


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_the_walk_equals_the_references_for_every_spatial_function(
    n: int, beta1: float, start, gradient, monkeypatch, run
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 8)  # two rows and a bit: two chunks, the last one not full
    steps = 1000 if (n, beta1) in LONG else 100
    params = [nn.Parameter(start.clone()) for _ in SPATIAL]
    groups = [{"params": [p], **settings} for p, settings in zip(params, SPATIAL.values(), strict=True)]
    optimizer = AdaShift(groups, lr=1e-2, betas=(beta1, 0.99), n=n)
    run(optimizer, params, gradient, steps)
    for (name, settings), param in zip(SPATIAL.items(), params, strict=True):
        *_, expected = trajectory(start, gradient, steps, lr=1e-2, betas=(beta1, 0.99), n=n, **settings)
        assert (expected - start).abs().max() > 0.05, "nothing was compared"
        assert float((param.detach() - expected).abs().max()) <= 1e-12, name


@pytest.mark.parametrize("name", SPATIAL)
def test_single_precision_stays_within_two_millionths_after_300_steps(name: str, start, gradient, run, one) -> None:
    param, optimizer = one(start.float(), lr=1e-2, **SPATIAL[name])
    run(optimizer, [param], gradient, 300)
    *_, expected = trajectory(start.float().double(), gradient, 300, lr=1e-2, **SPATIAL[name])
    assert float((param.detach() - expected).norm() / expected.norm()) <= 2e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled": False},
        {"maximize": True, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1, "decoupled": False},
        {"max_step": 0.3},
        {"max_step": 0.3, "betas": (0.0, 0.9), "weight_decay": 0.1},
        {"betas": (0.9, 0.0)},
        {"foreach": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("spatial", ["max", "none", "row mean"])
def test_every_setting_equals_the_reference(settings: dict, spatial: str, start, gradient, run, one) -> None:
    settings = {"n": 3, "lr": 1e-2, **SPATIAL[spatial], **settings}
    param, optimizer = one(start, **settings)
    run(optimizer, [param], gradient, 60)
    settings.pop("foreach", None)
    *_, expected = trajectory(start, gradient, 60, **settings)
    assert float((param.detach() - expected).abs().max()) <= 1e-12


def test_nothing_moves_in_the_first_n_steps_weight_decay_included(start, gradient, run, one) -> None:
    param, optimizer = one(start, n=4, weight_decay=0.1)
    run(optimizer, [param], gradient, 4)
    assert torch.equal(param, start)
    run(optimizer, [param], gradient, 1, first=5)
    assert (param != start).all()


@pytest.mark.parametrize("name", ["max", "mean", "none", "row max"])
def test_what_has_never_had_a_gradient_does_not_move_and_stays_finite(name: str, start, gradient, run, one) -> None:
    quiet = torch.zeros(SHAPE, dtype=torch.bool)
    quiet[1 if name == "row max" else slice(None)] = True
    if name == "none":
        quiet[:, :2] = False
    mask = (~quiet).double()

    def late(theta: Tensor, t: int) -> Tensor:
        return gradient(theta, t) * (mask if t <= 20 else 1)

    param, optimizer = one(start, n=3, weight_decay=0.1, **SPATIAL[name])
    run(optimizer, [param], late, 23)  # step 23 still divides by the gradient of step 20
    assert torch.equal(param[quiet], start[quiet])
    run(optimizer, [param], late, 30, first=24)
    assert (param[quiet] != start[quiet]).all() and param.abs().max() < 100
    settings = {"n": 3, "weight_decay": 0.1, "lr": 1e-2 if "max" in name else 1e-3, **SPATIAL[name]}
    *_, expected = trajectory(start, late, 53, **settings)
    assert torch.allclose(param, expected, rtol=0, atol=1e-12)


def test_a_parameter_that_joins_late_walks_as_in_a_fresh_optimiser(start, gradient, run, one) -> None:
    early, late = nn.Parameter(start.float()), nn.Parameter(start.float())
    optimizer = AdaShift([early, late], n=3)
    run(optimizer, [early], gradient, 1000)
    run(optimizer, [early, late], gradient, 20, first=5)
    fresh, other = one(start.float(), n=3)
    run(other, [fresh], gradient, 20, first=5)
    assert torch.equal(late, fresh) and not torch.equal(late, start.float())


def test_a_group_added_in_the_middle_starts_at_its_own_first_step(start, gradient, run, one) -> None:
    param, optimizer = one(start, n=3)
    run(optimizer, [param], gradient, 7)
    added = nn.Parameter(start.clone())
    optimizer.add_param_group({"params": [added], "phi": "mean"})
    assert optimizer.param_groups[1]["lr"] == 1e-3, "the default rate is that of the group's own phi"
    run(optimizer, [param, added], gradient, 3, first=8)
    assert torch.equal(added, start)
    run(optimizer, [param, added], gradient, 1, first=11)
    assert not torch.equal(added, start)


def test_one_element_has_the_same_path_under_every_spatial_function(gradient, run, one) -> None:
    start = torch.ones(1, dtype=torch.float64)
    ends = []
    for phi in ("max", "mean", "l2", "none"):
        param, optimizer = one(start, lr=1e-2, phi=phi, n=2, eps=1e-6)
        run(optimizer, [param], lambda x, t: gradient(x, t)[0, :1], 40)
        ends.append(float(param.detach()))
    assert max(ends) - min(ends) < 1e-14 and ends[0] != 1


def test_the_rounding_walk_of_a_plain_mean_is_undone(one) -> None:
    param, optimizer = one(torch.zeros(16), betas=(1.0, 0.999), n=10)
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    param.grad = torch.empty(16)
    for t in range(10_000):  # `zq bench adashift parity` takes ten times as many
        param.grad.copy_(noise[t * t % 64])
        optimizer.step()
    state = optimizer.state[param]
    exact = state["ring"].double().mean(0)
    assert float((state["exp_avg"] - exact).abs().max()) <= 1e-5 * float(noise.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_ring_loses_exactly_what_it_gave(dtype: torch.dtype, start, gradient, run, one) -> None:
    param, optimizer = one(start.float(), ring_dtype=dtype, lr=1e-3)
    run(optimizer, [param], gradient, 500)
    state = optimizer.state[param]
    at = torch.arange(10)
    age = (499 - at) % 10  # of slot i after step 500
    shares = torch.tensor([0.9**i for i in range(10)], dtype=torch.float64)
    exact = (state["ring"].double() * (shares / shares.sum())[age][:, None, None]).sum(0)
    assert state["ring"].dtype == dtype
    assert float((state["exp_avg"] - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_their_moments_in_single(dtype: torch.dtype, start, gradient, run, one) -> None:
    param, optimizer = one(start.to(dtype), lr=1e-2)
    run(optimizer, [param], gradient, 40)
    state = optimizer.state[param]
    assert param.dtype == dtype and {state[k].dtype for k in ("v", "exp_avg", "ring", "phi_ring")} == {torch.float32}
    *_, expected = trajectory(start, gradient, 40, lr=1e-2)
    assert float((param.detach().double() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("phi", ["max", "mean", "none"])
def test_a_gradient_that_is_not_a_number_shows(phi: str, start, gradient, run, one) -> None:
    param, optimizer = one(start, phi=phi, n=2)
    run(optimizer, [param], gradient, 5)
    poisoned = gradient(param.detach(), 6)
    poisoned[0, 0] = math.nan
    run(optimizer, [param], lambda x, t: poisoned if t == 6 else gradient(x, t), 3, first=6)
    assert param[0, 0].isnan()
    assert param.isnan().all() if phi != "none" else not param[1:].isnan().any()


def test_parameters_in_another_memory_order_move_alike(gradient, run, one) -> None:
    images = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    ends = []
    for order in (torch.contiguous_format, torch.channels_last):
        param, optimizer = one(images.contiguous(memory_format=order), n=2)
        run(optimizer, [param], lambda x, t: x * (t % 3 - 0.7), 9)
        ends.append(param.detach())
    assert torch.allclose(*ends, atol=1e-7) and not torch.equal(ends[0], images)


def test_an_empty_parameter_and_one_without_gradient_are_left_alone(start) -> None:
    params = [nn.Parameter(torch.empty(0, 3)), nn.Parameter(start.clone())]
    optimizer = AdaShift(params)
    params[0].grad = torch.empty(0, 3)
    optimizer.step()
    assert not optimizer.state and torch.equal(params[1], start)


def test_beta1_zero_needs_a_few_numbers_per_tensor_and_a_ring_what_is_promised(run, one) -> None:
    sizes = {}
    for name, settings in {
        "none kept": {"betas": (0.0, 0.999)}, "fp32": {}, "bf16": {"ring_dtype": torch.bfloat16},
        "elementwise": {"phi": "none"},
    }.items():  # fmt: skip
        param, optimizer = one(torch.zeros(10_000), **settings)
        run(optimizer, [param], lambda x, t: torch.ones_like(x), 2)
        sizes[name] = sum(x.nbytes for x in optimizer.state[param].values())
        assert optimizer.report()[0].state_bytes == sizes[name]
    assert sizes["none kept"] <= 4 * (10 + 4)
    assert sizes["fp32"] <= 44.1 * 10_000 and sizes["bf16"] <= 24.1 * 10_000 and sizes["elementwise"] <= 50.1 * 10_000


def test_an_age_of_two_bytes_stops_at_its_largest_value(run, one) -> None:
    param, optimizer = one(torch.zeros(2), phi="none", n=1)
    run(optimizer, [param], lambda x, t: torch.ones_like(x), 3)
    state = optimizer.state[param]
    assert state["age"].dtype == torch.int16
    state["age"].fill_(32767)
    run(optimizer, [param], lambda x, t: torch.ones_like(x), 2)
    assert state["age"].tolist() == [32767, 32767] and param.isfinite().all()
    slow, other = one(torch.zeros(2), phi="none", betas=(0.9, 0.9999))
    run(other, [slow], lambda x, t: torch.ones_like(x), 1)
    assert other.state[slow]["age"].dtype == torch.int32


def test_the_report_says_which_share_has_never_moved(start, gradient, run, one) -> None:
    param, optimizer = one(start, phi="none", n=2, lr=0.5)
    mask = torch.ones(SHAPE, dtype=torch.float64)
    mask[0] = 0
    run(optimizer, [param], lambda x, t: gradient(x, t) * mask, 6)
    (row,) = optimizer.report()
    assert (row.which, row.steps) == ("parameter 0 of group 0", 6) and row.frozen == pytest.approx(0.2)
    assert row.largest_rate > 0.1

"""Checkpoints, and every way in which a state or a setting can be wrong."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from zq_lib.adashift import AdaShift, AdaShiftConfig
from zq_lib.adashift.config import PAPER_EXPERIMENTS

KINDS = {
    "window": {},
    "newest alone": {"betas": (0.0, 0.999)},
    "elementwise": {"phi": "none"},
    "rows": {"phi": "mean", "block": "row"},
    "bf16 ring": {"ring_dtype": torch.bfloat16},
    "plain mean": {"betas": (1.0, 0.99), "n": 3},
}


def saved(optimizer: AdaShift) -> dict:
    """A state dict that went through a file and torch's safe loader."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 4, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_after_the_safe_loader(kind: str, at: int, dtype, start, gradient, run, one) -> None:
    param, optimizer = one(start.to(dtype), **KINDS[kind])
    run(optimizer, [param], gradient, at)
    resumed, other = one(param.detach(), **KINDS[kind])
    other.load_state_dict(saved(optimizer))
    run(optimizer, [param], gradient, 40, first=at + 1)
    run(other, [resumed], gradient, 40, first=at + 1)
    assert torch.equal(param, resumed) and not torch.equal(param, start.to(dtype))
    mine, theirs = optimizer.state[param], other.state[resumed]
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype, key
        assert mine[key].nbytes == theirs[key].nbytes == theirs[key].untyped_storage().nbytes(), "memory has grown"


def test_a_model_in_half_precision_gets_its_moments_back_in_single(start, gradient, run, one) -> None:
    param, optimizer = one(start.float())
    run(optimizer, [param], gradient, 15)
    half, other = one(param.detach().bfloat16())
    other.load_state_dict(saved(optimizer))
    for key in ("exp_avg", "v", "phi_ring", "ring"):
        assert torch.equal(other.state[half][key], optimizer.state[param][key]), key


def test_a_loaded_state_shares_no_memory_with_where_it_came_from(start, gradient, run, one) -> None:
    param, optimizer = one(start)
    run(optimizer, [param], gradient, 12)
    twin, other = one(param.detach())
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state[param])
    run(other, [twin], gradient, 3, first=13)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[param].items())


def test_a_function_as_phi_is_saved_by_its_name(start, gradient, run, one) -> None:
    def median(squares: torch.Tensor) -> torch.Tensor:
        return squares.median()

    param, optimizer = one(start, phi=median, n=2)
    run(optimizer, [param], gradient, 5)
    twin, other = one(param.detach(), phi=median, n=2)
    other.load_state_dict(saved(optimizer))
    run(optimizer, [param], gradient, 5, first=6)
    run(other, [twin], gradient, 5, first=6)
    assert torch.equal(param, twin)
    with pytest.raises(ValueError, match="saved with phi='function median'"):
        one(start, n=2)[1].load_state_dict(saved(optimizer))


def test_a_copy_and_a_pickle_of_the_optimiser_work(start, gradient, run, one) -> None:
    param, optimizer = one(start, n=2)
    run(optimizer, [param], gradient, 5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = twin.param_groups[0]["params"][0]
        run(twin, [own], gradient, 2, first=6)
        assert not torch.equal(own, param) and own.isfinite().all()


@pytest.mark.parametrize("made", [{"n": 5}, {"phi": "mean"}, {"block": "row"}])
def test_a_state_made_with_another_shift_phi_or_block_is_refused(made: dict, start, gradient, run, one) -> None:
    param, optimizer = one(start)
    run(optimizer, [param], gradient, 3)
    (name,) = made
    with pytest.raises(ValueError, match=f"group 0 was saved with {name}=.*make it with the saved one"):
        one(start, **made)[1].load_state_dict(optimizer.state_dict())


def test_a_state_of_another_optimiser_is_refused(start) -> None:
    param = nn.Parameter(start.clone())
    adam = torch.optim.Adam([param])
    with pytest.raises(ValueError, match="another optimiser"):
        AdaShift([param]).load_state_dict(adam.state_dict())
    mixed = AdaShift([param]).state_dict()
    param.grad = torch.ones_like(param)
    adam.step()
    mixed["state"] = adam.state_dict()["state"]
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 holds exp_avg, exp_avg_sq, step where .*another opt"):
        AdaShift([param]).load_state_dict(mixed)


def test_a_state_of_another_shape_is_refused_and_changes_nothing(start, gradient, run, one) -> None:
    param, optimizer = one(start)
    run(optimizer, [param], gradient, 3)
    other, wide = one(torch.zeros(7, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"exp_avg of shape \(5, 3\) where a parameter of shape \(7, 3\)"):
        wide.load_state_dict(optimizer.state_dict())
    assert not wide.state
    with pytest.raises(ValueError, match="parameter group"):
        AdaShift([nn.Parameter(start), nn.Parameter(start)]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 4}, "n, block and shapes are fixed"),
        ({"betas": (0.0, 0.9)}, "beta1 or phi was changed"),
        ({"block": "row"}, "n, block and shapes are fixed"),
        ({"phi": "none"}, "beta1 or phi was changed"),
    ],
)
def test_what_the_state_rests_on_cannot_be_changed_on_the_way(
    change: dict, message: str, start, gradient, run, one
) -> None:
    param, optimizer = one(start)
    run(optimizer, [param], gradient, 3)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_parameter_that_changed_its_shape_is_refused(start, gradient, run, one) -> None:
    param, optimizer = one(start)
    run(optimizer, [param], gradient, 3)
    param.data = torch.zeros(2, 2, dtype=torch.float64)
    param.grad = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter of shape \(2, 2\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number of at least 1"),
        ({"n": -1}, "n=-1 must"),
        ({"n": 2.5}, "n=2.5 must"),
        ({"n": True}, "n=True must"),
        ({"betas": (1.1, 0.9)}, r"betas\[0\]=1.1 must lie in \[0, 1\]"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 must lie in \[0, 1\)"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"betas": (float("nan"), 0.9)}, "must be two numbers"),
        ({"lr": -1.0}, "lr=-1.0 must be a finite number"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": torch.ones(2)}, r"tensor of shape \(2,\)"),
        ({"eps": -1e-3}, "eps=-0.001"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"phi": "median"}, "phi='median' is not known; choose one of max, mean, l2, none"),
        ({"block": "head"}, "block='head' is not known; choose one of tensor, row"),
        ({"block": "row", "phi": "none"}, "block='row' needs a phi"),
        ({"ring_dtype": torch.int8}, "ring_dtype=torch.int8 cannot hold gradients"),
        ({"max_step": 0.0}, "max_step=0.0 must be a positive number"),
        ({"foreach": True, "fused": True}, "exclude each other"),
        ({"capturable": True, "fused": False}, "capturable=True needs the kernels"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_was_given_and_what_would_do(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaShift([nn.Parameter(torch.ones(2))], **given)
    good = AdaShift([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        good.add_param_group({"params": [nn.Parameter(torch.ones(2))], **given})
    assert len(good.param_groups) == 1, "a refused group is not kept"


def test_sparse_gradients_and_complex_parameters_are_refused_with_a_way_out() -> None:
    words = nn.Embedding(4, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r'parameter 0 of group 0 has a sparse gradient; .*block="row"'):
        AdaShift(words.parameters()).step()
    with pytest.raises(ValueError, match="torch.view_as_real"):
        AdaShift([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_messages_use_the_names_of_named_parameters() -> None:
    words = nn.Embedding(4, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="weight has a sparse gradient"):
        AdaShift(words.named_parameters()).step()


def test_the_identity_with_the_published_eps_warns_once() -> None:
    with pytest.warns(UserWarning, match="diverges on most networks.*use eps=1e-5") as seen:
        AdaShift([nn.Parameter(torch.ones(2))], phi="none", eps=1e-10)
    assert len(seen) == 1


def test_defaults_follow_phi_and_the_presets_are_the_papers() -> None:
    assert (AdaShiftConfig().lr, AdaShiftConfig().eps) == (1e-2, 1e-10)
    assert (AdaShiftConfig(phi="mean").lr, AdaShiftConfig(phi="none").eps) == (1e-3, 1e-5)
    assert AdaShiftConfig.quick(n=3).n == 3 and AdaShiftConfig.paper("translation").n == 40
    assert all(AdaShiftConfig.paper(name).phi == "max" for name in PAPER_EXPERIMENTS)
    with pytest.raises(ValueError, match="choose one of counter-example"):
        AdaShiftConfig.paper("BERT")

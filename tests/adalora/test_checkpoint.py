"""Stop and go on: a resumed run is bit for bit the run that was not interrupted."""

from __future__ import annotations

import copy

import pytest
import torch

from zq_lib.adalora import AdaLoraConfig, attach

CONFIG = AdaLoraConfig(
    init_rank=6, target_rank=3, total_steps=40, warmup=4, final=10, interval=4, dropout=0.1, train_also=("head",)
)


def _begin(toy, config=CONFIG, **settings):
    model = copy.deepcopy(toy)
    torch.manual_seed(5)
    handle = attach(model, config, **settings)
    return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0, amsgrad=True)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("stop", [1, 6, 17, 30, 31, 38])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(toy, batches, train, tmp_path, stop, cut) -> None:
    model, handle, optimizer = _begin(toy, shrink=cut)
    train(model, optimizer, batches[:stop])
    handle.save(tmp_path, optimizer)
    train(model, optimizer, batches[stop:40])

    torch.manual_seed(99)
    again, resumed, fresh = _begin(toy, shrink=cut)
    torch.manual_seed(100)
    resumed.load(tmp_path, fresh)
    assert resumed.step == stop
    train(again, fresh, batches[stop:40])
    assert resumed.report() == handle.report() and resumed.report().active == 18
    assert torch.equal(resumed.keep, handle.keep) and resumed.trace.steps == handle.trace.steps
    for a, b in zip(handle.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[b][name])), name


def test_saving_changes_nothing_and_keeps_values_that_have_regrown(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:15])
    before = [p.detach().clone() for p in handle.parameters()]
    active = int((torch.stack([a.values.detach() for a in handle.adapters]) != 0).sum())
    handle.save(tmp_path, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    _, resumed, _ = _begin(toy)
    resumed.load(tmp_path)
    stored = torch.stack([a.values.detach() for a in resumed.adapters])
    assert int((stored != 0).sum()) == active > int(resumed.keep.sum())


def test_a_state_in_memory_does_the_same_as_a_folder(toy, batches, train) -> None:
    model, handle, optimizer = _begin(toy, dropout=0.0)
    train(model, optimizer, batches[:9])
    state, moments = copy.deepcopy(handle.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches[9:40])
    again, resumed, fresh = _begin(toy, dropout=0.0)
    resumed.load_state_dict(state)
    fresh.load_state_dict(moments)
    train(again, fresh, batches[9:40])
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_rank": 2}, "made with target_rank=3 and this run has 2"),
        ({"init_rank": 8}, "made with init_rank=6 and this run has 8"),
        ({"beta1": 0.9}, "beta1"),
        ({"total_steps": 41}, "made for total_steps=40 and this run has 41"),
        ({"targets": ("up",)}, "targets"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_with_the_field(toy, batches, train, setting, message) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:3])
    state = handle.state_dict()
    _, other, _ = _begin(toy, **setting)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_a_checkpoint_of_another_model_is_refused(toy, batches, train) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:3])
    smaller = copy.deepcopy(toy)
    del smaller.blocks[2]
    other = attach(smaller, CONFIG)
    with pytest.raises(ValueError, match="the checkpoint has 6 layers.*this model has 4"):
        other.load_state_dict(handle.state_dict())


def test_a_folder_without_a_checkpoint_or_without_an_optimiser_is_refused(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    with pytest.raises(FileNotFoundError, match="holds no AdaLoRA checkpoint"):
        handle.load(tmp_path)
    train(model, optimizer, batches[:3])
    handle.save(tmp_path)
    with pytest.raises(ValueError, match="saved without an optimiser"):
        handle.load(tmp_path, optimizer)


def test_a_models_own_state_dict_carries_pruned_adapters(toy, batches, train) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:40])
    other, target, _ = _begin(toy)
    other.load_state_dict(model.state_dict())
    assert [a.rank for a in target.adapters] == list(handle.ranks().values())
    ids, _ = batches[0]
    assert torch.equal(model.eval()(ids), other.eval()(ids))

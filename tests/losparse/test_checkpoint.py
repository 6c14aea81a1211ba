"""Stop and go on: a resumed run is bit for bit the run that was not interrupted, before the cut and after."""

from __future__ import annotations

import copy

import pytest
import torch

from zq_lib.losparse import LoSparseConfig, attach

CONFIG = LoSparseConfig(low_rank=0.1, remaining=0.3, total_steps=40, warmup=4, final=10, interval=4)


def _begin(toy, config=CONFIG, **settings):
    model = copy.deepcopy(toy)
    handle = attach(model, config, **settings)
    return model, handle, torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)


@pytest.mark.parametrize(
    "settings", [{}, {"shrink": False}, {"form": "ema"}, {"score": "random"}], ids=["cut", "masked", "ema", "random"]
)
@pytest.mark.parametrize("stop", [1, 6, 17, 31, 32, 38])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(toy, batches, train, tmp_path, stop, settings) -> None:
    model, handle, optimizer = _begin(toy, **settings)
    train(model, optimizer, batches[:stop])
    handle.save(tmp_path, optimizer)
    train(model, optimizer, batches[stop:40])

    torch.manual_seed(100)
    again, resumed, fresh = _begin(toy, **settings)
    resumed.load(tmp_path, fresh)
    assert resumed.step == stop
    train(again, fresh, batches[stop:40])
    assert resumed.report() == handle.report() and resumed.report().phase == "final"
    assert torch.equal(resumed.keep, handle.keep) and resumed.trace == handle.trace
    assert resumed.shrunk is handle.shrunk is ("shrink" not in settings)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[b][name])), name
    handle.merge()
    resumed.merge()


def test_a_run_can_go_back_from_after_the_cut_to_before_it(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:20])
    handle.save(tmp_path, optimizer)
    train(model, optimizer, batches[20:40])
    want = [p.detach().clone() for p in model.parameters()]
    handle.load(tmp_path, optimizer)
    assert handle.step == 20 and not handle.shrunk and not handle.layers["blocks.0.up"].shrunk
    train(model, optimizer, batches[20:40])
    assert all(torch.equal(a, b) for a, b in zip(want, model.parameters(), strict=True))


def test_the_number_of_steps_comes_with_the_checkpoint(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:3])
    handle.save(tmp_path)
    _, resumed, _ = _begin(toy, total_steps=None)
    resumed.load(tmp_path)
    assert resumed.schedule.total == 40 and resumed.step == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"remaining": 0.2}, "made with remaining=0.3 and this run has 0.2"),
        ({"low_rank": 0.3}, "made with low_rank=0.1 and this run has 0.3"),
        ({"form": "ema"}, "made with form='window' and this run has 'ema'"),
        ({"total_steps": 41}, "made for total_steps=40 and this run has 41"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_field(toy, batches, train, tmp_path, setting, message) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:3])
    handle.save(tmp_path)
    _, other, _ = _begin(toy, **setting)
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    train(model, optimizer, batches[:3])
    handle.save(tmp_path)
    smaller = copy.deepcopy(toy)
    del smaller.blocks[2]
    with pytest.raises(ValueError, match="the checkpoint has 6 layers.*this model has 4"):
        attach(smaller, CONFIG).load(tmp_path)


def test_a_folder_without_a_checkpoint_or_without_an_optimiser_is_refused(toy, batches, train, tmp_path) -> None:
    model, handle, optimizer = _begin(toy)
    with pytest.raises(FileNotFoundError, match="holds no LoSparse checkpoint; it needs losparse.json"):
        handle.load(tmp_path)
    train(model, optimizer, batches[:3])
    handle.save(tmp_path)
    with pytest.raises(ValueError, match="saved without an optimiser"):
        handle.load(tmp_path, optimizer)

"""The first stage trains filters and nothing else; cached states give the same filters bit for bit."""

from __future__ import annotations

import time

import pytest
import torch

from zq_lib.ted import StateCache, TaskFilters, TedConfig, baseline_filters, fit, see
from zq_lib.ted.cache import FACTS

CONFIG = TedConfig(filter_dim=6, dropout=0.0)


def _filters(model, config=CONFIG, layers=(2, 4)) -> TaskFilters:
    torch.manual_seed(1)
    return TaskFilters(model, config, layers)


def _losses(*args, **kwargs) -> torch.Tensor:
    return torch.stack([step.losses for step in fit(*args, **kwargs)])


@pytest.mark.parametrize(
    ("arch", "kind"), [("bert", "sequence"), ("bert", "span"), ("bert", "token"), ("llama", "language")]
)
def test_the_filters_learn_and_the_model_stays_as_it_was_bit_for_bit(arch, kind, make, batch_of) -> None:
    model, batches = make(arch, kind=kind), [batch_of(kind, rows=16, seed=i) for i in range(4)]
    model.train()
    model.dropout = torch.nn.Dropout(0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    filters = _filters(model)
    losses = _losses(filters, batches, epochs=12, learning_rate=1e-2)
    assert losses.shape == (48, 2) and bool((losses[-4:].mean(0) < losses[:4].mean(0)).all())
    assert filters.origin == "trained" and not filters.training and bool((filters.variance > 0).all())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_all_layers_together_is_training_them_one_by_one(make, batch_of) -> None:
    model, batches = make(dtype=torch.float64), [batch_of(seed=i) for i in range(3)]
    together = _filters(model)
    _losses(together, batches)
    for place, layer in enumerate((2, 4)):
        alone = _filters(model, layers=(layer,))
        torch.nn.Module.load_state_dict(alone.filters[0], _filters(model).filters[place].state_dict())
        alone.heads[0].load_state_dict(_filters(model).heads[place].state_dict())
        optimizer = torch.optim.SGD([{"params": alone.parameters(), "lr": 0.1}])
        half = _filters(model)
        of_both = torch.optim.SGD([{"params": half.parameters(), "lr": 0.2}])  # the mean over two layers halves each
        _losses(alone, batches, optimizer=optimizer)
        _losses(half, batches, optimizer=of_both)
        for a, b in zip(alone.filters[0].parameters(), half.filters[place].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("arch", "kind"), [("bert", "sequence"), ("bert", "token"), ("gpt2", "language")])
def test_cached_states_give_the_same_filters_as_live_ones_bit_for_bit(
    arch, kind, side, make, batch_of, tmp_path
) -> None:
    model = make(arch, kind=kind, dtype=torch.float64)
    batches = [batch_of(kind, seed=i, first=4 * i, side=side) for i in range(3)]
    want = _filters(model)
    losses = _losses(want, batches, epochs=2)
    for folder in (None, tmp_path / "states"):
        cache = StateCache.of(model, batches, (2, 4), folder)
        if folder is not None:
            cache = StateCache.open(folder)
        found = _filters(model)
        assert torch.equal(_losses(found, batches, epochs=2, cache=cache), losses)
        assert all(
            torch.equal(a, b) for a, b in zip(found.state_dict().values(), want.state_dict().values(), strict=True)
        )


def test_the_cache_knows_an_example_in_any_batch_with_any_padding(make, batch_of, pad) -> None:
    model, batch = make("bert"), batch_of(rows=6)
    cache = StateCache.of(model, [batch], (1, 4))
    live = see(model, batch, (1, 4))
    order = torch.tensor([5, 0, 3])
    other = pad({k: v[order] for k, v in batch.items()}, 4)
    found, mask = cache.seen(other), batch["attention_mask"][order].bool()
    assert len(cache) == 6 and 5 in cache and 6 not in cache
    torch.testing.assert_close(found.logits, live.logits[order])
    for a, b in zip(found.states, live.states, strict=True):
        assert torch.equal(a[:, :9][mask], b[order][mask]) and not a[other["attention_mask"] == 0].any()


def test_states_in_half_the_room_are_nearly_the_same(make, batch_of) -> None:
    model, batch = make(), batch_of()
    exact, small = (StateCache.of(model, [batch], (4,), dtype=d).seen(batch) for d in (None, torch.bfloat16))
    assert small.states[0].dtype == torch.bfloat16
    torch.testing.assert_close(small.states[0].float(), exact.states[0], rtol=1e-2, atol=1e-2)
    filters = _filters(model, layers=(4,))
    list(fit(filters, [batch], cache=StateCache.of(model, [batch], (4,), dtype=torch.bfloat16, logits=False)))


def test_a_cache_that_does_not_fit_is_refused(make, batch_of, tmp_path) -> None:
    model, batch = make(), batch_of()
    cache = StateCache.of(model, [batch], (2, 4))
    with pytest.raises(ValueError, match="example 4 is not among the 4 kept"):
        cache.seen(batch_of(first=4))
    with pytest.raises(
        ValueError, match="example 0 was kept with 9 tokens and now has 9, or others; run StateCache.of anew"
    ):
        cache.seen(batch_of(seed=1))
    with pytest.raises(ValueError, match="the batch has no 'example'; add the examples' numbers"):
        cache.seen({k: v for k, v in batch.items() if k != "example"})
    with pytest.raises(ValueError, match=r"the cache holds layers \(2, 4\) and the filters stand behind \(1, 4\)"):
        list(fit(_filters(model, layers=(1, 4)), [batch], cache=cache))
    with pytest.raises(FileNotFoundError, match=f"holds no states; it needs {FACTS}"):
        StateCache.open(tmp_path)


def test_cached_states_are_much_faster_than_the_model(make, batch_of) -> None:
    model = make(depth=6, width=128, kind="sequence")
    batches = [batch_of(rows=32, length=32, seed=i, first=32 * i) for i in range(2)]
    cache = StateCache.of(model, batches, (2, 4, 6))

    def spent(cache: StateCache | None) -> float:
        filters, times = _filters(model, layers=(2, 4, 6)), []
        for _ in range(4):
            start = time.process_time()
            _losses(filters, batches, cache=cache)
            times.append(time.process_time() - start)
        return min(times)

    assert spent(cache) * 2 < spent(None)


def test_what_cannot_be_trained_is_refused(make, batch_of) -> None:
    model, batch = make(), batch_of()
    with pytest.raises(ValueError, match="batches is empty, and the filters learned nothing"):
        list(fit(_filters(model), []))
    with pytest.raises(ValueError, match="the batch has no 'labels', which the task 'classification' is learnt from"):
        list(fit(_filters(model), [{k: v for k, v in batch.items() if k != "labels"}]))
    with pytest.raises(ValueError, match="these filters are a baseline, 'random', which is not trained"):
        list(fit(baseline_filters("random", model, [batch], CONFIG, (2,), 6), [batch]))
    broken = make()
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss behind layer 2 is nan; the model's states or labels are not finite"):
        list(fit(_filters(broken), [batch]))
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="row 1 of attention_mask is all padding"):
        list(fit(_filters(model), [batch]))

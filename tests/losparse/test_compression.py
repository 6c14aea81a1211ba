"""A plain loop: the schedule runs by itself, rows are cut, the model is smaller and can become dense again."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from zq_lib.core.backend import interpreting, launches
from zq_lib.losparse import LoSparseConfig, LowRankSparse, attach
from zq_lib.losparse.importance import RowImportance

CONFIG = LoSparseConfig(low_rank=0.1, remaining=0.3, total_steps=40, warmup=4, final=10, interval=2)
SIZES = 6 * 12 * 28


def _adam(model, lr: float = 5e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)


def test_attaching_changes_no_output(toy, batches) -> None:
    want = toy(batches[0][0])
    with attach(toy, CONFIG):
        found = toy(batches[0][0])
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("score", ["sensitivity", "magnitude", "random"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_plain_loop_ends_at_the_budget_and_the_model_is_smaller(toy, batches, train, score, exact) -> None:
    handle = attach(toy, CONFIG, score=score, exact=exact)
    before = sum(p.numel() for p in toy.parameters())
    train(toy, _adam(toy), batches[:40])
    report = handle.report()
    assert report.phase == "final" and report.fixed and report.step == 40 and handle.shrunk
    kept = sum(layer.rows * layer.inputs for layer in report.layers)
    assert abs(kept - 0.3 * SIZES) < 29
    factors = sum(layer.rank * (layer.outputs + layer.inputs) for layer in report.layers)
    assert report.parameters == factors + kept + 3 * 28
    after = sum(p.numel() for p in toy.parameters())
    assert after == report.model_parameters < report.model_parameters_at_start < before
    assert all(layer.state == "shrunk" for layer in report.layers)


def test_the_phases_and_shares_follow_the_schedule(toy, batches, train) -> None:
    handle, seen = attach(toy, CONFIG), []
    optimizer = _adam(toy)
    for t in range(40):
        train(toy, optimizer, batches[t : t + 1])
        seen.append(handle.report().phase)
    assert seen == ["warm-up"] * 5 + ["pruning"] * 26 + ["final"] * 9
    assert handle.trace.steps == [*range(6, 31, 2), 31]
    assert handle.trace.shares == [handle.schedule.share(t) for t in handle.trace.steps]
    kept = handle.trace.kept()
    assert all(0 <= density - share < 29 / SIZES for density, share in zip(kept, handle.trace.shares, strict=True))
    assert handle.trace.densities().shape == (14, 6)


def test_masked_rows_are_zero_after_a_mask_and_grow_again_before_the_next(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, interval=4, final=4, beta=0.0)
    optimizer = _adam(toy, 2e-2)
    regrown = False
    for t in range(36):
        train(toy, optimizer, batches[t : t + 1])
        parts = zip(handle.layers.values(), handle.keep.split(handle.counts.tolist()), strict=True)
        zero = all(not layer.sparse[~keep].any() for layer, keep in parts)
        if handle.schedule.masks(t):
            assert zero
        elif t > 8:
            regrown |= not zero
    assert regrown and sum(handle.trace.returned) > 0


def test_published_masking_in_the_final_phase_keeps_choosing(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, shrink=False)
    train(toy, _adam(toy), batches[:40])
    assert handle.trace.steps[-9:] == [*range(31, 40)] and not handle.shrunk
    assert all(layer.state == "training" for layer in handle.report().layers)
    assert handle.finish().fixed and handle.shrunk


def test_training_after_the_cut_equals_training_with_a_mask(toy, batches, train) -> None:
    kept = []
    for cut in (True, False):
        model = copy.deepcopy(toy)
        handle = attach(model, CONFIG, total_steps=52, final=21)
        if not cut:  # as several processes do, whose buffers cannot be cut
            handle._fix = lambda handle=handle: (setattr(handle, "fixed", True), handle._mask_gradients())
        train(model, _adam(model), batches[:52], clip=0.05)
        assert handle.shrunk is cut
        handle.shrink()
        kept.append([p.detach() for p in model.parameters()])
        handle.merge()
    for a, b in zip(*kept, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["AdamW", "AMSGrad", "SGD", "RMSprop", "Adagrad"])
def test_the_cut_takes_the_optimisers_state_with_it(toy, batches, train, kind: str) -> None:
    handle = attach(toy, CONFIG)
    made = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "AMSGrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    }[kind]
    optimizer = made(toy.parameters())
    train(toy, optimizer, batches[:40])
    per_entry = {"AdamW": 2, "AMSGrad": 3, "SGD": 1, "RMSprop": 3, "Adagrad": 1}[kind]
    held = sum(
        v.numel() for p in toy.parameters() for v in optimizer.state[p].values() if torch.is_tensor(v) and v.dim()
    )
    assert handle.shrunk and held == per_entry * sum(p.numel() for p in toy.parameters())


def test_an_optimiser_whose_state_cannot_be_cut_says_so_before_anything_changed(toy, batches, train) -> None:
    handle = attach(toy, CONFIG)
    with pytest.raises(ValueError, match="Adafactor keeps 'row_var'.*use shrink=False"):
        train(toy, torch.optim.Adafactor(toy.parameters()), batches[:40])
    assert not handle.shrunk and all(
        not m.shrunk and m.sparse.shape[0] == m.out_features for m in handle.layers.values()
    )
    handle.merge()


def test_leaving_the_context_leaves_dense_layers_that_compute_the_same(toy, batches, train) -> None:
    names = list(toy.state_dict())
    bias = toy.blocks[0]["up"].bias
    with attach(toy, CONFIG):
        train(toy, _adam(toy), batches[:40])
        want = toy(batches[0][0])
    assert list(toy.state_dict()) == names and type(toy.blocks[0]["up"]) is nn.Linear
    assert toy.blocks[0]["up"].bias is bias
    torch.testing.assert_close(toy(batches[0][0]), want, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    train(toy, optimizer, batches[:1])  # and no hook is left to complain


def test_layers_that_are_not_cheaper_become_dense_at_the_end(toy, batches, train) -> None:
    for auto in (True, False):
        model = copy.deepcopy(toy)
        handle = attach(model, CONFIG, exact=True, min_rows={"blocks.0.up": 28}, remaining=0.4, auto_dense=auto)
        train(model, _adam(model), batches[:40])
        want = model(batches[0][0])
        report = handle.finish()
        states = {layer.name: layer.state for layer in report.layers}
        assert states["blocks.0.up"] == ("dense" if auto else "shrunk") and states["blocks.1.up"] == "shrunk"
        assert isinstance(model.blocks[0]["up"], nn.Linear if auto else LowRankSparse)
        torch.testing.assert_close(model(batches[0][0]), want, rtol=1e-4, atol=1e-5)
        assert report.model_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "states"), [({"low_rank": 0}, "rows only"), ({"remaining": 0, "low_rank": 0.4}, "low rank only")]
)
def test_the_baselines_are_settings_of_the_same_call(toy, batches, train, settings, states) -> None:
    handle = attach(toy, CONFIG, **settings)
    train(toy, _adam(toy), batches[:40])
    layers = handle.report().layers
    if states == "rows only":
        assert all(layer.rank == 0 for layer in layers) and sum(layer.rows for layer in layers) > 0
    else:
        assert all(layer.rows == 0 and layer.rank == 4 for layer in layers)
    ids, _ = batches[0]
    want = toy(ids)
    handle.merge()
    torch.testing.assert_close(toy(ids), want, rtol=1e-4, atol=1e-5)


def test_one_shot_needs_no_training_and_takes_scores_from_outside(toy, batches) -> None:
    handle = attach(toy, low_rank=0.1, remaining=0.5)
    with pytest.raises(RuntimeError, match="nothing to choose rows by; train, give scores"):
        handle.shrink()
    with pytest.raises(RuntimeError, match="and nothing was cut"):
        handle.report()
    scores = {name: torch.arange(m.out_features, dtype=torch.float32) for name, m in handle.layers.items()}
    with pytest.raises(ValueError, match="scores of layer 'blocks.0.up' must be one number for each of its 28"):
        handle.shrink(scores | {"blocks.0.up": torch.ones(3)})
    handle.shrink(scores)
    report = handle.finish()
    assert report.phase == "one shot" and report.total_steps is None
    rows = {layer.name: layer.rows for layer in report.layers}
    assert rows["blocks.0.up"] > 12 > rows["blocks.0.down"], "the later outputs of all layers are the best here"
    assert toy.blocks[0]["up"].rows.tolist() == list(range(28 - rows["blocks.0.up"], 28))


def test_rows_are_rounded_when_they_are_cut(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, round_to=4)
    train(toy, _adam(toy), batches[:40])
    assert all(layer.rows % 4 == 0 for layer in handle.report().layers)


def test_importance_costs_eight_bytes_a_row_at_most(toy) -> None:
    for form, most in (("window", 8), ("ema", 4)):
        with attach(toy, CONFIG, form=form) as handle:
            state = [t for t in vars(handle.importance).values() if isinstance(t, torch.Tensor)]
            assert sum(t.nbytes for t in state) == most * int(handle.counts.sum())


def test_importance_in_half_precision_is_that_of_the_numbers_themselves() -> None:
    matrix = nn.Parameter((torch.randn(6, 9) * 1e-3).half())
    matrix.grad = (torch.randn(6, 9) * 1e-4).half()
    importance = RowImportance([matrix], "sensitivity", "ema", 10, 0.0, "torch")
    importance.update(0)
    want = (matrix.double() * matrix.grad.double()).abs().mean(1)
    torch.testing.assert_close(importance.scores().double(), want, rtol=1e-5, atol=0)


def test_a_layer_without_gradient_counts_as_unused(toy, batches, train) -> None:
    toy.spare = nn.ModuleList([nn.Linear(12, 28)])
    handle = attach(toy, CONFIG)
    train(toy, _adam(toy), batches[:40])
    assert handle.report().layers[-1].rows == 0


def test_an_optimiser_made_before_attach_is_noticed_at_its_first_step(toy, batches, train) -> None:
    optimizer = _adam(toy)
    with attach(toy, CONFIG):
        with pytest.raises(ValueError, match="weights from before the compression and none of the compressed layers"):
            train(toy, optimizer, batches[:1])


def test_half_of_the_factors_in_an_optimiser_are_refused(toy, batches, train) -> None:
    with attach(toy, CONFIG) as handle:
        optimizer = torch.optim.SGD(handle.factors()[:4], lr=0.1)
        with pytest.raises(ValueError, match="holds 4 of the 18 tensors of the compressed layers; give it model.param"):
            train(toy, optimizer, batches[:1])


def test_stepping_after_zero_grad_is_an_error(toy, batches) -> None:
    for to_none in (True, False):
        with attach(toy, CONFIG):
            optimizer = _adam(toy)
            ids, labels = batches[0]
            nn.functional.cross_entropy(toy(ids), labels).backward()
            optimizer.zero_grad(set_to_none=to_none)
            with pytest.raises(RuntimeError, match="the order is backward, optimizer.step, zero_grad"):
                optimizer.step()


def test_training_that_stops_early_warns_and_can_be_cut(toy, batches, train) -> None:
    with pytest.warns(UserWarning, match="stopped after step 12 of 40, before the kept rows were final"):
        with attach(copy.deepcopy(toy), CONFIG) as handle:
            train(handle.model, _adam(handle.model), batches[:12])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(toy, CONFIG) as handle:
            train(toy, _adam(toy), batches[:12])
            assert handle.finish().fixed
            assert abs(sum(x.rows * x.inputs for x in handle.report().layers) - 0.3 * SIZES) < 29


def test_the_number_of_steps_must_be_known_before_the_first(toy, batches, train) -> None:
    with attach(toy, low_rank=0.1, remaining=0.3) as handle:
        with pytest.raises(ValueError, match="total_steps=None: give attach the number"):
            train(toy, _adam(toy), batches[:1])
        handle.step = 0


def test_the_scores_can_be_looked_at_until_the_rows_are_cut(toy, batches, train) -> None:
    handle = attach(toy, CONFIG)
    train(toy, _adam(toy), batches[:20])
    scores = handle.scores()
    assert list(scores) == list(handle.layers) and scores["blocks.0.up"].shape == (28,)
    train(toy, _adam(copy.deepcopy(toy)), [])
    handle.finish()
    with pytest.raises(RuntimeError, match="no scores any more"):
        handle.scores()


def test_gradient_accumulation_and_skipped_steps_count_as_the_optimiser_counts(toy, batches) -> None:
    handle = attach(toy, CONFIG)
    optimizer = _adam(toy)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids, labels = batches[0]
    for overflow in (False, True, False):
        for part in range(2):
            loss = nn.functional.cross_entropy(toy(ids[part::2]), labels[part::2])
            scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert handle.step == 2 and handle.importance.window.isfinite().all() and handle.importance.window.any()
    handle.merge()


def test_a_compiled_model_follows_the_masks_and_the_cut(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, total_steps=8, warmup=0, final=3)
    compiled = torch.compile(toy, backend="eager")
    train(compiled, _adam(toy), batches[:8])
    assert handle.shrunk
    with torch.no_grad():
        torch.testing.assert_close(compiled(batches[0][0]), toy(batches[0][0]))


def test_the_trace_survives_a_file(toy, batches, train, tmp_path) -> None:
    from zq_lib.losparse import DensityTrace

    handle = attach(toy, CONFIG)
    train(toy, _adam(toy), batches[:40])
    handle.trace.save(tmp_path / "trace.json")
    assert DensityTrace.load(tmp_path / "trace.json") == handle.trace


@pytest.mark.skipif(not interpreting(), reason="the kernels themselves are tested on a GPU elsewhere")
@pytest.mark.parametrize("form", ["window", "ema"])
def test_the_kernels_choose_the_same_rows_as_torch(toy, batches, train, form: str) -> None:
    found = []
    for backend, path in (("torch", "torch"), ("triton", "interpreter")):
        model = copy.deepcopy(toy)
        handle = attach(model, CONFIG, total_steps=6, warmup=0, final=2, form=form, shrink=False, backend=backend)
        with launches() as seen:
            train(model, _adam(model), batches[:6])
        assert {x.path for x in seen if x.kernel == "losparse.importance"} == {path}
        found.append((handle.trace, handle.keep, [p.detach() for p in model.parameters()]))
        handle.merge()
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(a, b)

"""A plain loop: the schedule runs by itself, ends at the budget, removes what it dropped."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from zq_lib.adalora import AdaLoraConfig, attach

CONFIG = AdaLoraConfig(init_rank=6, target_rank=3, total_steps=40, warmup=4, final=10, interval=2)


def _adam(handle, lr: float = 5e-3):
    return torch.optim.AdamW(handle.parameters(), lr=lr, weight_decay=0)


@pytest.mark.parametrize("score", ["adalora", "smoothed", "sensitivity", "magnitude"])
@pytest.mark.parametrize("at", ["post_step", "pre_step"])
def test_a_plain_loop_ends_at_exactly_the_budget_without_an_extra_call(toy, batches, train, score, at) -> None:
    handle = attach(toy, CONFIG, score=score, sensitivity_at=at)
    train(toy, _adam(handle), batches[:40])
    report = handle.report()
    assert report.active == 18 == sum(report.ranks.values()) and report.finished and report.phase == "final"
    assert [a.rank for a in handle.adapters] == list(report.ranks.values())
    assert report.parameters < report.parameters_at_start and report.step == 40


def test_the_phases_follow_the_schedule(toy, batches, train) -> None:
    handle, seen = attach(toy, CONFIG, shrink=False), []
    optimizer = _adam(handle)
    for t in range(40):
        train(toy, optimizer, batches[t : t + 1])
        report = handle.report()
        seen.append((report.phase, report.budget))
        if handle.schedule.allocates(t):
            assert report.active == handle.schedule.budget(t)
    assert [p for p, _ in seen] == ["warm-up"] * 5 + ["budget"] * 25 + ["final"] * 10
    assert [b for _, b in seen] == [handle.schedule.budget(t) for t in range(40)]
    assert handle.trace.steps == handle.schedule.allocation_steps() == [*range(6, 31, 2)]


def test_dropped_values_regrow_between_allocations_and_some_come_back(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, interval=4)
    train(toy, _adam(handle, 2e-2), batches[:40])
    assert max(handle.trace.regrown) > 0 and handle.trace.revived() > 0


def test_only_adapters_and_what_is_named_train(toy, batches, train) -> None:
    before = copy.deepcopy(toy.state_dict())
    handle = attach(toy, CONFIG, train_also=("head",))
    train(toy, _adam(handle), batches[:10])
    handle.detach()
    changed = {k for k, v in toy.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def test_the_loss_is_the_tasks_alone_in_training_and_in_evaluation(toy, batches) -> None:
    handle = attach(toy, CONFIG, orthogonality=5.0)
    ids, labels = batches[0]
    task = nn.functional.cross_entropy(toy(ids), labels)
    toy.eval()
    with torch.no_grad():
        assert torch.equal(nn.functional.cross_entropy(toy(ids), labels), task)
    assert handle.penalty() > 1 and handle.penalty().requires_grad


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_the_penalty_added_at_the_step_equals_the_penalty_in_the_loss(toy, batches, form: str) -> None:
    results = []
    for at in ("step", "loss"):
        model = copy.deepcopy(toy)
        torch.manual_seed(0)
        handle = attach(model, CONFIG, penalty_at=at, penalty=form, orthogonality=0.3)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for ids, labels in batches[:12]:
            loss = nn.functional.cross_entropy(model(ids), labels)
            (loss + handle.penalty() if at == "loss" else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in handle.parameters()])
        handle.detach()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_penalty_makes_the_vectors_orthogonal(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, orthogonality=0.5, init_rank=4)
    start = handle.penalty().item()
    train(toy, _adam(handle, 2e-2), batches[:60])
    assert handle.penalty().item() < start / 3


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_training_after_removal_equals_training_with_a_mask(toy, batches, train, form: str) -> None:
    """20 steps after the cut, with penalty and with clipping by norm: the kept parameters agree to 1e-6."""
    kept = []
    for cut in (True, False):
        model = copy.deepcopy(toy)
        torch.manual_seed(0)
        handle = attach(model, CONFIG, shrink=cut, total_steps=51, final=20, penalty=form)
        train(model, _adam(handle), batches[:52], clip=0.05)
        assert handle.shrunk is cut and handle.report().active == 18
        kept.append([
            part
            for a, keep in zip(handle.adapters, handle.keep, strict=True)
            for part in ((a.left, a.values, a.right) if cut else (a.left[:, keep], a.values[keep], a.right[keep]))
        ])  # fmt: skip
        handle.detach()
    for a, b in zip(*kept, strict=True):
        assert (a - b).abs().max() <= 1e-6 if a.numel() else a.shape == b.shape


@pytest.mark.parametrize("kind", ["AdamW", "AMSGrad", "SGD", "RMSprop", "Adagrad"])
def test_removal_cuts_the_optimisers_state_with_the_parameters(toy, batches, train, kind: str) -> None:
    handle = attach(toy, CONFIG)
    made = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "AMSGrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    }[kind]
    optimizer = made(handle.parameters())
    ours = set(handle.parameters())
    train(toy, optimizer, batches[:40])
    assert {p for g in optimizer.param_groups for p in g["params"]} == ours == set(handle.parameters())
    for p in handle.parameters():
        for value in optimizer.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.numel() == 1 or value.shape == p.shape
    left = sum(v.numel() for p in ours for v in optimizer.state[p].values() if torch.is_tensor(v) and v.dim())
    per_entry = {"AdamW": 2, "AMSGrad": 3, "SGD": 1, "RMSprop": 3, "Adagrad": 1}[kind]
    assert left == per_entry * handle.parameter_count()


def test_an_optimiser_whose_state_cannot_be_cut_says_so_before_anything_changed(toy, batches, train) -> None:
    handle = attach(toy, CONFIG)
    with pytest.raises(ValueError, match="Adafactor keeps 'row_var'.*use shrink=False"):
        train(toy, torch.optim.Adafactor(handle.parameters()), batches[:40])
    assert all(a.rank == 6 for a in handle.adapters)


def test_the_budget_in_parameters_is_met_and_prefers_cheap_matrices(toy, batches, train) -> None:
    toy.wide = nn.ModuleList([nn.Linear(12, 300), nn.Linear(300, 4)])
    toy.head = nn.Sequential(*toy.wide)
    handle = attach(toy, CONFIG, targets=("up", "down", "head.0"), budget_unit="parameters", budget=1000)
    train(toy, _adam(handle), batches[:40])
    spent = sum(a.cost * a.rank for a in handle.adapters)
    assert 1000 - 312 < spent <= 1000
    assert handle.report().budget == 1000


def test_bounds_for_matrices_hold_at_the_end(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, min_rank={"up": 2}, max_rank={"down": 3})
    train(toy, _adam(handle), batches[:40])
    ranks = handle.ranks()
    assert sum(ranks.values()) == 18
    assert all(r >= 2 for n, r in ranks.items() if n.endswith("up"))
    assert all(r <= 3 for n, r in ranks.items() if n.endswith("down"))


@pytest.mark.parametrize("target", [6, 9])
def test_a_budget_that_is_not_below_the_start_trains_a_lora_in_svd_form_and_says_so(
    toy, batches, train, target
) -> None:
    with pytest.warns(UserWarning, match="no rank will be pruned: this trains a LoRA in SVD form"):
        handle = attach(toy, CONFIG, target_rank=target)
    train(toy, _adam(handle), batches[:40])
    report = handle.report()
    assert report.phase == "no pruning" and report.active == 36 and report.allocations == 0 and report.finished


def test_an_adapter_that_nothing_uses_is_dropped_and_the_budget_is_still_exact(toy, batches, train) -> None:
    toy.blocks.append(nn.ModuleDict({"unused": nn.Linear(5, 5)}))
    toy.forward = lambda ids: toy.head(
        sum(b["down"](torch.tanh(b["up"](toy.embed(ids)))) for b in list(toy.blocks)[:3]).mean(1)
    )
    handle = attach(toy, CONFIG, orthogonality=0)  # the penalty gives every adapter a gradient
    train(toy, _adam(handle), batches[:40])
    assert handle.ranks()["blocks.3.unused"] == 0 and handle.report().active == 21


def test_a_second_optimiser_for_something_else_does_not_move_the_schedule(toy, batches, train) -> None:
    handle = attach(toy, CONFIG)
    train(toy, _adam(handle), batches[:3])
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert handle.step == 3


def test_an_optimiser_made_before_attach_is_noticed_at_its_first_step(toy, batches, train) -> None:
    optimizer = torch.optim.AdamW(toy.parameters(), lr=1e-3)
    with attach(toy, CONFIG), pytest.raises(ValueError, match="none of the adapters; make it after attach"):
        ids, labels = batches[0]
        nn.functional.cross_entropy(toy(ids), labels).backward()
        optimizer.step()


def test_half_of_the_adapters_in_an_optimiser_are_refused(toy, batches, train) -> None:
    with attach(toy, CONFIG) as handle:
        optimizer = torch.optim.SGD(handle.parameters()[:4], lr=0.1)
        with pytest.raises(ValueError, match="holds 4 of the 18 tensors"):
            train(toy, optimizer, batches[:1])


def test_stepping_after_zero_grad_is_an_error_and_not_a_silent_lora(toy, batches) -> None:
    for to_none in (True, False):
        with attach(toy, CONFIG) as handle:
            optimizer = _adam(handle)
            ids, labels = batches[0]
            nn.functional.cross_entropy(toy(ids), labels).backward()
            optimizer.zero_grad(set_to_none=to_none)
            with pytest.raises(RuntimeError, match="the order is backward, optimizer.step, zero_grad"):
                optimizer.step()


def test_the_schedule_can_be_moved_by_hand_for_a_foreign_optimiser_but_not_twice(toy, batches, train) -> None:
    with attach(toy, CONFIG, shrink=False) as handle:
        with pytest.raises(RuntimeError, match="no adapter has a gradient"):
            handle.after_step()
        for ids, labels in batches[:40]:
            nn.functional.cross_entropy(toy(ids), labels).backward()
            with torch.no_grad():
                for p in handle.parameters():
                    p -= 0.1 * p.grad
            handle.after_step()
            for p in handle.parameters():
                p.grad = None
        assert handle.report().active == 18
    with attach(toy, CONFIG) as handle:
        train(toy, _adam(handle), batches[:1])
        with pytest.raises(RuntimeError, match="runs by itself; remove this call"):
            handle.after_step()
        handle.finish()


def test_a_report_before_the_first_step_is_an_error(toy) -> None:
    with attach(toy, CONFIG) as handle, pytest.raises(RuntimeError, match="no optimiser has stepped"):
        handle.report()


def test_training_that_stops_early_warns_and_can_be_cut_to_the_budget(toy, batches, train) -> None:
    with pytest.warns(UserWarning, match="stopped after step 12 of 40, before the ranks were final"):
        with attach(toy, CONFIG) as handle:
            train(toy, _adam(handle), batches[:12])
            assert not handle.report().finished
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(toy, CONFIG) as handle:
            with pytest.raises(RuntimeError, match="no optimiser step was taken yet"):
                handle.finish()
            with pytest.raises(RuntimeError, match="before the ranks are final"):
                handle.shrink()
            train(toy, _adam(handle), batches[:12])
            handle.finish()
            assert handle.report().active == 18 and handle.report().finished


def test_training_on_beyond_the_schedule_keeps_the_final_ranks(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, shrink=False)
    train(toy, _adam(handle), batches[:45])
    assert handle.report().active == 18
    assert sum(int((a.values != 0).sum()) for a in handle.adapters) == 18


def test_the_number_of_steps_must_be_known_before_the_first(toy, batches, train) -> None:
    with attach(toy, init_rank=4, target_rank=2) as handle:
        with pytest.raises(ValueError, match="total_steps=None: give attach the number"):
            train(toy, _adam(handle), batches[:1])
        toy.zero_grad()


def test_training_with_merged_weights_is_refused(toy, batches, train) -> None:
    with attach(toy, CONFIG) as handle:
        optimizer = _adam(handle)
        ids, labels = batches[0]
        nn.functional.cross_entropy(toy(ids), labels).backward()
        handle.merge()
        with pytest.raises(RuntimeError, match="call unmerge"):
            optimizer.step()


def test_parameters_that_moved_are_taken_in_again(toy, batches, train) -> None:
    moved, plain = copy.deepcopy(toy), toy
    results = []
    for model in (plain, moved):
        torch.manual_seed(0)
        handle = attach(model, CONFIG)
        optimizer = _adam(handle)
        train(model, optimizer, batches[:20])
        if model is moved:
            for p in handle.parameters():
                p.data = p.data.clone()
        train(model, optimizer, batches[20:40])
        results.append(handle)
    assert torch.equal(results[0].keep, results[1].keep)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_cast_to_half_are_refused_with_the_remedy(toy) -> None:
    toy.half()
    handle = attach(toy, CONFIG)
    assert handle.adapters[0].left.dtype == torch.float32
    toy.half()
    for a in handle.adapters:
        a.left.grad, a.values.grad, a.right.grad = (torch.ones_like(p) for p in (a.left, a.values, a.right))
    with pytest.raises(TypeError, match="cast the model before attach"):
        handle.after_step()
    handle.detach()


def test_the_trace_keeps_every_allocation_and_survives_a_file(toy, batches, train, tmp_path) -> None:
    from zq_lib.adalora import RankTrace

    handle = attach(toy, CONFIG)
    train(toy, _adam(handle), batches[:40])
    trace = handle.trace
    assert trace.ranks().sum(1).tolist() == trace.budgets and trace.ranks()[-1].tolist() == list(
        handle.ranks().values()
    )
    for score, keep, threshold in zip(trace.scores, trace.keep, trace.thresholds, strict=True):
        assert score[keep].min() == threshold >= score[~keep].max()
    trace.save(tmp_path / "trace.npz")
    again = RankTrace.load(tmp_path / "trace.npz")
    assert again.names == trace.names and again.steps == trace.steps
    assert all((a == b).all() for a, b in zip(again.scores, trace.scores, strict=True))
    assert (tmp_path / "trace.npz").stat().st_size < 1_000_000

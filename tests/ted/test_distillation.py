"""The plain loop: a student that gets better, accumulation, caches, and a delivery without a trace."""

from __future__ import annotations

import copy

import pytest
import torch

from zq_lib.ted import StateCache, TedConfig, TedLoss, distil, fit, see, task_filters

CONFIG = TedConfig(filter_dim=6, dropout=0.0, task_weight=0.1, kd_weight=2.0)


def _case(make, batch_of, arch="bert", kind="sequence", config=CONFIG, **options):
    teacher = make(arch, depth=4, width=16, kind=kind, **options)
    student = make(arch, depth=2, width=8, kind=kind, **options)
    batches = [batch_of(kind, rows=8, seed=i, first=8 * i) for i in range(4)]
    torch.manual_seed(3)
    pair = task_filters(teacher, student, config)
    for filters in pair:
        list(fit(filters, batches))
    return teacher, student, TedLoss(teacher, *pair, config), batches


def _optimizer(student, ted) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*student.parameters(), *ted.parameters()], lr=1e-2)


@pytest.mark.parametrize(("arch", "kind"), [("bert", "sequence"), ("bert", "span"), ("llama", "language")])
def test_the_student_learns_and_is_delivered_without_a_trace(arch, kind, make, batch_of) -> None:
    teacher, student, ted, batches = _case(make, batch_of, arch, kind)
    of_teacher = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = {k: v.shape for k, v in student.state_dict().items()}
    steps = list(distil(student, ted, batches, _optimizer(student, ted), epochs=8))
    assert [s.step for s in steps] == list(range(1, 33)) and not student.training
    for name in ("total", "kd", "layer"):
        first, last = (torch.stack([getattr(s.terms, name) for s in part]).mean() for part in (steps[:4], steps[-4:]))
        assert last < first, name
    assert all(s.student_norm > 0 and s.filter_norm > 0 for s in steps) and steps[0].terms.errors.shape == (2,)
    assert {k: v.shape for k, v in student.state_dict().items()} == before
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules())
    assert all(torch.equal(v, of_teacher[k]) for k, v in teacher.state_dict().items())
    output, seen = (
        student(**{k: v for k, v in batches[0].items() if k != "example"}),
        see(student, batches[0], ted.layers),
    )
    plain, inside = (output.start_logits, seen.logits[..., 0]) if kind == "span" else (output.logits, seen.logits)
    torch.testing.assert_close(plain, inside, rtol=0, atol=1e-6)


def test_the_filters_train_on_unless_they_are_frozen(make, batch_of) -> None:
    for train in (True, False):
        _, student, ted, batches = _case(make, batch_of, config=TedConfig(filter_dim=6, train_filters=train))
        before = [p.clone() for p in ted.parameters()]
        steps = list(distil(student, ted, batches, _optimizer(student, ted)))
        moved = [not torch.equal(a, b) for a, b in zip(before, ted.parameters(), strict=True)]
        assert all(moved) if train else not any(moved)
        assert (steps[0].filter_norm > 0) == train


def test_accumulated_batches_are_one_large_batch_and_what_is_left_counts_in_full(make, batch_of) -> None:
    teacher, student, ted, _ = _case(
        make, batch_of, dtype=torch.float64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    whole = batch_of(rows=12)
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])  # equal rows, so that means of means are means
    thirds = [{k: v[a : a + 4] for k, v in whole.items()} for a in (0, 4, 8)]
    other, ted2 = copy.deepcopy(student), copy.deepcopy(ted)
    ted2._teacher = ted._teacher
    optimizers = [
        torch.optim.SGD([*s.parameters(), *t.parameters()], lr=0.1) for s, t in ((student, ted), (other, ted2))
    ]
    one = list(distil(student, ted, [whole], optimizers[0]))
    three = list(distil(other, ted2, thirds, optimizers[1], accumulate=3))
    assert len(one) == len(three) == 1
    torch.testing.assert_close(one[0].terms.total, three[0].terms.total)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    left = list(distil(other, ted2, thirds, optimizers[1], accumulate=2))
    assert len(left) == 2 and left[1].student_norm > 0.3 * left[0].student_norm


def test_cached_states_of_the_teacher_train_the_same_student(make, batch_of) -> None:
    teacher, student, ted, batches = _case(make, batch_of)
    cache = StateCache.of(teacher, batches, ted.teacher_layers)
    students, losses = [copy.deepcopy(student) for _ in range(2)], [ted, copy.deepcopy(ted)]
    losses[1]._teacher = (None, ted._teacher[1])
    found = []
    for s, t, c in zip(students, losses, (None, cache), strict=True):
        torch.manual_seed(9)
        found.append([float(x.terms.total) for x in distil(s, t, batches, _optimizer(s, t), cache=c)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_optimiser_without_the_filters_is_refused(make, batch_of) -> None:
    _, student, ted, batches = _case(make, batch_of)
    with pytest.raises(ValueError, match="the optimiser lacks 4 tensors of the student's filters; give it"):
        list(distil(student, ted, batches, torch.optim.SGD(student.parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="batches is empty, and the student learned nothing"):
        list(distil(student, ted, [], _optimizer(student, ted)))

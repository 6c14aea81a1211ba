"""The second stage: the loss against its formula, padding, layer maps, and a student that gets better."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from zq_lib.losparse import DistillationLoss, attach, reference


def _output(seed: int, layers: int = 4, classes: tuple[int, ...] = (3, 5)) -> SimpleNamespace:
    source = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(3, 6, 8, generator=source) for _ in range(layers))
    return SimpleNamespace(logits=torch.randn(*classes, generator=source), hidden_states=states)


@pytest.mark.parametrize("classes", [(3, 5), (3, 6, 5)])
def test_without_padding_it_is_the_formula(classes: tuple[int, ...]) -> None:
    student, teacher = _output(0, classes=classes), _output(1, classes=classes)
    parts = (student.logits, teacher.logits, student.hidden_states, teacher.hidden_states)
    for out, layer in ((1.0, 0.0), (0.0, 15.0), (0.3, 0.9)):
        loss = DistillationLoss(out, layer, temperature=3.0)(student, teacher)
        torch.testing.assert_close(loss, reference.distillation(*parts, out, layer, 3.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_map", ["fixed", "nearest"])
def test_padding_counts_nowhere(layer_map: str) -> None:
    student, teacher = _output(0, classes=(3, 6, 5)), _output(1, classes=(3, 6, 5))
    loss = DistillationLoss(0.5, 2.0, layer_map=layer_map, width=8)
    mask = torch.ones(3, 6)
    mask[1, 4:] = mask[2, 1:] = 0
    want = loss(student, teacher, mask)
    for state in student.hidden_states:
        state[1, 4:] = state[2, 1:] = 100.0
    student.logits[1, 4:] = 50.0 * torch.arange(5)
    torch.testing.assert_close(loss(student, teacher, mask), want)
    assert not torch.allclose(loss(student, teacher), want)


@pytest.mark.parametrize("layers", [2, 13, 25])
def test_any_number_of_layers_will_do(layers: int) -> None:
    student = _output(0, layers)
    assert DistillationLoss(0, 15)(student, student) == 0
    assert DistillationLoss(0, 15)(student, _output(1, layers)) > 0


def test_the_nearest_layer_is_found_whatever_the_order_and_the_map_learns() -> None:
    teacher = _output(0)
    student = SimpleNamespace(logits=teacher.logits, hidden_states=tuple(reversed(teacher.hidden_states)))
    loss = DistillationLoss(0, 0.9, layer_map="nearest", layers=(0, 2), width=8)
    assert loss(student, teacher) < 1e-10 < DistillationLoss(0, 0.9, layers=(0, 2))(student, teacher)
    short = SimpleNamespace(logits=teacher.logits, hidden_states=tuple(h.clone() for h in teacher.hidden_states[1:]))
    found = loss(short, teacher)
    found.backward()
    assert found > 0 and loss.map.weight.grad.any() and len(list(loss.parameters())) == 1


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = _output(0), _output(1)
    for t in (*student.hidden_states, *teacher.hidden_states, student.logits, teacher.logits):
        t.requires_grad_()
    DistillationLoss(1.0, 1.0)(student, teacher).backward()
    assert teacher.logits.grad is None and all(h.grad is None for h in teacher.hidden_states)
    assert student.logits.grad.any() and all(h.grad.any() for h in student.hidden_states)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_map": "learned"}, "layer_map='learned' is not known; choose one of fixed, nearest"),
        ({"alpha_out": 0, "alpha_layer": 0}, "alpha_out=0 and alpha_layer=0 must be at least 0 and not both 0"),
        ({"alpha_out": -1}, "alpha_out=-1"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"layer_map": "nearest"}, "give their width, config.hidden_size"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**settings)


def test_outputs_that_do_not_fit_are_refused() -> None:
    loss = DistillationLoss()
    with pytest.raises(ValueError, match="call the model with output_hidden_states=True"):
        loss(SimpleNamespace(logits=torch.ones(3, 5), hidden_states=None), _output(0))
    with pytest.raises(ValueError, match="the teacher has 5 states and the student 4"):
        loss(_output(0, 4), _output(0, 5))
    with pytest.raises(ValueError, match=r"layers=\(9,\)"):
        DistillationLoss(layers=(9,))(_output(0), _output(1))
    narrow = _output(0)
    narrow.hidden_states = tuple(h[..., :4] for h in narrow.hidden_states)
    with pytest.raises(ValueError, match="a teacher of the same width"):
        loss(narrow, _output(1))


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_compressed_student_comes_nearer_to_its_teacher(stage: str) -> None:
    """While rows are dropped, and after they are cut."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    teacher = BertForSequenceClassification(config).eval()
    student = copy.deepcopy(teacher)
    handle = attach(student, low_rank=0.1, remaining=0.3, total_steps=40, warmup=2, final=20, interval=2)
    ids = torch.randint(50, (8, 7))
    with torch.no_grad():
        want = teacher(ids, output_hidden_states=True)
    if stage == "two":
        handle.shrink({n: m.sparse.detach().square().mean(1) for n, m in handle.layers.items()})
    distil, optimizer, seen = DistillationLoss(1.0, 1.0), torch.optim.AdamW(student.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = distil(student(ids, output_hidden_states=True), want)
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.shrunk and seen[-1] < 0.5 * max(seen)
    assert isinstance(student.classifier, nn.Linear)
    handle.finish()

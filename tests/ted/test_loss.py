"""The second stage's loss: against the reference, its limits, padding, and everything that can be wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from zq_lib.ted import (
    Seen,
    StateCache,
    TaskFilters,
    TedConfig,
    TedLoss,
    baseline_filters,
    check_tokenizers,
    fit,
    layerwise,
    projected,
    reference,
    see,
    task_filters,
)

from .conftest import DECODERS, ENCODERS


def _ready(teacher, student, config, batches) -> TedLoss:
    torch.manual_seed(2)
    pair = task_filters(teacher, student, config)
    for filters in pair:
        list(fit(filters, batches))
    return TedLoss(teacher, *pair, config)


def _plain(ted: TedLoss, student: Seen, teacher: Seen, batch, config: TedConfig, filters) -> torch.Tensor:
    """L_II of a classifier by the reference."""
    mask = batch["attention_mask"]
    own = [f(h) for f, h in zip(ted.filters, student.states, strict=True)]
    other = filters.states(teacher.states)
    scale = filters.variance if config.scale == "variance" else torch.ones(len(own))
    errors = [reference.layer_error(a, b, mask) / v for a, b, v in zip(own, other, scale, strict=True)]
    kl = reference.divergence(student.logits, teacher.logits, config.temperature)
    return reference.stage_two(student.loss, kl, errors, config.kd_weight, config.layer_weight)


@pytest.mark.parametrize("scale", ["variance", "none"])
@pytest.mark.parametrize("filter_", ["linear", "mlp"])
def test_value_and_all_gradients_are_the_references(scale: str, filter_: str, make, batch_of) -> None:
    config = TedConfig(filter_dim=6, filter=filter_, scale=scale, kd_weight=5.0, layer_weight=3.0, dropout=0.0)
    teacher, student = make(depth=6, width=16, dtype=torch.float64), make(depth=3, width=8, dtype=torch.float64)
    batch = batch_of()
    pair = task_filters(teacher, student, config)
    for filters in pair:
        list(fit(filters, [batch]))
    ted = TedLoss(teacher, *pair, config)
    parameters = [*student.parameters(), *ted.parameters()]
    found = ted(see(student, batch, ted.layers), batch)
    want = _plain(ted, see(student, batch, ted.layers), see(teacher, batch, ted.teacher_layers), batch, config, pair[0])
    assert abs(float((found.total - want).detach())) <= 1e-6 * abs(float(want.detach())), "the scale is kept in fp32"
    exact = want if scale == "none" else None
    a, b = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (found.total, want))
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(
                x, y, rtol=1e-10 if exact is not None else 1e-6, atol=1e-10 if exact is not None else 1e-7
            )
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
def test_it_works_for_every_architecture_with_other_widths_and_depths(arch: str, make, batch_of) -> None:
    config = TedConfig(filter_dim=6)
    teacher, student = make(arch, depth=5, width=16), make(arch, depth=2, width=8)
    batches = [batch_of(seed=i, side="left" if arch in DECODERS else "right") for i in range(2)]
    ted = _ready(teacher, student, config, batches)
    assert ted.teacher_layers == (3, 5) and ted.layers == (1, 2)
    terms = ted(see(student, batches[0], ted.layers), batches[0])
    terms.total.backward()
    assert terms.errors.shape == (2,) and terms.kd > 0 and terms.layer > 0
    assert float(terms.total.detach()) == pytest.approx(float(terms.task + terms.kd + terms.layer), rel=1e-5)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ted.parameters())
    moved = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(".0." in n for n in moved) and any(".1." in n for n in moved)


@pytest.mark.parametrize(("arch", "kind"), [("bert", "span"), ("bert", "token"), ("llama", "language")])
@pytest.mark.parametrize("extra", [9, 3])
def test_padding_a_batch_changes_neither_loss_nor_gradients(arch, kind, extra, make, batch_of, pad) -> None:
    teacher, student = make(arch, depth=4, width=16, kind=kind), make(arch, depth=2, width=8, kind=kind)
    batch = batch_of(kind)
    ted = _ready(teacher, student, TedConfig(filter_dim=6), [batch])
    totals, grads = [], []
    for b in (batch, pad(batch, extra)):
        total = ted(see(student, b, ted.layers), b).total
        totals.append(float(total.detach()))
        grads.append(torch.autograd.grad(total, [*student.parameters(), *ted.parameters()], allow_unused=True))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    for a, b in zip(*grads, strict=True):
        assert a is None or float((a - b).abs().max()) <= 1e-6


def test_without_its_layers_it_is_plain_distillation_and_without_both_fine_tuning(make, batch_of) -> None:
    teacher, student = make(width=16, dtype=torch.float64), make(depth=2, width=8, dtype=torch.float64)
    batch = batch_of()
    kd = TedLoss(teacher, config=TedConfig(layer_weight=0, kd_weight=3.0))
    assert not list(kd.parameters()) and kd.layers == ()
    seen = see(student, batch, ())
    with torch.no_grad():
        want = 3 * reference.divergence(
            seen.logits, teacher(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits, 2
        )
    assert float(kd(seen, batch).total.detach()) == pytest.approx(float((seen.loss + want).detach()), abs=1e-12)
    tuned = TedLoss(None, config=TedConfig(layer_weight=0, kd_weight=0), task="classification")
    assert torch.equal(tuned(see(student, batch, ()), batch).total, seen.loss)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(make, batch_of) -> None:
    teacher, batch = make(dtype=torch.float64), batch_of()
    config = TedConfig(task_weight=0, filter_dim=6)
    filters = TaskFilters(teacher, config)
    list(fit(filters, [batch]))
    student = copy.deepcopy(teacher)
    ted = TedLoss(teacher, filters, filters, config)
    terms = ted(see(student, batch, ted.layers), batch)
    terms.total.backward()
    assert abs(float(terms.kd)) <= 1e-12 and abs(float(terms.layer)) <= 1e-12
    assert all(p.grad is None or float(p.grad.abs().max()) <= 1e-12 for p in (*student.parameters(), *ted.parameters()))


def test_layerwise_distillation_matches_the_raw_states_of_the_teacher(make, batch_of) -> None:
    teacher, student, batch = (
        make(width=16, dtype=torch.float64),
        make(depth=2, width=8, dtype=torch.float64),
        batch_of(),
    )
    config = TedConfig(scale="none", kd_weight=0, task_weight=0)
    ted = layerwise(teacher, student, [batch], config)
    seen, target = see(student, batch, ted.layers), see(teacher, batch, ted.teacher_layers)
    mask = batch["attention_mask"]
    want = [
        reference.layer_error(reference.filter_linear(h, f.outer.weight, f.outer.bias), t, mask)
        for f, h, t in zip(ted.filters, seen.states, target.states, strict=True)
    ]
    assert abs(float((ted(seen, batch).total - torch.stack(want).mean()).detach())) <= 1e-12


@pytest.mark.parametrize("kind", ["random", "pca"])
def test_projections_are_baselines_of_the_same_kind(kind: str, make, batch_of) -> None:
    teacher, student, batches = make(width=16), make(depth=2, width=8), [batch_of(rows=16, seed=i) for i in range(3)]
    config = TedConfig(filter_dim=4)
    cache = StateCache.of(teacher, [b | {"example": b["example"] + 16 * i} for i, b in enumerate(batches)], (2, 4))
    ted = projected(kind, teacher, student, batches, config)
    assert ted.filters[0].outer.weight.shape == (4, 8) and bool((ted.scale > 0).all()) and len(cache) == 48
    terms = ted(see(student, batches[0], ted.layers), batches[0])
    terms.total.backward()
    assert terms.layer > 0 and ted.filters[0].outer.weight.grad.any()


def test_principal_components_keep_the_most_variance_and_an_identity_keeps_all(make, batch_of) -> None:
    teacher, batches = make(width=16), [batch_of(rows=16, seed=i) for i in range(3)]
    rows = torch.cat([see(teacher, b, (4,)).states[0][b["attention_mask"].bool()] for b in batches]).double()
    values = torch.linalg.eigvalsh(torch.cov(rows.T.detach(), correction=0)).flip(0)
    pca = baseline_filters("pca", teacher, batches, TedConfig(), (4,), 4)
    z = pca.filters[0](rows.float())
    torch.testing.assert_close(z.double().var(0, correction=0), values[:4], rtol=1e-4, atol=1e-5)
    assert float(z.detach().mean(0).abs().max()) < 1e-4
    identity = baseline_filters("identity", teacher, batches, TedConfig(), (4,), 16)
    assert torch.equal(identity.filters[0](rows), rows)
    for kind, dim in (("identity", 4), ("pca", 17)):
        with pytest.raises(ValueError, match=f"dim={dim} does not fit '{kind}' filters of states of width 16; use 16"):
            baseline_filters(kind, teacher, batches, TedConfig(), (4,), dim)
    with pytest.raises(ValueError, match="kind='ica' is not known; choose one of identity, random, pca"):
        baseline_filters("ica", teacher, batches, TedConfig(), (4,), 4)


def test_a_head_with_one_output_distils_its_value(make, batch_of) -> None:
    teacher, student = make(width=16, num_labels=1), make(depth=2, width=8, num_labels=1)
    batch = batch_of() | {"labels": torch.randn(4)}
    terms = TedLoss(teacher, config=TedConfig(layer_weight=0))(see(student, batch, ()), batch)
    want = F.mse_loss(see(student, batch, ()).logits, see(teacher, batch, ()).logits)
    assert float(terms.kd) == pytest.approx(float(want.detach()), rel=1e-5) and terms.kd > 0


@pytest.mark.parametrize("kd", ["reverse_kl", "jsd", "mse"])
def test_the_outputs_distance_can_be_another(kd: str, make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    terms = TedLoss(teacher, config=TedConfig(layer_weight=0, kd=kd))(see(student, batch, ()), batch)
    assert terms.kd > 0 and math.isfinite(float(terms.kd))


def test_a_language_model_learns_at_positions_with_labels_and_a_span_at_tokens(make, batch_of) -> None:
    teacher, student = make("llama", kind="language"), make("llama", depth=2, width=8, kind="language")
    batch = batch_of("language")
    batch["labels"][:, :4] = -100
    terms = TedLoss(teacher, config=TedConfig(layer_weight=0))(see(student, batch, ()), batch)
    keep = F.pad((batch["labels"] != -100)[:, 1:], (0, 1)) & batch["attention_mask"].bool()
    s, t = (see(m, batch, ()).logits[keep] for m in (student, teacher))
    assert float(terms.kd) == pytest.approx(float(reference.divergence(s, t, 2.0).detach()), rel=1e-5)
    teacher, student, batch = make(kind="span"), make(depth=2, width=8, kind="span"), batch_of("span")
    terms = TedLoss(teacher, config=TedConfig(layer_weight=0))(see(student, batch, ()), batch)
    rows = [
        reference.divergence(*(see(m, batch, ()).logits[b : b + 1, :n, part] for m in (student, teacher)), 2.0)
        for b, n in enumerate(batch["attention_mask"].sum(1)) for part in (0, 1)
    ]  # fmt: skip
    assert float(terms.kd) == pytest.approx(float(torch.stack(rows).mean().detach()), rel=1e-5)


def test_matching_pooled_positions_alone_sees_nothing_else(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    config = TedConfig(filter_dim=6, positions="pooled", kd_weight=0, task_weight=0)
    ted = _ready(teacher, student, config, [batch])
    seen = see(student, batch, ted.layers)
    want = float(ted(seen, batch).total.detach())
    for h in seen.states:
        h.data[:, 1:] = 100.0
    assert float(ted(seen, batch).total.detach()) == want


def test_cached_states_of_the_teacher_give_the_same_loss(make, batch_of, pad) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    ted = _ready(teacher, student, TedConfig(filter_dim=6), [batch])
    cache = StateCache.of(teacher, [batch], ted.teacher_layers)
    other = pad(batch, 3)
    live = ted(see(student, other, ted.layers), other)
    kept = ted(see(student, other, ted.layers), other, cache.seen(other))
    torch.testing.assert_close(live.total, kept.total, rtol=1e-5, atol=1e-6)


def test_frozen_filters_get_no_gradient_and_the_given_ones_are_not_touched(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    pair = task_filters(teacher, student, TedConfig(filter_dim=6, train_filters=False))
    for filters in pair:
        list(fit(filters, [batch]))
    ted = TedLoss(teacher, *pair)
    ted(see(student, batch, ted.layers), batch).total.backward()
    assert not [p for p in ted.parameters() if p.requires_grad] and all(p.requires_grad for p in pair[1].parameters())
    assert all(a is not b for a, b in zip(ted.parameters(), pair[1].parameters(), strict=False))


def _fitted(model, config, layers, batch) -> TaskFilters:
    filters = TaskFilters(model, config, layers)
    list(fit(filters, [batch]))
    return filters


def test_filters_that_do_not_fit_are_refused(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    six, five = TedConfig(filter_dim=6), TedConfig(filter_dim=5)
    of_teacher, of_student = _fitted(teacher, six, (2, 4), batch), _fitted(student, six, (1, 2), batch)
    for pair, message in (
        (
            (_fitted(teacher, six, (4,), batch), of_student),
            "the teacher has 1 filters and the student 2; make both with",
        ),
        ((_fitted(teacher, five, (2, 4), batch), of_student), "the teacher's filters have width 5 and the student's 6"),
        ((TaskFilters(teacher, six, (2, 4)), of_student), "the teacher's filters are untrained; run fit"),
        ((of_teacher, TaskFilters(student, six, (1, 2))), "the student's filters are untrained; run fit"),
        ((None, None), "layer_weight is above 0 and needs filters of both models"),
    ):
        with pytest.raises(ValueError, match=message):
            TedLoss(teacher, *pair, six)
    with pytest.raises(ValueError, match="the variance of the teacher's filtered states is not known"):
        TedLoss(teacher, TaskFilters(teacher, six, (2, 4)), of_student, six, allow_untrained=True)


def test_a_teacher_that_is_not_fit_to_teach_is_refused(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    ted = _ready(teacher, student, TedConfig(filter_dim=6), [batch])
    teacher.train()
    with pytest.raises(
        ValueError, match="the teacher is in train mode, where dropout would be copied too; call teacher.eval"
    ):
        ted(see(student, batch, ted.layers), batch)
    teacher.eval()
    with torch.no_grad():
        teacher.bert.encoder.layer[3].output.dense.bias.fill_(torch.nan)
    with pytest.raises(
        ValueError, match="the teacher's states of pair 2 hold NaN; check its weights and its precision"
    ):
        ted(see(student, batch, ted.layers), batch)
    with pytest.raises(ValueError, match="the teacher's logits hold NaN"):
        TedLoss(teacher, config=TedConfig(layer_weight=0))(see(student, batch, ()), batch)
    with pytest.raises(ValueError, match="this loss has no teacher; give what it shows of the batch"):
        TedLoss(None, config=TedConfig(layer_weight=0), task="classification")(see(student, batch, ()), batch)
    with pytest.raises(ValueError, match="teacher=None and no filters: give task"):
        TedLoss(None, config=TedConfig(layer_weight=0))


def test_models_that_read_or_say_something_else_are_refused(make, batch_of) -> None:
    batch, config = batch_of(), TedConfig(filter_dim=6)
    teacher, other = make(width=16), make(depth=2, width=8, vocab_size=61)
    pair = task_filters(teacher, other, config)
    for filters in pair:
        list(fit(filters, [batch]))
    with pytest.raises(
        ValueError, match="student's vocabulary has 61 words and the teacher's 60, so they read one batch"
    ):
        TedLoss(teacher, *pair, config)
    five = make(depth=2, width=8, num_labels=5)
    with pytest.raises(ValueError, match="the student has 5 outputs and the teacher 3; give both the same classes"):
        TedLoss(teacher, config=TedConfig(layer_weight=0))(see(five, batch, ()), batch)
    same = Words({"a": 0, "b": 1})
    assert TedLoss(teacher, *pair, config, tokenizers=(same, same)).layers == (1, 2)
    with pytest.raises(ValueError, match="the tokenizers differ: 'b' is 1 for the student and 2 for the teacher"):
        TedLoss(teacher, *pair, config, tokenizers=(same, Words({"a": 0, "b": 2})))
    with pytest.raises(ValueError, match="the tokenizers differ: 'c' is None for the student and 2 for the teacher"):
        check_tokenizers(same, Words({"a": 0, "b": 1, "c": 2}))


class Words:
    def __init__(self, words: dict[str, int]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_a_batch_that_cannot_be_learnt_from_is_refused(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    ted = _ready(teacher, student, TedConfig(filter_dim=6), [batch])
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(ValueError, match="the student gave no loss; add labels to the batch, or set task_weight=0"):
        ted(see(student, plain, ted.layers), plain)
    empty = batch | {"attention_mask": batch["attention_mask"].clone()}
    empty["attention_mask"][3] = 0
    with pytest.raises(ValueError, match="row 3 of attention_mask is all padding"):
        ted(see(student, empty, ted.layers), empty)
    seen = see(student, batch, ())
    ruled_out = seen.logits.detach().clone()
    ruled_out[0, 1] = -math.inf
    with pytest.raises(ValueError, match=r"the divergence is infinite: the student rules out \(-inf\) a class"):
        TedLoss(teacher, config=TedConfig(layer_weight=0, task_weight=0))(Seen((), ruled_out), batch)
    with pytest.raises(ValueError, match="the student shows no logits; give a model with a head"):
        TedLoss(teacher, config=TedConfig(layer_weight=0, task_weight=0))(
            Seen(seen.states or (ruled_out,), None), batch
        )


def test_a_student_that_overflows_is_left_to_the_trainer(make, batch_of) -> None:
    teacher, student, batch = make(width=16), make(depth=2, width=8), batch_of()
    seen = see(student, batch, ())
    broken = Seen((), seen.logits * torch.nan, seen.loss)
    assert math.isnan(float(TedLoss(teacher, config=TedConfig(layer_weight=0))(broken, batch).total.detach()))

"""Filters and heads: every task and architecture, the language model's own head, reports, and saved files."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from zq_lib.core.models import tiny
from zq_lib.ted import TaskFilters, TedConfig, fit, load_filters, reference, save_filters, see, task_filters
from zq_lib.ted.heads import final_norm, head_loss, pool_of, task_of

from .conftest import DECODERS, ENCODERS


@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("filter_", ["linear", "mlp"])
def test_a_classifiers_filters_work_for_every_architecture(arch: str, filter_: str, make, batch_of) -> None:
    model, batch = make(arch), batch_of()
    filters = TaskFilters(model, TedConfig(filter_dim=6, filter=filter_), layers=(2, 4)).eval()
    assert filters.task == "classification" and filters.pool == ("last" if arch in DECODERS else "first")
    states = see(model, batch, filters.layers).states
    z = filters.states(states, batch["attention_mask"])
    assert [tuple(x.shape) for x in z] == [(4, 9, 6)] * 2 and not z[0][batch["attention_mask"] == 0].any()
    assert filters.logits(0, states[0], batch["attention_mask"].bool()).shape == (4, 3)
    assert bool(filters.loss(1, states[1], batch).isfinite())


@pytest.mark.parametrize(("kind", "task", "classes"), [("span", "span", 2), ("token", "token", 3)])
def test_every_token_has_a_head_where_the_task_is_per_token(kind, task, classes, make, batch_of) -> None:
    model, batch = make(kind=kind), batch_of(kind)
    filters = TaskFilters(model, TedConfig(filter_dim=6)).eval()
    assert filters.task == task and filters.pool == "token" and len(filters.layers) == 4
    states = see(model, batch, filters.layers).states
    logits = filters.logits(0, states[0], batch["attention_mask"].bool())
    assert logits.shape == (4, 9, classes)
    want = filters.loss(0, states[0], batch)
    states[0][batch["attention_mask"] == 0] = 1e4
    torch.testing.assert_close(filters.loss(0, states[0], batch), want)


def test_the_losses_are_the_references(make, batch_of) -> None:
    model, batch = make(kind="span"), batch_of("span")
    logits = torch.randn(4, 9, 2)
    want = reference.span_loss(logits, batch["start_positions"], batch["end_positions"])
    torch.testing.assert_close(head_loss("span", logits, batch), want)
    model, batch = make("llama", kind="language"), batch_of("language")
    filters = TaskFilters(model)
    hidden = see(model, batch, (2,)).states[0]
    logits = filters.heads[1](filters.filters[1](hidden))
    torch.testing.assert_close(filters.loss(1, hidden, batch), reference.next_token_loss(logits, batch["labels"]))


def test_regression_and_many_labels_are_tasks_of_their_own(make, batch_of) -> None:
    one = make(num_labels=1)
    batch = batch_of() | {"labels": torch.tensor([0.5, 1.0, -1.0, 0.0])}
    filters = TaskFilters(one, TedConfig(filter_dim=4)).eval()
    assert filters.task == "regression"
    logits = filters.logits(0, see(one, batch, (1,)).states[0], batch["attention_mask"].bool())
    want = (logits[:, 0] - batch["labels"]).square().mean()
    torch.testing.assert_close(filters.loss(0, see(one, batch, (1,)).states[0], batch), want)
    assert [row.accuracy for row in filters.report([batch])] == [None] * 4
    many = make(problem_type="multi_label_classification")
    filters = TaskFilters(many, TedConfig(filter_dim=4)).eval()
    batch = batch_of() | {"labels": torch.tensor([[0.0, 1.0, 1.0]] * 4)}
    assert filters.task == "multi_label" and 0 <= filters.report([batch])[0].accuracy <= 1


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma", "gemma3"])
def test_a_language_models_filter_starts_as_the_logit_lens_and_ends_in_its_own_logits(arch: str, batch_of) -> None:
    model = tiny(arch, **({"final_logit_softcapping": 5.0} if arch == "gemma3" else {}))
    filters = TaskFilters(model)
    depth = filters.layers[-1]
    batch = {"input_ids": torch.arange(3, 23).view(2, 10)}
    with torch.no_grad():
        seen = see(model, batch, (depth,))
        torch.testing.assert_close(
            filters.heads[-1](filters.filters[-1](seen.states[0])), seen.logits, rtol=1e-4, atol=1e-5
        )


def test_the_models_own_head_stays_frozen_and_a_narrow_filter_gets_a_bridge(make, batch_of) -> None:
    model, batch = make("llama", kind="language"), batch_of("language")
    filters = TaskFilters(model, TedConfig(filter_dim=6), layers=(2,))
    filters.loss(0, see(model, batch, (2,)).states[0].detach(), batch).backward()
    assert all(p.grad is None for p in model.parameters())
    assert filters.heads[0].bridge.weight.shape == (16, 6) and filters.heads[0].bridge.weight.grad.any()
    own = sum(p.numel() for p in filters.parameters())
    assert own == 6 * 16 + 6 + 16 * 6, "neither the model nor its head are parameters of the filters"


def test_a_sample_of_rows_estimates_the_language_models_loss(make, batch_of) -> None:
    model, batch = make("gpt2", kind="language"), batch_of("language", rows=16)
    filters, hidden = TaskFilters(model), see(model, batch, (4,)).states[0].detach()
    whole = float(filters.loss(3, hidden, batch).detach())
    torch.manual_seed(0)
    some = torch.stack([filters.loss(3, hidden, batch, sample=20).detach() for _ in range(60)])
    assert abs(float(some.mean()) - whole) < 4 * float(some.std()) / 60**0.5 and float(some.std()) > 0


def test_reports_count_the_right_answers(make, batch_of) -> None:
    for kind, arch in (("sequence", "bert"), ("token", "bert"), ("language", "llama"), ("span", "bert")):
        model, batches = make(arch, kind=kind), [batch_of(kind), batch_of(kind, rows=3, seed=1)]
        filters = TaskFilters(model, TedConfig(dropout=0.0))
        rows = filters.report(batches)
        assert [r.layer for r in rows] == [1, 2, 3, 4] and all(0 <= r.accuracy <= 1 for r in rows)
        assert all(math.isfinite(r.loss) for r in rows) and filters.training
    with pytest.raises(ValueError, match="batches is empty, and a report needs at least one"):
        filters.report([])


def test_what_a_report_says_is_computed_over_examples_not_over_batches(make, batch_of) -> None:
    model = make()
    filters = TaskFilters(model, TedConfig(filter_dim=6)).eval()
    whole = batch_of(rows=7)
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 5), (5, 7))]
    for a, b in zip(filters.report([whole]), filters.report(parts), strict=True):
        assert a.accuracy == b.accuracy and a.loss == pytest.approx(b.loss, rel=1e-5)


def test_both_models_filters_have_the_wider_models_width_by_default(make) -> None:
    teacher, student = task_filters(make(depth=6, width=16), make("distilbert", depth=3, width=8), TedConfig())
    assert (teacher.layers, student.layers, teacher.dim, student.dim) == ((2, 4, 6), (1, 2, 3), 16, 16)
    assert student.filters[0].outer.weight.shape == (16, 8)
    with pytest.raises(ValueError, match="the teacher's task is 'span' and the student's 'classification'"):
        task_filters(make(kind="span"), make(), TedConfig())


def test_the_variance_is_the_references_over_real_tokens(make, batch_of) -> None:
    model = make()
    filters = TaskFilters(model, TedConfig(filter_dim=6), layers=(2, 4))
    assert bool(filters.variance.isnan().all())
    batch = batch_of(rows=8)
    seen = see(model, batch, filters.layers)
    filters.measure(seen.states, batch["attention_mask"].bool())
    filters.measure(seen.states, batch["attention_mask"].bool())
    want = [reference.variance(z.detach().double(), batch["attention_mask"]) for z in filters.states(seen.states)]
    torch.testing.assert_close(filters.variance, torch.stack(want), rtol=1e-5, atol=0)


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from zq_lib.ted import fit, load_filters
model, batches, want = torch.load(sys.argv[1], weights_only=False)
filters = load_filters(model, sys.argv[2])
assert filters.origin == "trained" and not torch.equal(filters.variance, filters.variance * 0)
torch.manual_seed(5)
found = [step.losses for step in fit(filters, batches)]
print(all(torch.equal(a, b) for a, b in zip(found, want[0], strict=True)),
      all(torch.equal(a, b) for a, b in zip(filters.state_dict().values(), want[1], strict=True)))
"""


def test_filters_loaded_in_a_new_process_go_on_bit_for_bit(make, batch_of, tmp_path) -> None:
    model, batches = make(), [batch_of(seed=i) for i in range(3)]
    filters = TaskFilters(model, TedConfig(filter_dim=6), layers=(2, 4))
    list(fit(filters, batches))
    save_filters(filters, tmp_path / "filters")
    torch.manual_seed(5)
    losses = [step.losses for step in fit(filters, batches)]
    torch.save((model, batches, (losses, list(filters.state_dict().values()))), tmp_path / "case.pt")
    (tmp_path / "again.py").write_text(SCRIPT.format(tests="."))
    command = [sys.executable, str(tmp_path / "again.py"), str(tmp_path / "case.pt"), str(tmp_path / "filters")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "True True", done.stderr[-2000:]


def test_files_of_another_model_are_refused(make, tmp_path) -> None:
    save_filters(TaskFilters(make()), tmp_path)
    with pytest.raises(ValueError, match="belong to a model of 4 blocks and width 16, and this one has 3 and 16; give"):
        load_filters(make(depth=3), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no filters; it needs ted_filters.json"):
        load_filters(make(), tmp_path / "nowhere")


def test_bad_input_is_one_clear_sentence(make, batch_of) -> None:
    model = make()
    with pytest.raises(ValueError, match="layer 5 of the model is out of range: it has 4 blocks"):
        TaskFilters(model, layers=(1, 5))
    with pytest.raises(
        ValueError, match="pool='token' does not fit the task 'classification'; use first, mean or last"
    ):
        pool_of(model, "classification", "token")
    with pytest.raises(ValueError, match="pool='mean' does not fit the task 'span'; use token, or auto"):
        pool_of(model, "span", "mean")
    with pytest.raises(ValueError, match="task='summary' is not known; choose one of classification"):
        TaskFilters(model, task="summary")
    with pytest.raises(ValueError, match="model=BertModel does not say its task; use a model with a head"):
        task_of(model.bert)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no final norm that is known"):
        final_norm(model)
    with pytest.raises(ValueError, match=r"1 states for 4 filters; give those of layers \(1, 2, 3, 4\)"):
        TaskFilters(model).states(see(model, batch_of(), (1,)).states)


def test_a_bare_encoder_takes_a_task_by_name_and_a_mean_pooled_model_reads_the_mean(make) -> None:
    assert TaskFilters(make().bert, task="classification").pool == "first"
    modern = make("modernbert", classifier_pooling="mean")
    assert TaskFilters(modern).pool == "mean"
    assert isinstance(TaskFilters(modern).heads[0].dense, nn.Sequential)

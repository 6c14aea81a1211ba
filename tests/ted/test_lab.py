"""The experiments in small sizes: one start for all arms, and what each table's numbers mean."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core.models import tiny
from zq_lib.ted import TaskFilters, TedConfig, arms, benchmark, digits, lab, lens, text
from zq_lib.ted.arms import START, Arm
from zq_lib.ted.layers import EXAMPLE

SMALL = digits.Size(192, 128, 64, 1, 1, 1, 2)


@pytest.fixture(scope="module")
def pairs() -> digits.Digits:
    return digits.digits(SMALL, 0)


@pytest.fixture(scope="module")
def problem(pairs):
    return pairs.problem()


def test_a_pair_shows_both_digits_and_its_label_is_the_left_one() -> None:
    images = torch.arange(3.0)[:, None, None].expand(3, 8, 8)  # an image is as bright as its number
    found = digits.draw(images, torch.tensor([7, 8, 9]), 40, torch.Generator().manual_seed(0))
    patches = found.rows["inputs_embeds"]
    assert patches.shape == (40, 9, 16) and bool((patches[:, 0] == 0).all())
    grid = patches[:, 1:].reshape(40, 2, 4, 16)
    assert torch.equal(grid[:, :, :2].amax((1, 2, 3)) + 7, found.rows["labels"].float())
    assert torch.equal(grid[:, :, 2:].amax((1, 2, 3)) + 7, found.right.float())


def test_patches_keep_the_pixels_of_an_image_together() -> None:
    images, labels = torch.rand(5, 8, 8), torch.arange(5)
    found = digits.draw(images, labels, 10, torch.Generator().manual_seed(0))
    left = images[found.rows["labels"]]
    assert torch.equal(found.rows["inputs_embeds"][:, 1], left[:, :4, :4].reshape(10, 16))
    assert torch.equal(found.rows["inputs_embeds"][:, 6], left[:, 4:, 4:].reshape(10, 16))


def test_every_arm_starts_at_the_same_student_and_sees_the_same_batches(problem) -> None:
    before = {k: v.clone() for k, v in problem.student.state_dict().items()}
    seen = [b[EXAMPLE].tolist() for b in problem.batches(3)]
    assert seen == [b[EXAMPLE].tolist() for b in problem.batches(3)]
    assert seen != [b[EXAMPLE].tolist() for b in problem.batches(4)]
    moments = list(arms.watch(problem, {arm: 1.0 for arm in (digits.PLAIN, digits.LWD, digits.TED)}, seed=3))
    steps = {name: [m.step for m in moments if m.arm == name and m.row is None] for name in ("labels only", "TED 8")}
    assert steps["labels only"] == steps["TED 8"] == list(range(1, problem.steps + 1))
    first = [float(m.terms.task) for m in moments if m.step == 1 and m.row is None]
    assert max(first) - min(first) < 1e-6, "the first loss on labels is that of the start"
    assert all(torch.equal(v, before[k]) for k, v in problem.student.state_dict().items())
    assert all(set(m.student.state_dict()) == set(before) for m in moments if m.row is not None)


def test_arms_differ_in_what_their_loss_is_made_of(problem) -> None:
    random, pca = Arm("random", "random", 4), Arm("PCA", "pca", 4)
    chosen = (digits.PLAIN, digits.KD, digits.LWD, random, pca, digits.TED)
    first = {m.arm: m.terms for m in arms.watch(problem, {arm: 2.0 for arm in chosen}, 0) if m.step == 1}
    assert float(first["labels only"].kd) == 0 < float(first["KD"].kd)
    assert float(first["KD"].layer) == 0 and len({float(first[a.name].layer) for a in chosen[2:]}) == 4
    for arm in chosen[2:]:
        terms = first[arm.name]
        expected = terms.task + problem.kd_weight * terms.kd + 2 * terms.layer
        assert float(terms.total) == pytest.approx(float(expected), rel=1e-5)


def test_the_start_and_every_arm_are_judged_on_all_test_rows(problem) -> None:
    rows = arms.compare(problem, {digits.KD: 1.0}, 0)
    assert [r["arm"] for r in rows] == [START, "KD"] and rows[0] | arms.judge(problem.student, problem.test) == rows[0]
    right = arms.outputs(problem.student, problem.test).argmax(-1) == problem.test["labels"]
    assert rows[0]["accuracy"] == pytest.approx(float(right.double().mean())) and len(right) == SMALL.test


def test_selectivity_probes_states_and_filtered_states_of_both_sides(pairs) -> None:
    rows = digits.selectivity(pairs, dims=(4,))
    assert len(rows) == 2 * 2 * 2 and {r["dim"] for r in rows} == {0, 4} and {r["layer"] for r in rows} == {3}
    assert all(0 <= r["accuracy"] <= 1 for r in rows)


def test_every_claim_holds_on_the_quick_preset() -> None:
    found = lab.run(only=["selectivity"])
    assert len(found.claims) == 3 and [c.statement for c in found.claims if not c.holds] == []
    assert found.find("selectivity", dim=8, side="right", images="known")["accuracy"] < 0.5  # 0.30 here, by chance 0.1


def test_a_live_training_shows_its_weighted_terms_and_ends_with_the_accuracy(problem) -> None:
    config = TedConfig(filter_dim=4, kd_weight=2.0, layer_weight=3.0)
    rows = [row for row, _ in lab.live(problem, config)]
    assert [r["step"] for r in rows[:-1]] == list(range(1, problem.steps + 1)) and 0 <= rows[-1]["accuracy"] <= 1
    for row in rows:
        assert row["total"] == pytest.approx(row["task"] + row["kd"] + row["layer"], rel=1e-5)
    plain = [row for row, _ in lab.live(problem, TedConfig(kd_weight=0, layer_weight=0))]
    assert plain[-1]["arm"] == "labels only" and plain[0]["kd"] == plain[0]["layer"] == 0


def test_an_unknown_budget_or_table_is_refused() -> None:
    with pytest.raises(ValueError, match="budget='most'"):
        lab.run(budget="most")
    with pytest.raises(ValueError, match="only='speed'"):
        lab.run(only=["speed"])


def test_differences_are_taken_in_pairs_and_an_arm_at_two_weights_is_two() -> None:
    runs = [
        {"seed": s, "arm": arm, "weight": w, "accuracy": base + gap}
        for s, base in enumerate((0.1, 0.5, 0.9))
        for arm, w, gap in (("KD", "", 0), ("TED", 1.0, 0.01), ("TED", 10.0, -0.01 * s))
    ]
    one, ten = lab.differences(runs, "KD")
    assert (one["arm"], ten["arm"]) == ("TED, weight 1", "TED, weight 10")
    assert one["difference"] == pytest.approx(0.01) and one["wins"] == 3 and one["low"] == pytest.approx(0.01)
    assert ten["difference"] == pytest.approx(-0.01) and ten["wins"] == 0
    assert ten["high"] - ten["difference"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    with pytest.raises(LookupError, match="baseline='CE' has no runs; choose one of KD"):
        lab.differences(runs, "CE")


def test_windows_follow_each_other_in_the_text(smollm2) -> None:
    _, tokenizer = smollm2
    short, long = lens.windows(tokenizer, 4, 32), lens.windows(tokenizer, 2, 64)
    assert torch.equal(torch.cat(short), torch.cat(long))
    assert not torch.equal(short[0], lens.windows(tokenizer, 1, 32, skip=5)[0])
    with pytest.raises(ValueError, match="count=9 windows of 100000 tokens are more than the text has"):
        lens.windows(tokenizer, 9, 100_000, skip=995)


def _decoder(layers: int = 6):
    model = tiny("llama", num_hidden_layers=layers)
    source = torch.Generator().manual_seed(0)
    return model, [torch.randint(3, 128, (16,), generator=source) for _ in range(12)]


def test_a_cut_student_has_the_last_block_of_each_group_and_leaves_the_teacher_alone() -> None:
    model, _ = _decoder()
    student = lens.cut(model, 3)
    for own, teacher in ((0, 1), (1, 3), (2, 5)):
        for a, b in zip(
            student.model.layers[own].parameters(), model.model.layers[teacher].parameters(), strict=True
        ):  # fmt: skip
            assert torch.equal(a, b) and a is not b
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert not student.get_input_embeddings().weight.requires_grad
    assert all(p.requires_grad for p in model.parameters()) and model.config.num_hidden_layers == 6
    whole, ids = lens.cut(model, 6), torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, model(ids).logits)


def test_a_lens_is_better_than_the_identity_and_its_last_row_is_the_model() -> None:
    model, texts = _decoder()
    size = lens.Size((2, 4), 16, 2, 40, 2, 16, 2, 2, 1)
    parts = lens.batches(texts, 2)
    *_, (_, filters) = lens.lens(model, parts * 8, size)
    rows = lens.lens_rows(model, filters, parts)
    assert [r["layer"] for r in rows] == ["2", "4", "model"]
    assert all(r["lens"] < r["identity"] for r in rows[:2]) and rows[2]["lens"] == rows[2]["identity"]
    with torch.no_grad():
        mean = sum(float(model(**{k: v for k, v in b.items() if k != EXAMPLE}).loss) for b in parts) / len(parts)
    assert rows[2]["lens"] == pytest.approx(mean, rel=1e-5)


def test_decoder_arms_learn_side_by_side_from_one_start() -> None:
    model, texts = _decoder()
    size = lens.Size((2,), 16, 2, 2, 2, 16, 2, 4, 2)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    rows = list(lens.distillation(model, lens.cut(model, 3), lens.batches(texts[:8], 2), texts[8:], size))
    handle.remove()
    assert len(calls) == len(texts[8:]) + size.steps, "the teacher is judged once, and run once for each batch"
    assert rows[0]["arm"] == "teacher" and {r["step"] for r in rows} == {0, 2, 4}
    begin = {r["perplexity"] for r in rows[1:] if r["step"] == 0}
    end = {r["arm"]: r["perplexity"] for r in rows if r["step"] == 4}
    assert len(begin) == 1 and len(set(end.values())) == len(lens.ARMS) == 4
    assert rows[-1]["arm"] == "TED" and rows[-1]["layer"] > 0 and rows[-1]["tokens"] == 4 * 32


@pytest.mark.assets
def test_questions_are_split_without_overlap_and_the_test_is_all_that_is_left() -> None:
    size = text.Size(60, 20, None, 16, 1, 1, 1)
    _, tokenizer = text.models.load("minilm-l6")
    found = text.questions(tokenizer, size)
    assert [len(part["labels"]) for part in (found.train, found.choose, found.test)] == [60, 20, 5382 - 80]
    assert len(found.texts) == 5302 and len(set(found.texts)) > 5290 and len(found.kinds) == 6


@pytest.mark.assets
def test_a_student_of_real_text_has_the_principal_word_vectors_and_trains_everything_else() -> None:
    setting = benchmark.quick_setting()
    small = text.student(setting.teacher)
    words = small.bert.embeddings.word_embeddings.weight
    assert words.shape == (30522, 96) and not words.requires_grad
    gram = words.T @ words
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-3 * float(gram.diag().max())
    variances = gram.diag()
    assert bool((variances[:-1] >= variances[1:] - 1e-2).all()), "in order of their variance"
    assert sum(p.numel() for p in small.parameters() if p.requires_grad) < 400_000


@pytest.mark.assets
def test_a_question_is_answered_by_every_model_and_behind_every_layer() -> None:
    setting = benchmark.quick_setting()
    models = {"teacher": setting.teacher, "student": text.student(setting.teacher)}
    rows = lab.answers(models, setting.found, "How many rivers are there?")
    assert len(rows) == 2 * 6 and {r["kind"] for r in rows} == set(setting.found.kinds)
    assert sum(r["probability"] for r in rows) == pytest.approx(2, abs=1e-5)
    filters = TaskFilters(setting.teacher, TedConfig(filter_dim=4), layers=(2, 6))
    behind = lab.layer_answers(filters, setting.found, "How many rivers are there?")
    assert {r["layer"] for r in behind} == {2, 6} and sum(r["probability"] for r in behind) == pytest.approx(2)

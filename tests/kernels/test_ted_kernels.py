"""TED's kernels in Triton's interpreter: the divergence over a vocabulary, and the distance of filtered states."""

from __future__ import annotations

import math

import pytest
import torch
from ted_kernel_cases import check_divergence, check_filtered, logits, sides
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from zq_lib.core.backend import interpreting, launches
from zq_lib.ted import (
    Filtered,
    TedConfig,
    TedLoss,
    divergence,
    filtered_error,
    kernels,
    reference,
    see,
    task_filters,
)

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="a GPU is here, and these are toy sizes for the interpreter"),
    pytest.mark.usefixtures("poisoned"),
]
KL = ["ted.kl_forward", "ted.kl_merge", "ted.kl_backward"]


def names(seen) -> list[str]:
    assert {launch.path for launch in seen} == {"interpreter"}
    return [launch.kernel for launch in seen]


# The divergence -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (3, 3), (5, 512), (5, 513), (31, 1000), (3, 5003)])
def test_value_and_gradient_are_the_references(rows: int, classes: int, temperature: float) -> None:
    assert names(check_divergence(*logits(rows, classes), temperature=temperature)) == KL


def test_rows_are_split_only_when_they_are_few_and_long() -> None:
    for rows, classes, split in ((1, 5003, 8), (3, 5003, 3), (3, 512, 1), (4, 5003, 1)):
        with launches() as seen:
            divergence(*logits(rows, classes), backend="triton")
        assert seen[0].grid == (rows, split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_single(dtype: torch.dtype) -> None:
    s, t = logits(7, 1000, dtype=dtype)
    check_divergence(s, t)
    check_divergence(s, t.float() * 1.001)  # a teacher of another type
    wanted = reference.divergence(s.double(), t.double(), 2.0)
    assert float(divergence(s, t, backend="triton")) == pytest.approx(float(wanted), rel=2e-6)


def test_logits_fifty_times_as_large_do_not_overflow() -> None:
    check_divergence(*logits(4, 1000, size=50.0))
    check_divergence(*logits(4, 1000, size=50.0), temperature=1.0)


@pytest.mark.parametrize("rising", [True, False])
def test_sums_follow_a_maximum_that_rises_or_falls_along_the_row(rising: bool) -> None:
    s, t = logits(2, 2000)
    ramp = torch.linspace(0, 60, 2000) * (1 if rising else -1)
    check_divergence(s + ramp, t + ramp)
    check_divergence(s + ramp, t - ramp)


def test_the_same_logits_have_no_distance_and_no_gradient() -> None:
    s, _ = logits(5, 1000)
    mine = s.clone().requires_grad_()
    found = divergence(mine, s.clone(), backend="triton")
    found.backward()
    assert -1e-7 <= found.item() <= 1e-6 and not mine.grad.any()


@pytest.mark.parametrize("part", [slice(0, 600), slice(0, 512), slice(512, None), slice(5, 6)])
def test_classes_that_both_rule_out_are_as_if_they_were_not_there(part: slice) -> None:
    s, t = logits(5, 1000)
    inside = torch.ones(1000, dtype=torch.bool)
    inside[part] = False
    wanted = reference.divergence(s[:, inside].double(), t[:, inside].double(), 2.0)
    for ruled_out in (-math.inf, torch.finfo(torch.float32).min):
        s[:, part] = t[:, part] = ruled_out
        mine = s.clone().requires_grad_()
        found = divergence(mine, t, backend="triton")
        found.backward()
        assert float(found) == pytest.approx(float(wanted), rel=2e-6)
        assert bool(mine.grad.isfinite().all()) and not mine.grad[:, part].any() and mine.grad[:, inside].any()


def test_a_class_that_only_the_teacher_rules_out_costs_nothing_and_one_of_the_student_is_infinite() -> None:
    s, t = logits(5, 700)
    t[:, :512] = -math.inf
    check_divergence(s, t)
    s[:, 600] = -math.inf
    found = divergence(s, t, backend="triton")
    assert float(found) == math.inf, "and not NaN"
    t[:, 600] = -math.inf
    assert math.isfinite(float(divergence(s, t, backend="triton")))


def test_nan_is_not_hidden() -> None:
    for of_teacher in (False, True):
        s, t = logits(5, 600)
        (t if of_teacher else s)[2, 77] = math.nan
        assert math.isnan(float(divergence(s, t, backend="triton")))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("rows", [3, 12])
def test_rows_that_are_left_out_count_nowhere_and_may_hold_anything(rows: int, overwrite: bool) -> None:
    s, t = logits(rows, 600)
    keep = torch.arange(rows) % 3 > 0
    s[~keep], t[~keep] = math.nan, math.inf
    with launches() as seen:
        check_divergence(torch.where(keep[:, None], s, 0.0), torch.where(keep[:, None], t, 0.0), keep)
    assert names(seen) == KL
    mine = s.clone().requires_grad_()
    found = divergence(mine, t, keep=keep, overwrite=overwrite, backend="triton")
    found.backward()
    assert math.isfinite(float(found)) and bool(mine.grad.isfinite().all()) and not mine.grad[~keep].any()
    check_divergence(s[keep], t[keep], overwrite=overwrite)


def test_without_any_row_the_divergence_and_its_gradient_are_0() -> None:
    s, t = logits(4, 7)
    mine = s.clone().requires_grad_()
    for keep in (torch.zeros(4, dtype=torch.bool), None):
        chosen = (mine, t) if keep is not None else (mine[:0], t[:0])
        found = divergence(*chosen, keep=keep, backend="triton")
        found.backward()
        assert float(found) == 0 and not mine.grad.any()


def test_rows_apart_in_memory_and_columns_apart_agree() -> None:
    s, t = logits(6, 300)
    wide = torch.stack([s, t], 1)  # [6, 2, 300]
    check_divergence(wide[:, 0], wide[:, 1])
    check_divergence(s.T.contiguous().T, t)
    shaped = divergence(s.view(2, 3, 300), t.view(2, 3, 300), backend="triton")
    assert torch.equal(shaped, divergence(s, t, backend="triton"))


def test_logits_that_another_operation_still_needs_are_not_overwritten_in_silence() -> None:
    hidden, t = logits(5, 20)
    hidden.requires_grad_()
    scaled = hidden * 1.0
    total = scaled.square().sum() + divergence(scaled, t, overwrite=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_gradient_can_be_taken_twice_unless_it_has_overwritten_the_logits() -> None:
    s, t = logits(5, 20)
    mine = s.clone().requires_grad_()
    found = divergence(mine, t, backend="triton")
    assert torch.equal(*(torch.autograd.grad(found, mine, retain_graph=True)[0] for _ in range(2)))
    scaled = mine * 1.0
    found = divergence(scaled, t, overwrite=True, backend="triton")
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_the_square_of_the_temperature_can_be_left_out() -> None:
    s, t = logits(5, 50)
    given = dict(temperature=3.0, backend="triton")
    assert float(divergence(s, t, **given)) == pytest.approx(9 * float(divergence(s, t, squared=False, **given)))


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_gradient() -> None:
    s, t = logits(5, 1000)
    mine, kept = s.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        divergence(mine, t, backend="triton")
    fresh = [x for x in kept if x.data_ptr() not in (mine.data_ptr(), t.data_ptr())]
    assert sum(x.numel() for x in fresh) == 4 * 5


# The distance of filtered states --------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
def test_every_number_of_rows_agrees(rows: int) -> None:
    assert names(check_filtered(*sides(rows, 12, 24, 20))) == ["ted.filtered_gap"]


@pytest.mark.parametrize(
    ("student", "teacher", "dim"), [(1, 1, 1), (16, 16, 16), (17, 33, 5), (24, 48, 40), (7, 3, 33), (48, 16, 32)]
)
def test_every_width_agrees_with_filters_narrower_and_wider_than_the_states(student, teacher, dim) -> None:
    check_filtered(*sides(18, student, teacher, dim))


@pytest.mark.parametrize("pairs", [2, 12])
def test_all_pairs_take_one_launch(pairs: int) -> None:
    (launch,) = check_filtered(*sides(33, 6, 9, 8, pairs))
    assert launch.grid == (2, pairs)


@pytest.mark.parametrize("rows", [1, 31, 70])
def test_only_kept_rows_count_and_the_others_may_hold_anything(rows: int) -> None:
    own, other = sides(rows, 12, 20, 18, 2)
    keep = torch.rand(rows, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[0] = True
    check_filtered(own, other, keep)
    wanted = filtered_error(own, other, keep, backend="triton")
    for side in (*own, *other):
        side.hidden[~keep] = math.nan
    assert torch.equal(filtered_error(own, other, keep, backend="triton"), wanted)
    check_filtered(own, other, keep)


def test_without_a_token_error_and_gradient_are_0() -> None:
    own, other = sides(6, 4, 4, 5, 2)
    mine = [Filtered(*(x.requires_grad_() for x in side)) for side in own]
    with launches() as seen:
        found = filtered_error(mine, other, torch.zeros(6, dtype=torch.bool), backend="triton")
        found.sum().backward()
    assert not seen and not found.any() and not any(x.grad.any() for side in mine for x in side)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_tolerance(dtype: torch.dtype) -> None:
    own, other = sides(40, 24, 48, 40, 2, dtype=dtype)
    check_filtered(own, other)
    check_filtered(own, other, torch.arange(40) % 3 > 0)


def test_sums_over_many_large_rows_fit_half_precision() -> None:
    own, other = sides(500, 4, 4, 4, dtype=torch.float16)
    big = [own[0]._replace(hidden=torch.full_like(own[0].hidden, 20.0), weight=torch.full_like(own[0].weight, 0.5))]
    check_filtered(big, other)  # D^T H alone would be 500 * 40 * 20, far above 65504


def test_strides_differ_from_layer_to_layer_and_more_dimensions_agree() -> None:
    own, other = sides(12, 6, 9, 8, 3)
    wide = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    own[1] = own[1]._replace(hidden=wide[:, 3:9])  # rows 20 apart, and not on 16 bytes
    other[2] = other[2]._replace(weight=other[2].weight.T.contiguous().T, bias=torch.stack([wide[0, :8]] * 2, 1)[:, 0])
    check_filtered(own, other)
    shaped = [[s._replace(hidden=s.hidden.reshape(3, 4, -1)) for s in side] for side in (own, other)]
    plain = filtered_error(own, other, backend="triton")
    assert torch.equal(filtered_error(*shaped, backend="triton"), plain)


def test_the_same_states_behind_the_same_filters_have_no_distance() -> None:
    own, _ = sides(17, 12, 12, 20)
    mine = [Filtered(*(x.clone().requires_grad_() for x in own[0]))]
    found = filtered_error(mine, own, backend="triton")
    found.sum().backward()
    assert not found.any() and not any(x.grad.any() for x in mine[0])


def test_a_frozen_filter_gets_no_gradient_and_without_any_nothing_is_stored() -> None:
    own, other = sides(9, 4, 6, 5)
    own[0].hidden.requires_grad_()
    filtered_error(own, other, backend="triton").sum().backward()
    assert own[0].weight.grad is None and own[0].bias.grad is None and own[0].hidden.grad.any()
    with torch.no_grad():
        assert kernels._gap(own, other, None, store=False)[1] is None
        assert not filtered_error(own, other, backend="triton").requires_grad


def test_what_is_kept_for_the_gradient_is_one_difference_per_pair() -> None:
    own, other = sides(40, 12, 24, 20, 2, dtype=torch.bfloat16)
    given = {x.data_ptr() for side in (*own, *other) for x in side}
    mine, kept = [Filtered(*(x.requires_grad_() for x in side)) for side in own], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        filtered_error(mine, other, backend="triton")
    fresh = [x for x in kept if x.data_ptr() not in given]
    assert [(x.shape, x.dtype) for x in fresh] == [((2, 40, 20), torch.bfloat16)]


def test_runs_repeat_bit_for_bit() -> None:
    def results() -> list[Tensor]:
        own, other = sides(33, 12, 24, 20, 2)
        mine = [x.requires_grad_() for side in own for x in side]
        found = filtered_error(own, other, backend="triton")
        s, t = logits(3, 1000)
        kl = divergence(s.requires_grad_(), t, backend="triton")
        return [found, kl, *torch.autograd.grad(found.sum() + kl, [*mine, s])]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_whole_loss_of_a_language_model_is_that_of_the_torch_path(overwrite: bool) -> None:
    def model(depth: int, width: int):
        torch.manual_seed(depth)
        sizes = dict(n_embd=width, n_layer=depth, n_head=2, n_positions=16, initializer_range=0.2)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=300, **sizes)).eval()

    ids = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = {}
    for backend in ("torch", "triton"):
        teacher, student = model(4, 16), model(2, 8)
        config = TedConfig(filter_dim=12, scale="none", backend=backend)
        torch.manual_seed(0)
        loss = TedLoss(teacher, *task_filters(teacher, student, config), config, allow_untrained=True)
        with launches() as seen:
            terms = loss(see(student, batch, loss.layers), batch, overwrite=overwrite)
            terms.total.backward()
        kernels_run = ["ted.kl_forward", "ted.kl_merge", "ted.filtered_gap", "ted.kl_backward"]
        assert [x.kernel for x in seen] == (
            kernels_run if backend == "triton" else ["ted.divergence", "ted.filtered_error"]
        )
        found[backend] = [terms.total.detach(), *(p.grad for p in (*student.parameters(), *loss.parameters()))]
    for mine, plain in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_what_the_kernels_cannot_take_is_refused_when_they_are_demanded() -> None:
    own, other = sides(9, 4, 6, 5)
    for changed, why in (
        ([Filtered(*(x.double() for x in own[0]))], "float32, float64"),
        ([own[0]._replace(bias=None)], "no filter, or one without a bias"),
    ):
        with pytest.raises(ValueError, match=why):
            filtered_error(changed, other, backend="triton")
    two = [own[0], sides(9, 3, 6, 5)[0][0]]
    with pytest.raises(ValueError, match="different widths"):
        filtered_error(two, other * 2, backend="triton")
    s, t = logits(2, 5)
    with pytest.raises(ValueError, match="student's logits are torch.float64"):
        divergence(s.double(), t, backend="triton")


def test_every_kernel_is_listed_for_compilation_ahead_of_time() -> None:
    found = [(spec.name, spec.variant) for spec in kernels.SPECS]
    pairs = [(name, kind) for kind in ("bf16", "fp32") for name in ("kl_forward", "kl_backward", "filtered_gap")]
    assert found == [*pairs, ("kl_merge", "fp32")]
    for spec in kernels.SPECS:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.kernel.arg_names)


def test_the_gpu_benchmarks_pass_their_own_parity_checks_at_toy_size() -> None:
    from zq_lib.ted.kernels_bench import cases

    toy = dict(logits=((5, 300),), tokens=(17,), widths=(6, 9, 8), pairs=(1, 2), dtype=torch.float32)
    found = list(cases("cpu", **toy))
    assert [case.name for case in found] == ["kl forward", "kl training", *["filtered error training"] * 2]
    for case in found:
        error, allowed = case.parity()
        assert error <= allowed, case.name
        outputs = [call() for call in case.runs.values()]
        for other in outputs[1:]:  # every implementation that is timed computes the same
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-6)


def test_a_wrong_kernel_does_not_pass_the_benchmarks_check(monkeypatch) -> None:
    from zq_lib.ted import kernels_bench

    right = kernels_bench.divergence
    monkeypatch.setattr(kernels_bench, "divergence", lambda *args, **named: right(*args, **named) * 1.01)
    case = next(kernels_bench.cases("cpu", logits=((5, 300),), tokens=(), dtype=torch.float32))
    error, allowed = case.parity()
    assert error > allowed

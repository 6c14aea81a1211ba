"""AdaShift's kernels in Triton's interpreter, against the torch path and the fp64 reference."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from adashift_kernel_cases import SHAPES, check, compare, draw, noise, start, walk
from torch import nn

from zq_lib.adashift import AdaShift, kernels, kernels_bench
from zq_lib.adashift.batch import Batch, Settings
from zq_lib.core.backend import interpreting, launches

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="a GPU is here, and these are toy sizes for the interpreter"),
    pytest.mark.usefixtures("poisoned"),
]
UPDATE, ROWS, FINISH = "adashift.update", "adashift.update_rows", "adashift.finish"
TWO = ((33, 70), (5,))  # two chunks and a masked one


def names(seen) -> list[str]:
    assert {launch.path for launch in seen} == {"interpreter"}
    assert all(math.prod(launch.grid) <= 20 for launch in seen)
    return [launch.kernel for launch in seen]


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (6, dict(phi="max", n=2)),
        (6, dict(phi="mean", n=2, betas=(0.5, 0.99))),
        (4, dict(phi="l2", n=1, betas=(0.0, 0.9))),
        (6, dict(phi="none", n=2, eps=1e-5)),
        (4, dict(phi="none", n=1, eps=1e-5, betas=(0.0, 0.9))),
        (7, dict(phi="mean", n=3, betas=(1.0, 0.9))),
        (4, dict(phi="max", n=1, betas=(0.9, 0.0))),
    ],
    ids=str,
)
def test_every_spatial_function_is_the_references(steps: int, settings: dict) -> None:
    assert names(check(steps=steps, **settings)) == [UPDATE, FINISH]


def test_a_ring_of_ten_wraps_round_twice() -> None:
    check(((40, 30), (3,)), 23)


@pytest.mark.parametrize("phi", ["max", "mean", "l2"])
def test_rows_have_a_scale_each_and_a_vector_is_one_block(phi: str) -> None:
    seen = check(((9, 300), (6, 4, 16), (40, 3), (7,)), 5, n=2, phi=phi, block="row")
    assert names(seen) == [UPDATE, ROWS, ROWS, ROWS, FINISH]
    assert [launch.meta["BLOCK"] for launch in seen[1:4]] == [256, 64, 4]


def test_sizes_around_a_block_and_a_chunk_agree() -> None:
    shapes = ((1,), (1023,), (1024,), (1025,), (2048,), (2309,))
    (update, finish) = check(shapes, 3, n=1, phi="mean")
    assert update.grid == (7,) and finish.grid == (6,)
    check(shapes[1:4], 3, n=1, phi="none", eps=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(weight_decay=0.1),
        dict(phi="none", eps=1e-5, weight_decay=0.1, maximize=True),
        dict(block="row", weight_decay=0.1, max_step=0.3),
    ],
    ids=str,
)
def test_decoupled_decay_the_bound_and_maximise_agree(settings: dict) -> None:
    check(TWO, 5, n=2, **settings)


@pytest.mark.parametrize("settings", [dict(), dict(maximize=True), dict(phi="mean", block="row")], ids=str)
def test_decay_that_is_part_of_the_gradient_agrees(settings: dict) -> None:
    given = dict(n=2, weight_decay=0.1, decoupled=False, **settings)
    gradients, ways = noise(TWO, 5, torch.float32, "cpu"), []
    for fused in (True, False):
        params = start(TWO, torch.float32, "cpu")
        ways.append(AdaShift(params, fused=fused, **given))
        walk(ways[-1], params, gradients)
    compare(*ways, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "ring", "settings"),
    [
        (torch.float32, torch.bfloat16, dict(phi="none", eps=1e-5)),
        (torch.float32, torch.float16, dict(betas=(1.0, 0.99))),
        (torch.bfloat16, None, dict(phi="mean")),
        (torch.bfloat16, torch.bfloat16, dict(block="row")),
        (torch.float16, torch.bfloat16, dict()),
        (torch.float16, torch.float64, dict(phi="l2", betas=(0.0, 0.9))),
    ],
    ids=str,
)
def test_parameters_and_rings_of_every_type_agree(dtype, ring, settings: dict) -> None:
    check(TWO, 5, dtype, n=2, lr=0.05, ring_dtype=ring, **settings)


def test_the_first_correction_does_not_cancel() -> None:
    """At age 1 the step is lr g_2 / |g_1|; 1 - beta2 in fp32 would be 3e-5 off."""
    for beta2 in (0.999, 0.99999, 0.5, 0.1):
        param = nn.Parameter(torch.zeros(()))
        walk(AdaShift([param], lr=1.0, n=1, betas=(0.0, beta2), fused=True), [param],
             [[torch.tensor(3.0)], [torch.tensor(1.5)]])  # fmt: skip
        assert float(param.detach()) == pytest.approx(-0.5, rel=5e-7)


def test_memory_that_is_not_aligned_agrees() -> None:
    def views(fused: bool) -> AdaShift:
        store = draw((4_000,), 3)
        params = [nn.Parameter(store[1:2311].view(33, 70)), nn.Parameter(store[2501:3001])]
        optimizer = AdaShift(params, n=2, fused=fused)
        for t in range(4):
            for i, param in enumerate(params):
                param.grad = draw((4_000,), 10 * t + i)[3 : 3 + param.numel()].view(param.shape)
            optimizer.step()
        assert torch.equal(store[:1], draw((4_000,), 3)[:1]) and torch.equal(store[3001:], draw((4_000,), 3)[3001:])
        return optimizer

    compare(views(True), views(False), 2e-6)


@pytest.mark.parametrize("settings", [dict(), dict(phi="none", eps=1e-5), dict(block="row")], ids=str)
def test_what_has_had_no_gradient_does_not_move(settings: dict) -> None:
    (param,) = start([(3, 40)], torch.float32, "cpu")
    before, other = param.detach().clone(), draw((3, 40), 1)
    silent = torch.zeros(3, 40)
    optimizer = AdaShift([param], n=1, weight_decay=0.1, fused=True, **settings)
    walk(optimizer, [param], [[silent], [silent], [other * (torch.arange(3) == 1)[:, None]]])
    assert torch.equal(param, before) and not optimizer.state[param]["age"].any()
    walk(optimizer, [param], [[other]])
    moved = (param != before).all(1).tolist()
    assert moved == ([True] * 3 if not settings else [False, True, False]) and bool(param.isfinite().all())
    assert torch.equal(optimizer.state[param]["age"].unique(), torch.tensor([1] if not settings else [0, 1]))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("settings", [dict(), dict(phi="mean"), dict(phi="none", eps=1e-5), dict(block="row")], ids=str)
def test_a_nan_or_an_infinity_shows_as_it_does_in_torch(settings: dict, bad: float) -> None:
    found = []
    for fused in (True, False):
        params = start([(4, 9)], torch.float32, "cpu")
        optimizer = AdaShift(params, n=1, betas=(0.0, 0.9), fused=fused, **settings)
        gradients = noise([(4, 9)], 3, torch.float32, "cpu")
        gradients[0][0][2, 3] = math.copysign(1.0, bad) * abs(bad)
        walk(optimizer, params, gradients)
        state = optimizer.state[params[0]]
        found.append([state["v"].nan_to_num(1e9), params[0].detach().nan_to_num(1e9)])
    assert float(found[1][0].max()) >= 1e9, "nothing was seen"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(), dict(phi="none", eps=1e-5), dict(block="row")], ids=str)
def test_an_overflow_leaves_everything_as_it_was_and_a_scale_is_divided_out(settings: dict) -> None:
    params, gradients = start(TWO, torch.float32, "cpu"), noise(TWO, 5, torch.float32, "cpu")
    mine, plain = AdaShift(params, n=2, fused=True, **settings), start(TWO, torch.float32, "cpu")
    mine.grad_scale, mine.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for t, at_step in enumerate(gradients):
        before = copy.deepcopy((mine.state_dict()["state"], [p.detach() for p in params]))
        for overflow in (1.0, 0.0) if t in (1, 3) else (0.0,):
            mine.found_inf.fill_(overflow)
            walk(mine, params, [[1024 * g for g in at_step]])
            if overflow:
                torch.testing.assert_close(
                    (mine.state_dict()["state"], [p.detach() for p in params]), before, rtol=0, atol=0
                )
    other = AdaShift(plain, n=2, fused=False, **settings)
    walk(other, plain, gradients)
    compare(mine, other, 2e-6)


def test_a_late_parameter_keeps_its_own_time_in_the_same_launch() -> None:
    early, late = start(((40,), (30,)), torch.float32, "cpu")
    optimizer = AdaShift([early, late], n=2, fused=True)
    gradients = noise(((40,), (30,)), 7, torch.float32, "cpu")
    walk(optimizer, [early], [at_step[:1] for at_step in gradients[:3]])
    seen = walk(optimizer, [early, late], gradients[3:])
    assert names(seen) == [UPDATE, FINISH]
    alone = start(((40,), (30,)), torch.float32, "cpu")[1]
    walk(AdaShift([alone], n=2, fused=True), [alone], [at_step[1:] for at_step in gradients[3:]])
    assert torch.equal(late, alone) and int(optimizer.state[early]["step"]) == 7


@pytest.mark.parametrize("settings", [dict(), dict(phi="none", eps=1e-5), dict(block="row", phi="mean")], ids=str)
def test_a_run_may_change_its_path_between_two_steps(settings: dict) -> None:
    gradients = noise(TWO, 9, torch.float32, "cpu")
    params, plain = start(TWO, torch.float32, "cpu"), start(TWO, torch.float32, "cpu")
    mixed, other = AdaShift(params, n=3, **settings), AdaShift(plain, n=3, fused=False, **settings)
    for fused, some in ((False, gradients[:2]), (True, gradients[2:5]), (False, gradients[5:7]), (True, gradients[7:])):
        mixed.param_groups[0]["fused"] = fused
        seen = walk(mixed, params, some)
        assert bool(seen) == fused
    walk(other, plain, gradients)
    compare(mixed, other, 2e-6)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path) -> None:
    gradients = noise(TWO, 6, torch.float32, "cpu")
    params = start(TWO, torch.float32, "cpu")
    optimizer = AdaShift(params, n=2, fused=True)
    walk(optimizer, params, gradients[:3])
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), tmp_path / "state.pt")
    walk(optimizer, params, gradients[3:])
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [nn.Parameter(x) for x in values]
    resumed = AdaShift(again, n=2, fused=True)
    resumed.load_state_dict(state)
    walk(resumed, again, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_a_plain_mean_is_made_anew_after_a_thousand_steps() -> None:
    params = start([(50,)], torch.float32, "cpu")
    optimizer = AdaShift(params, n=3, betas=(1.0, 0.9), fused=True)
    gradients = [[draw((50,), t)] for t in range(5)]
    walk(optimizer, params, gradients[:3])
    state = optimizer.state[params[0]]
    state["step"].fill_(998)  # 998 is no multiple of 3: the slots are taken over in another order, and all are
    state["exp_avg"] += 1
    walk(optimizer, params, gradients[3:4])
    assert float((state["exp_avg"] - state["ring"].mean(0)).mean()) > 0.9
    walk(optimizer, params, gradients[4:])
    torch.testing.assert_close(state["exp_avg"], state["ring"].mean(0), rtol=1e-6, atol=1e-6)


def test_an_age_of_two_bytes_stops_at_its_largest() -> None:
    (param,) = start([(5,)], torch.float32, "cpu")
    optimizer = AdaShift([param], n=1, phi="none", eps=1e-5, fused=True)
    walk(optimizer, [param], noise([(5,)], 2, torch.float32, "cpu"))
    age = optimizer.state[param]["age"]
    assert age.dtype == torch.int16 and age.tolist() == [1] * 5
    age.fill_(32_766)
    walk(optimizer, [param], noise([(5,)], 2, torch.float32, "cpu"))
    assert age.tolist() == [32_767] * 5


def test_a_rate_in_a_tensor_is_read_by_the_kernel() -> None:
    gradients, ends = noise([(5, 9)], 4, torch.float32, "cpu"), []
    for rate in (torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), 0.25):
        params = start([(5, 9)], torch.float32, "cpu")
        walk(AdaShift(params, lr=rate, n=2, block="row", fused=True), params, gradients)
        ends.append(params[0].detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_nothing_is_launched_without_a_gradient() -> None:
    optimizer = AdaShift([*start([(5,)], torch.float32, "cpu"), nn.Parameter(torch.empty(0))], fused=True)
    optimizer.param_groups[0]["params"][1].grad = torch.empty(0)
    with launches() as seen:
        optimizer.step()
    assert seen == []


def test_addresses_are_sent_again_only_when_one_has_changed() -> None:
    shape = (5, 9)
    (param,), cache = start([shape], torch.float32, "cpu"), {}
    zeros = [torch.zeros(()), torch.zeros(()), torch.zeros((), dtype=torch.int32), torch.zeros(2)]
    kept = Batch(
        [param.detach()], [draw(shape, 0)], *([x] for x in zeros), [torch.zeros(shape)], [torch.zeros(2, *shape)]
    )
    settings = Settings(0.01, 0.9, 0.99, 2, "max", "tensor", 1e-10, 0.0, True, False, None)
    kernels.fused_step(kept, settings, cache)
    table, plan = cache["table"], cache["plan"]
    kernels.fused_step(kept, settings, cache)
    assert cache["table"] is table
    moved = kept._replace(grads=[draw(shape, 1)])
    kernels.fused_step(moved, settings, cache)
    assert cache["table"] is not table and cache["plan"] is plan
    assert int(zeros[0]) == 3 and float(zeros[3][0]) == float(moved.grads[0].abs().max().square())


def test_double_precision_is_refused_with_the_reason() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    param.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="a parameter is torch.float64, and the kernels take float32"):
        AdaShift([param], fused=True).step()


def test_runs_repeat_bit_for_bit() -> None:
    ends = []
    for _ in range(2):
        params = start(SHAPES, torch.float32, "cpu")
        optimizer = AdaShift(params, n=1, phi="l2", fused=True)
        walk(optimizer, params, noise(SHAPES, 3, torch.float32, "cpu"))
        ends.append([p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_benchmark_checks_what_it_times_and_a_wrong_kernel_is_refused(monkeypatch) -> None:
    toy = dict(models=(("toy", TWO),), n=1)
    found = list(kernels_bench.cases("cpu", **toy))
    assert [case.name for case in found] == [name for name, _, _ in kernels_bench.VARIANTS]
    for case in (found[0], found[4]):
        error, allowed = case.parity()
        assert error <= allowed
    assert found[0].moved == 28 * found[0].size["parameters"] and sum(map(math.prod, kernels_bench.GPT2)) == 124_439_808
    found[0].runs["triton"]()
    right = kernels.fused_step

    def wrong(batch, settings, *rest):
        right(batch, dataclasses.replace(settings, lr=1.01 * settings.lr), *rest)

    monkeypatch.setattr(kernels, "fused_step", wrong)
    error, allowed = next(kernels_bench.cases("cpu", **toy)).parity()
    assert error > allowed

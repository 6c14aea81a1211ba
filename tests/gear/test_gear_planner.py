"""The budget planner: exact knapsack, exact bytes, honest errors."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from zq_lib.core.models import tiny
from zq_lib.gear import PRESETS, GearCache, GearConfig, measure, planner
from zq_lib.gear.planner import candidate_errors, capture, knapsack, layer_nbytes, plan

CHOICES = tuple(GearConfig.plain((k, v), group=8, buffer=8, sinks=2) for k in (2, 4, 8) for v in (2, 4, 8))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    items, options = draw.randint(1, 5), draw.randint(1, 5)
    costs = [[draw.randint(1, 30) for _ in range(options)] for _ in range(items)]
    losses = [[draw.random() for _ in range(options)] for _ in range(items)]
    budget = draw.randint(sum(map(min, costs)), sum(map(max, costs)))

    def total(table: list, choice: tuple | list) -> float:
        return sum(table[i][j] for i, j in enumerate(choice))

    every = itertools.product(range(options), repeat=items)
    best = min(total(losses, c) for c in every if total(costs, c) <= budget)
    found = knapsack(costs, losses, budget)
    assert total(costs, found) <= budget and total(losses, found) == pytest.approx(best)


def test_a_thinned_front_stays_within_the_budget_and_close_to_the_best(monkeypatch) -> None:
    draw = random.Random(0)
    costs = [[draw.randint(1, 10**6) for _ in range(8)] for _ in range(12)]
    losses = [[1 / c for c in row] for row in costs]
    budget = sum(map(sum, costs)) // 8
    exact = knapsack(costs, losses, budget)
    monkeypatch.setattr(planner, "STATES", 64)
    thin = knapsack(costs, losses, budget)
    spent = sum(costs[i][j] for i, j in enumerate(thin))
    lost = [sum(losses[i][j] for i, j in enumerate(choice)) for choice in (thin, exact)]
    assert spent <= budget and lost[1] * (1 - 1e-9) <= lost[0] <= 1.2 * lost[1]


def test_a_budget_below_the_cheapest_says_what_would_do(llama, ids) -> None:
    with pytest.raises(ValueError, match="budget=3 is below the cheapest choice; give at least 5"):
        knapsack([[2, 9], [3, 4]], [[1, 0], [1, 0]], 3)
    with pytest.raises(ValueError, match=r"bits=2.5 is below the cheapest choice for 66 tokens; give at least 6.0,"):
        plan(llama, ids, bits=2.5, tokens=66, candidates=CHOICES)
    least = sum(layer_nbytes(CHOICES[0], 66, 2, 8) for _ in range(3))
    with pytest.raises(
        ValueError, match=f"nbytes=100 is below the cheapest choice for 66 tokens; give at least {least},"
    ):
        plan(llama, ids, nbytes=100, tokens=66, candidates=CHOICES)
    assert plan(llama, ids, nbytes=least, tokens=66, candidates=CHOICES).configs == (CHOICES[0],) * 3
    assert plan(llama, ids, bits=6.0, tokens=66, candidates=CHOICES).bits == 6.0


@pytest.mark.parametrize("tokens", [66, 100])
def test_the_predicted_bytes_are_the_caches_to_the_byte(llama, ids, tokens: int) -> None:
    made = plan(llama, ids, bits=7.0, tokens=tokens, candidates=CHOICES)
    cache = GearCache(llama.config, made.configs)
    with torch.no_grad():
        llama(ids[:, :tokens], past_key_values=cache)
    assert cache.nbytes() == made.nbytes == sum(r["bytes"] for r in made.rows)
    assert measure.compressed_bits(cache) == pytest.approx(made.bits) and made.bits <= 7.0
    assert made.tried == 9 and len(made.configs) == len(made.rows) == 3


@pytest.mark.parametrize("tokens", [3, 100, 391])
@pytest.mark.parametrize(
    "config",
    [
        *(make() for make in PRESETS.values()),
        GearConfig.plain(8, meta_dtype="float32"),
        GearConfig(factor_bits=8, outlier_scope="head", recent=10, bits=(3, 2)),
        GearConfig(scheme="kcvt", value_vector="all", buffer=20, outliers=(0.0, 0.03), rank=(0, 3)),
        GearConfig(scheme="per_token", group=32, buffer=64, outlier_round="floor"),
    ],
)
def test_the_size_formula_is_that_of_a_layer(config: GearConfig, tokens: int) -> None:
    layer = GearCache(tiny("llama").config, config).layers[0]
    layer.update(*torch.randn(2, 1, 3, tokens, 64, generator=torch.Generator().manual_seed(0)))
    assert sum(layer.nbytes().values()) == layer_nbytes(config, tokens, 3, 64)


def test_a_larger_budget_is_never_worse_and_is_used(llama, ids) -> None:
    made = [plan(llama, ids, bits=b, tokens=66, candidates=CHOICES) for b in (6.0, 7.0, 8.0, 12.0)]
    errors, sizes = [p.error for p in made], [p.nbytes for p in made]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes) and errors[-1] < errors[0] / 4
    assert made[-1].configs == (CHOICES[-1],) * 3


def test_a_plan_is_no_worse_than_the_same_setting_everywhere(llama, ids) -> None:
    made = plan(llama, ids, bits=8.0, tokens=66, candidates=CHOICES)
    uniform = [e[4] for e in (candidate_errors(c, CHOICES) for c in capture(llama, ids))]  # 4 bits, 4 bits
    assert made.error <= (sum(e * e for e in uniform) / 3) ** 0.5


def test_what_is_captured_gives_the_models_own_attention(llama, ids) -> None:
    outputs = []
    modules = [layer.self_attn.o_proj for layer in llama.model.layers]
    hooks = [m.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for m in modules]
    found = capture(llama, ids, queries=16)
    for hook in hooks:
        hook.remove()
    assert llama.config._attn_implementation == "sdpa" and len(found) == 3
    for layer, seen in zip(found, outputs, strict=True):
        mine = layer.attend(layer.keys, layer.values).transpose(1, 2).flatten(2)
        assert torch.allclose(mine, seen[:, -16:], atol=1e-5)


def test_exact_keys_have_no_error_and_every_row_says_why(llama, ids) -> None:
    errors = candidate_errors(capture(llama, ids)[0], CHOICES)
    assert errors[0] > errors[4] > errors[8] > 0 and errors[8] < 0.02
    for row in plan(llama, ids, bits=8.0, tokens=66, candidates=CHOICES).rows:
        assert "would save" in row["why"] or "would cost" in row["why"]
        assert row["setting"].startswith("keys ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give exactly one of the two budgets"),
        ({"bits": 3.0, "nbytes": 10}, "give exactly one of the two budgets"),
        ({"bits": 8.0, "candidates": ()}, "leaves nothing to choose from"),
        (
            {"bits": 8.0, "candidates": (CHOICES[0], CHOICES[1].but(sinks=0))},
            r"candidates differ in sinks \(\[0, 2\]\)",
        ),
        ({"bits": 8.0, "tokens": 9}, "tokens=9 is too short a prompt .* plan for at least 10"),
    ],
)
def test_bad_requests_are_refused(llama, ids, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(llama, ids, **{"tokens": 66, "candidates": CHOICES, **given})


def test_a_text_too_short_to_calibrate_on_is_refused(llama, ids) -> None:
    with pytest.raises(ValueError, match="ids hold 70 tokens, too few .* give at least 74"):
        plan(llama, ids[:, :70], bits=8.0, tokens=66, candidates=CHOICES)


def test_layers_that_stay_dense_are_not_planned(ids) -> None:
    with pytest.raises(ValueError, match="has layers that GearCache does not compress"):
        plan(tiny("gemma3"), ids, bits=8.0, tokens=66, candidates=CHOICES)


def test_the_default_candidates_are_29_and_share_their_exact_tokens() -> None:
    found = planner.default_candidates()
    assert len(set(found)) == len(found) == 29
    assert {(c.sinks, c.buffer, c.recent) for c in found} == {(4, 64, 0)}

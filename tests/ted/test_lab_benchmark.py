"""TED's benchmarks in small sizes fill their tables, and the committed tables meet what the method's page asks for."""

from __future__ import annotations

import pytest
import torch

from zq_lib.bench.harness import results
from zq_lib.core.lab import FULL
from zq_lib.ted import benchmark, digits, lens, text
from zq_lib.ted.arms import START

pytestmark = pytest.mark.timeout(600)


def silent(_: str) -> None: ...


def test_the_digits_tables_have_every_seed_width_side_and_arm(monkeypatch) -> None:
    monkeypatch.setitem(digits.SIZES, FULL, digits.Size(192, 128, 64, 1, 1, 1, 1))
    monkeypatch.setattr(benchmark, "DIGIT_SEEDS", (0, 1))
    found = benchmark.two_digits(silent)
    assert len(found["selectivity"]) == 2 * 5 * 2 * 2 and len(found["selectivity_means"]) == 5 * 2 * 2
    assert len(found["selectivity_claims"]) == 3
    arms = [r["arm"] for r in found["digits_means"]]
    assert arms == [START, "labels only", "KD"] + [
        f"{name}, weight {w}" for w in (1, 10) for name in ("LWD", "TED 64", "TED 8")
    ]
    for row in found["digits_means"]:
        assert row["seeds"] == 2 and row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert (row["difference"] == "") == (row["arm"] == "labels only")


@pytest.mark.assets
def test_the_text_tables_compare_every_arm_on_the_whole_test(monkeypatch) -> None:
    size = text.Size(64, 32, 64, 12, 1, 1, 1)
    monkeypatch.setitem(text.SIZES, FULL, size)
    monkeypatch.setattr(benchmark, "SEEDS", (0, 1))
    found = benchmark.real_text(silent)
    assert len(found["text"]) == 2 * (1 + len(text.ARMS)) and len(found["text_means"]) == 1 + len(text.ARMS)
    assert found["text_teacher"][0]["test"] == 64 and len(found["text_claims"]) == 4
    pair = next(r for r in found["text_pairs"] if (r["first"], r["second"]) == (text.TED.name, text.PCA.name))
    values = {(r["seed"], r["arm"]): r["accuracy"] for r in found["text"]}
    gaps = [values[s, text.TED.name] - values[s, text.PCA.name] for s in (0, 1)]
    assert pair["seeds"] == 2 and pair["accuracy_difference"] == pytest.approx(sum(gaps) / 2)
    assert pair["accuracy_low"] <= pair["accuracy_difference"] <= pair["accuracy_high"]


def test_the_chunked_divergence_that_is_timed_has_the_value_and_gradient_of_the_plain_one(monkeypatch) -> None:
    s, t = torch.randn(2, 64, 3000, generator=torch.Generator().manual_seed(0))
    found = []
    for way in (benchmark.plain_divergence, benchmark.chunked_divergence):
        own = s.clone().requires_grad_()
        of = own * 1
        loss = way(of, t)
        loss.backward()
        found.append((float(loss.detach()), own.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-9)
    monkeypatch.setattr(benchmark, "VOCABULARIES", (512,))
    (row,) = benchmark.time_cost(silent)
    assert row["vocabulary"] == 512 and row["share"] == pytest.approx(1 / row["gain"]) and row["ours"] > 0


def test_the_peak_memory_of_the_chunked_divergence_is_that_of_a_chunk() -> None:
    assert 0 < benchmark._peak_of({"way": "chunked", "rows": 512, "vocabulary": 20_000}) < 12  # the logits: 41 each


def test_the_committed_probes_meet_the_bounds_of_the_methods_page() -> None:
    claims = results("ted_selectivity_claims")
    assert len(claims) == 3 and all(r["holds"] for r in claims)
    assert len({r["seed"] for r in results("ted_selectivity")}) >= 5


def test_the_committed_text_table_has_eight_seeds_of_the_whole_test_set() -> None:
    runs = results("ted_text")
    assert len({r["seed"] for r in runs}) >= 8
    assert {r["arm"] for r in runs} == {START, *(arm.name for arm in text.ARMS)}
    assert results("ted_text_teacher")[0]["test"] == 3382
    claims = {r["claim"]: r["holds"] for r in results("ted_text_claims")}
    assert claims["Distilling the output is better than the start, on the mean"]
    assert claims["TED is not worse than layer-wise distillation, on the mean"]


def test_the_committed_weights_are_the_best_of_those_tried() -> None:
    rows = results("ted_text_weights")
    for arm in text.ARMS:
        if arm.target is not None:
            loss = {
                w: sum(r["nll"] for r in rows if (r["arm"], r["weight"]) == (arm.name, w))
                for w in benchmark.CHOSEN_FROM
            }  # fmt: skip
            assert text.WEIGHTS[arm] == min(loss, key=loss.get), arm.name


def test_in_the_committed_lens_every_layer_gains_and_late_layers_know_more() -> None:
    rows = results("ted_lens")
    layers = [r for r in rows if r["layer"] != "model"]
    assert len(layers) == 6 and all(r["lens"] < r["identity"] for r in layers)
    assert layers[-1]["lens"] == min(r["lens"] for r in layers) and rows[-1]["lens"] < layers[-1]["lens"]


def test_in_the_committed_decoder_runs_every_arm_learns() -> None:
    rows = results("ted_distill")
    for seed in {r["seed"] for r in rows}:
        for arm in lens.ARMS:
            own = [r["perplexity"] for r in rows if (r["seed"], r["arm"]) == (seed, arm.name)]
            assert len(own) > 3 and own[-1] < own[0] / 5


def test_the_committed_costs_meet_the_goals() -> None:
    rows = {r["what"]: r for r in results("ted_cost")}
    assert rows["divergence of 49,152 words"]["share"] <= 0.6
    memory = [r for r in rows.values() if r["unit"] == "MB"]
    assert max(r["ours"] for r in memory) < 10 and max(r["plain"] for r in memory) > 200
    assert next(r for r in rows.values() if r["what"].startswith("first stage"))["gain"] >= 20

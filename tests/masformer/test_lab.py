"""What the notebook and the README claim: live on the quick preset, and how claims are read from tables."""

from __future__ import annotations

import pytest

from zq_lib.core.models import tiny
from zq_lib.masformer import lab
from zq_lib.masformer.config import MASFormerConfig


@pytest.fixture(scope="module")
def quick(smollm2):
    model, tokenizer = smollm2
    return lab.run(seed=0, model=model, tokenizer=tokenizer)


def test_eight_profiled_layers_keep_retrieval_and_eight_even_ones_lose_it(quick) -> None:
    rows = {r["plan"]: r for r in quick.tables["plans"]}
    assert rows["full"]["accuracy"] >= 0.9 and rows["profiled"]["accuracy"] >= 0.8
    assert rows["even"]["accuracy"] <= lab.CHANCE_DIGIT
    assert rows["full"]["perplexity"] < rows["profiled"]["perplexity"] < rows["even"]["perplexity"]
    assert rows["profiled"]["KV bytes"] <= 0.33, "at 1,024 tokens, against full attention"
    assert rows["profiled"]["score entries"] == rows["even"]["score entries"] < 0.37


def test_one_full_layer_recalls_and_local_layers_do_not(quick) -> None:
    rows = {r["layers"]: r for r in quick.tables["recall"]}
    assert rows["L F L L"]["accuracy"] >= 0.99 and rows["L L L L"]["accuracy"] <= 0.16
    assert rows["L L L L"]["score entries"] < rows["L F L L"]["score entries"] < 0.6


def test_the_claims_carry_the_numbers_of_the_tables(quick) -> None:
    claims = {c.statement: c for c in quick.claims}
    kept = claims["Without training, eight profiled layers of thirty keep retrieval"]
    rows = {r["plan"]: r for r in quick.tables["plans"]}
    assert f"{rows['profiled']['accuracy']:.2f}" in kept.measured
    assert claims["Eight layers placed by a fixed schedule lose it"].holds
    assert claims["Perplexity hides that loss"].holds


def test_the_chosen_layers_are_marked(quick) -> None:
    rows = quick.tables["importance"]
    assert len(rows) == 30 and sum(r["in 8"] for r in rows) == 8 and sum(r["in 12"] for r in rows) == 12
    assert all(r["in 12"] for r in rows if r["in 8"])


def table(**accuracy: float) -> list[dict]:
    base = {"sinks": 4, "window": "64", "log p": -0.1, "score entries": 0.36, "KV bytes": 0.31}
    rows = [base | {"plan": "full", "full layers": 30, "accuracy": 1.0, "perplexity": 10.0, "window": ""}]
    return rows + [
        base | {"plan": plan, "full layers": 8, "accuracy": value, "perplexity": 10.2}
        for plan, value in accuracy.items()
    ]


@pytest.mark.parametrize("ours, even, holds", [(0.95, 0.1, (True, True)), (0.8, 0.5, (False, False))])
def test_a_claim_that_does_not_hold_says_so(ours, even, holds) -> None:
    found = {c.statement: c.holds for c in lab.claims({"plans": table(profiled=ours, even=even)})}
    assert found["Without training, eight profiled layers of thirty keep retrieval"] == holds[0]
    assert found["Eight layers placed by a fixed schedule lose it"] == holds[1]
    assert found["With a window of 64 perplexity hardly changes"]


def test_another_model_is_profiled_and_a_plan_of_ones_own_is_measured(smollm2) -> None:
    _, tokenizer = smollm2
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    config = MASFormerConfig(full=(2,), window=32, sinks=2)
    bench = lab.Bench(model, tokenizer, config, 0, lambda _: None)
    assert len(bench.importance.drop) == 3
    assert bench.plan("given", 0) == config.plan(3) and bench.plan("profiled", 1).layers.count(None) == 1
    row = bench.row("given", 0, lab.passkey.selection(tokenizer, count=1, tokens=120), window=16)
    assert row["full layers"] == 1 and "perplexity" not in row


def test_an_unknown_budget_or_table_is_refused() -> None:
    with pytest.raises(ValueError, match="budget='most'"):
        lab.run(budget="most")
    with pytest.raises(ValueError, match="only='speed' is not a table; choose from recall, importance, plans"):
        lab.run(budget="full", only=["speed"])

"""What the notebook and the README claim: live on the quick preset, and in the committed tables."""

from __future__ import annotations

import pytest

from zq_lib.bench.harness import results
from zq_lib.pasta import HeadProfile, MarkedText, Span, lab, shipped_profile
from zq_lib.pasta.evaluate import written_out

CONTROLS = (lab.RANDOM, lab.LUCKY, lab.LUCKLESS, lab.OTHERS)


@pytest.fixture(scope="module")
def quick(smollm2):
    model, tokenizer = smollm2
    return lab.run(seed=0, model=model, tokenizer=tokenizer)


def test_every_claim_holds_on_the_quick_preset(quick) -> None:
    assert len(quick.claims) == 4
    assert [c.statement for c in quick.claims if not c.holds] == []


def test_the_quick_preset_finds_the_heads_of_the_shipped_profile(quick) -> None:
    """Gradient gates on 12 prompts against the exact gains on 24: at least four of the ten heads are the same."""
    found = {(h["layer"], h["head"]) for h in quick.tables["heads"]}
    assert len(found & set(shipped_profile("conflict").top(10).pairs)) >= 4


def test_unsteered_the_old_fact_wins_and_steered_the_new_one(quick) -> None:
    assert quick.find("main", condition="unsteered")["es"] <= 0.45
    assert quick.find("main", condition="PASTA, 10 heads")["es"] >= 0.95


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget='most'"):
        lab.run(budget="most")


def _value(table: str, column: str, **where: object) -> float:
    (row,) = [r for r in results(f"pasta_{table}") if all(r[k] == v for k, v in where.items())]
    return float(row[column])


@pytest.mark.parametrize(
    ("task", "condition", "low", "high"),
    [
        ("conflict", "unsteered", 0.25, 0.45),
        ("conflict", "own top 10", 0.97, 1.0),
        ("conflict", lab.OTHERS, 0.0, 0.45),
        ("paraphrase", "own top 10", 0.95, 1.0),
        ("pick", "unsteered", 0.5, 0.5),
        ("pick", "own top 10", 0.97, 1.0),
    ],
)
def test_the_committed_efficacy_is_within_its_bounds(task: str, condition: str, low: float, high: float) -> None:
    assert low <= _value("main", "es", task=task, condition=condition) <= high


@pytest.mark.parametrize("task", ["conflict", "paraphrase", "pick"])
def test_plain_random_draws_help_only_where_they_hold_one_of_the_best_heads(task: str) -> None:
    """Why the control outside the top 40 is shown beside them: half of all draws of 20 hold a useful head."""
    n, es = ({c: _value("main", column, task=task, condition=c) for c in CONTROLS} for column in ("n", "es"))
    per_draw = _value("main", "n", task=task, condition="unsteered")
    assert n[lab.LUCKY] / per_draw == 5 and n[lab.LUCKLESS] / per_draw == 5
    assert n[lab.RANDOM] == n[lab.OTHERS] == lab.RANDOM_DRAWS * per_draw
    assert es[lab.RANDOM] == pytest.approx((es[lab.LUCKY] + es[lab.LUCKLESS]) / 2, abs=1e-4)
    assert es[lab.LUCKLESS] <= 0.45 < es[lab.RANDOM] < es[lab.LUCKY] - 0.1
    assert _value("main", "es", task=task, condition="own top 20") > es[lab.LUCKY] + 0.2


def test_keyword_inclusion_rises_from_at_most_8_to_at_least_15_of_20() -> None:
    assert _value("keyword", "keyword", condition="unsteered") <= 8 / 20
    assert _value("keyword", "keyword", condition="conflict top 10") >= 15 / 20


def test_the_price_is_shown_beside_the_gain() -> None:
    gained = _value("price", "keyword", condition="alpha 0.01") - _value("price", "keyword", condition="unsteered")
    kept = _value("price", "question_kept", condition="alpha 0.01") - _value(
        "price", "question_kept", condition="unsteered"
    )
    assert gained > 0.3 and kept < 0


def test_the_effect_rises_with_a_smaller_alpha_and_saturates() -> None:
    for task in ("conflict", "pick"):
        p = [r["p"] for r in results("pasta_alpha") if r["task"] == task]
        assert all(b >= a - 0.02 for a, b in zip(p, p[1:], strict=False))
        assert abs(p[-1] - p[-3]) < 0.05 < p[-1] - p[0]


def test_every_committed_claim_holds() -> None:
    claims = results("pasta_claims")
    assert len(claims) == 7 and all(c["holds"] for c in claims)


def test_profiling_is_as_cheap_and_as_good_as_said() -> None:
    rows = {r["method"]: r for r in results("pasta_profiling")}
    assert rows["staircase"]["times_cheaper"] >= 5 and rows["gradient"]["times_cheaper"] >= 100
    assert rows["staircase"]["difference"] < 1e-4 and rows["gradient"]["spearman"] >= 0.7


def test_generation_costs_at_most_a_tenth_more() -> None:
    assert all(r["ratio"] <= 1.10 for r in results("pasta_generation"))


@pytest.mark.parametrize("task", ["conflict", "pick"])
def test_a_shipped_profile_belongs_to_the_embedded_model(task: str, smollm2) -> None:
    profile: HeadProfile = shipped_profile(task)
    profile.check(smollm2[0])
    assert len(profile) == 10 and profile.method == "staircase" and profile.items == 24
    assert profile.pairs == profile.top(10).pairs


def test_marks_can_be_written_into_the_text() -> None:
    marked = MarkedText("a bc d", (Span(0, 1), Span(2, 4)))
    assert written_out(marked, "quotes").text == '"a" "bc" d'
    assert written_out(marked, "bold") == MarkedText("**a** **bc** d")
    with pytest.raises(ValueError, match="marks='caps' is not known"):
        written_out(marked, "caps")

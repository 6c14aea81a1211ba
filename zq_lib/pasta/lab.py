"""PASTA's experiment: profile, steer, compare; the paper's claims as rows (sections 5 and 6 of the paper, scaled down).

`run(budget="quick")` is the notebook's minute. `run(budget="full")` fills every table over all test items; `zq bench
pasta` writes them to `bench/results/pasta_*.csv`, from where notebook and README read them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import models
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget, proportion
from zq_lib.pasta import items
from zq_lib.pasta.config import Heads, PastaConfig
from zq_lib.pasta.evaluate import Choice, answers, forced_choice
from zq_lib.pasta.make_profile import probes
from zq_lib.pasta.profiles import HeadProfile, as_map, intersection, shipped_profile, union
from zq_lib.pasta.profiling import Probe, profile_heads
from zq_lib.pasta.steering import attach

ALPHAS = (1.0, 0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
QUICK_PROBES, QUICK_ITEMS = 12, 24
RANDOM_DRAWS = 10
RANDOM = f"20 random heads ({RANDOM_DRAWS} draws)"
LUCKY, LUCKLESS = "the draws with one of the ten best", "the draws without"
OTHERS = f"20 random heads not in the top 40 ({RANDOM_DRAWS} draws)"


def run(
    config: PastaConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """Steer the embedded model (or the one given) and test the paper's claims.

    `config` sets alpha and mode; heads are what the experiment varies. The full budget fills the tables
    of `TABLES`, or `only` some of them, and judges the claims where it has the main one. Raises ValueError for an
    unknown budget.
    """
    check_budget(budget)
    config = config or PastaConfig.quick()
    if model is None or tokenizer is None:
        model, tokenizer = models.load()
    bench = _Bench(model, tokenizer, config, seed, say)
    if budget != FULL:
        return LabResult("pasta", budget, seed, *_quick(bench))
    tables = {name: TABLES[name](bench) for name in (only or TABLES)}
    return LabResult("pasta", budget, seed, _claims(tables["main"]) if "main" in tables else (), tables)


class _Bench:
    """Model, settings and the three ways of asking, with one condition at a time steered."""

    def __init__(self, model, tokenizer, config: PastaConfig, seed: int, say) -> None:  # noqa: ANN001
        self.model, self.tokenizer, self.config, self.seed, self.say = model, tokenizer, config, seed, say

    def steered(self, heads: Heads | None, **settings: Any):  # noqa: ANN201
        """A context that gives a `Steering`, or None for the model as it is."""
        if heads is None:
            return nullcontext()
        chosen = heads.heads if isinstance(heads, HeadProfile) else heads
        return attach(self.model, self.config, heads=chosen, **settings)

    def ask(self, test: list[items.Item], heads: Heads | None, **how: Any) -> Choice:
        """Ask every item with one head set steered."""
        settings = {k: how.pop(k) for k in ("alpha", "protect") if k in how}
        with self.steered(heads, **settings) as steering:
            return forced_choice(self.model, self.tokenizer, test, steering, **how)

    def choose(self, test: list[items.Item], heads: Heads | list[dict] | None, label: Row, **how: Any) -> Row:
        """One row; several head sets, for example random draws, are pooled."""
        self.say(" ".join(map(str, label.values())))
        sets = heads if isinstance(heads, list) else [heads]
        return Choice.pooled([self.ask(test, one, **how) for one in sets]).row(**label)

    def tell(self, prompts: list[str], heads: Heads | None, label: Row, marks: str | None = None, **settings: Any):  # noqa: ANN201
        self.say(" ".join(map(str, label.values())))
        with self.steered(heads, **settings) as steering:
            return answers(self.model, self.tokenizer, prompts, steering, marks=marks)

    def random_heads(self, k: int, draws: int, without: HeadProfile | None = None) -> list[dict[int, list[int]]]:
        """Random sets differ much from each other, so one draw says little; most of 20 heads have a useful one."""
        barred = set(without.pairs) if without is not None else set()
        text = self.model.config.get_text_config()
        cells = [(layer, h) for layer in range(text.num_hidden_layers) for h in range(text.num_attention_heads)]
        cells = [c for c in cells if c not in barred]
        return [as_map(random.Random(self.seed + i).sample(cells, k)) for i in range(draws)]


def _quick(bench: _Bench) -> tuple[tuple[Claim, ...], dict[str, list[Row]]]:
    found = profile_heads(
        bench.model,
        bench.tokenizer,
        probes("conflict")[::2][:QUICK_PROBES],
        k=10,
        task="conflict",
        alpha=bench.config.alpha,
    )
    step = len(items.conflict("test")) // QUICK_ITEMS
    test = items.conflict("test")[::step][:QUICK_ITEMS]
    rows = []
    for condition, heads, how in (
        ("unsteered", None, {}),
        ("quote marks", None, {"marks": "quotes"}),
        ("PASTA, 10 heads", found, {}),
        ("10 random heads", bench.random_heads(10, draws=2), {}),
        ("all heads", "all", {}),
    ):
        rows.append(bench.choose(test, heads, {"task": "conflict", "condition": condition}, **how))
    table = {r["condition"]: r for r in rows}
    ours = table["PASTA, 10 heads"]
    claims = (
        _rises("Steering makes the model prefer the marked fact", table["unsteered"]["es"], ours["es"], 0.3),
        _likelier("Quote marks in the prompt do much less", table["quote marks"]["p"], ours["p"]),
        _likelier("Random heads do much less", table["10 random heads"]["p"], ours["p"]),
        _likelier("Steering every head does much less", table["all heads"]["p"], ours["p"]),
    )
    return claims, {"main": rows, "heads": [{"layer": layer, "head": h} for layer, h in found.pairs]}


def _rises(statement: str, low: float, high: float, margin: float) -> Claim:
    return Claim(statement, f"efficacy rises by {margin} or more", f"{low:.2f} → {high:.2f}", high >= low + margin)


def _likelier(statement: str, other: float, ours: float, margin: float = 0.2) -> Claim:
    expected = f"probability of the marked fact at least {margin} lower"
    return Claim(statement, expected, f"{other:.2f} against {ours:.2f}", other <= ours - margin)


def _main(bench: _Bench) -> list[Row]:
    """Three tasks under every condition: no steering, marks in the text, and head sets of every origin."""
    own = {task: shipped_profile(task) for task in ("conflict", "pick")}
    both = list(own.values())
    quick = {task: profile_heads(bench.model, bench.tokenizer, probes(task), k=20, task=task) for task in own}
    tests = {"conflict": items.conflict("test"), "paraphrase": items.conflict("test"), "pick": items.pick("test")}
    rows = []
    for task, test in tests.items():
        mine, other = ("pick", "conflict") if task == "pick" else ("conflict", "pick")
        conditions: list[tuple[str, Heads | None, dict]] = [
            ("unsteered", None, {}),
            ("** marks", None, {"marks": "bold"}),
            ("* marks", None, {"marks": "stars"}),
            ("quote marks", None, {"marks": "quotes"}),
            *((f"own top {k}", own[mine].top(k), {}) for k in (5, 10, 20, 40)),
            ("other task's top 20", own[other].top(20), {}),
            ("intersection of top 60", intersection(both, 60), {}),
            ("union of top 10", union(both, 10), {}),
            ("gradient top 20", quick[mine], {}),
            ("all heads", "all", {}),
            (OTHERS, bench.random_heads(20, RANDOM_DRAWS, without=own[mine].top(40)), {}),
        ]
        for name, heads, how in conditions:
            size = 0 if heads is None else 270 if heads == "all" else 20 if name == OTHERS else len(heads)
            label = {"task": task, "condition": name, "heads": size}
            rows.append(bench.choose(test, heads, label, paraphrase=task == "paraphrase", **how))
        rows += _random(bench, task, test, set(own[mine].top(10).pairs))
    return rows


def _random(bench: _Bench, task: str, test: list[items.Item], best: set[tuple[int, int]]) -> list[Row]:
    """Plain random draws pooled, then split by whether a draw happens to hold one of the `best` heads."""
    bench.say(f"{task} {RANDOM}")
    draws = bench.random_heads(20, RANDOM_DRAWS)
    said = [bench.ask(test, heads, paraphrase=task == "paraphrase") for heads in draws]
    lucky = [any((layer, h) in best for layer, hs in heads.items() for h in hs) for heads in draws]
    parts = {RANDOM: said}
    for name, wanted in ((LUCKY, True), (LUCKLESS, False)):
        parts[name] = [choice for choice, held in zip(said, lucky, strict=True) if held == wanted]
    return [Choice.pooled(part).row(task=task, condition=name, heads=20) for name, part in parts.items() if part]


def _alpha(bench: _Bench) -> list[Row]:
    """The effect against alpha, on each task's own ten heads."""
    tests = {"conflict": items.conflict("test"), "pick": items.pick("test")}
    return [
        bench.choose(test, shipped_profile(task).top(10), {"task": task, "alpha": alpha}, alpha=alpha)
        for task, test in tests.items()
        for alpha in ALPHAS
    ]


def _keyword(bench: _Bench) -> list[Row]:
    """Free generation: does the answer include the word that the marked instruction asks for?"""
    own = [Probe([{"role": "user", "content": k.prompt}], k.reference) for k in items.keywords("profile")]
    found = profile_heads(bench.model, bench.tokenizer, own, k=10, task="keyword")
    conditions: list[tuple[str, Heads | None, str | None]] = [
        ("unsteered", None, None),
        ("** marks", None, "bold"),
        ("quote marks", None, "quotes"),
        *((f"10 random heads (draw {i + 1})", h, None) for i, h in enumerate(bench.random_heads(10, draws=3))),
        *((f"keyword gradient top {k}", found.top(k), None) for k in (3, 5, 10)),
        ("conflict top 10", shipped_profile("conflict").top(10), None),
        ("pick top 10", shipped_profile("pick").top(10), None),
    ]
    return [_keyword_row(bench, name, heads, marks) for name, heads, marks in conditions]


def _keyword_row(bench: _Bench, name: str, heads: Heads | None, marks: str | None = None, **settings: Any) -> Row:
    test = items.keywords("test")
    prompts = [k.prompt for k in test]
    if settings.pop("mark_all", False):  # the question is marked as well: nothing but the template is scaled down
        prompts = ["*" + p.replace("*", "") + "*" for p in prompts]
    said = bench.tell(prompts, heads, {"task": "keyword", "condition": name}, marks, **settings)
    present, low, high = proportion([items.has_word(s, k.keyword) for s, k in zip(said, test, strict=True)])
    kept = [items.keeps(s, k.kept) for s, k in zip(said, test, strict=True)]
    return {
        "condition": name, "n": len(test), "keyword": present, "low": low, "high": high,
        "question_kept": proportion(kept)[0], "repeated_bigrams": sum(map(items.repeated_bigrams, said)) / len(said),
    }  # fmt: skip


def _price(bench: _Bench) -> list[Row]:
    """What the emphasis costs the rest of the prompt, and the knobs that trade one for the other."""
    profile = shipped_profile("conflict")
    conditions: list[tuple[str, Heads | None, dict]] = [
        ("unsteered", None, {}),
        ("alpha 0.01", profile.top(10), {}),
        ("alpha 0.05", profile.top(10), {"alpha": 0.05}),
        ("alpha 0.2", profile.top(10), {"alpha": 0.2}),
        ("5 heads", profile.top(5), {}),
        ("first token protected", profile.top(10), {"protect": "first"}),
        ("special tokens protected", profile.top(10), {"protect": "special"}),
        ("question marked as well", profile.top(10), {"mark_all": True}),
    ]
    return [_keyword_row(bench, name, heads, **settings) for name, heads, settings in conditions]


def _instructions(bench: _Bench) -> list[Row]:
    """Where a model of this size cannot show the effect: capitals, JSON, French."""
    profile, rows = shipped_profile("conflict"), []
    for kind in items.INSTRUCTIONS:
        test = items.instructions(kind)
        for name, heads in (("unsteered", None), ("conflict top 10", profile.top(10)), ("all heads", "all")):
            said = bench.tell([t.prompt for t in test], heads, {"task": kind, "condition": name})
            form, low, high = proportion([t.followed(s) for t, s in zip(test, said, strict=True)])
            content = proportion([t.answered(s) for t, s in zip(test, said, strict=True)])[0]
            rows.append(
                {
                    "task": kind, "condition": name, "n": len(test), "form": form, "low": low, "high": high,
                    "form_and_content": content,
                    "repeated_bigrams": sum(map(items.repeated_bigrams, said)) / len(said),
                }
            )  # fmt: skip
    return rows


TABLES = {"main": _main, "alpha": _alpha, "keyword": _keyword, "price": _price, "instructions": _instructions}


def _claims(main: list[Row]) -> tuple[Claim, ...]:
    """The paper's claims on the full tables."""

    def es(task: str, condition: str) -> float:
        return next(r["es"] for r in main if r["task"] == task and r["condition"] == condition)

    def p(task: str, condition: str) -> float:
        return next(r["p"] for r in main if r["task"] == task and r["condition"] == condition)

    best_mark = max(p("conflict", f"{m} marks") for m in ("**", "*", "quote"))

    def gain(statement: str, task: str, condition: str, margin: float) -> Claim:
        return _rises(statement, es(task, "unsteered"), es(task, condition), margin)

    return (
        gain("Steering makes the model use the marked fact", "conflict", "own top 10", 0.5),
        gain("It also does when the question is worded differently", "paraphrase", "own top 10", 0.5),
        gain("It decides between two facts that are equally good", "pick", "own top 10", 0.4),
        gain("Heads found on another task transfer", "conflict", "other task's top 20", 0.5),
        _likelier("Marks written into the prompt do much less", best_mark, p("conflict", "own top 10")),
        _likelier("Random heads do much less", p("conflict", RANDOM), p("conflict", "own top 20")),
        _likelier("Steering every head does much less", p("conflict", "all heads"), p("conflict", "own top 10")),
    )

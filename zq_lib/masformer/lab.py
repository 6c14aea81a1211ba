"""MASFormer's experiment: recall learned from scratch, and retrieval and perplexity of a converted model by plan.

`run(budget="quick")` is the notebook's half minute. `run(budget="full")` fills every table; `zq bench masformer` writes
them to `bench/results/masformer_*.csv`, from where notebook and README read them. Layers are chosen on one family of
prompts and judged on another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import data, models
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget
from zq_lib.masformer import passkey
from zq_lib.masformer.config import MASFormerConfig
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.passkey import HELD_OUT_PASSAGES, Probe, retrieve
from zq_lib.masformer.profiling import Importance, profile, shipped
from zq_lib.masformer.spans import SpanPlan, placement
from zq_lib.masformer.tiny import CHANCE, train_recall
from zq_lib.masformer.training import documents, perplexity

TINY = {"F F F F": (0, 1, 2, 3), "F L L L": (0,), "L F L L": (1,), "L L L F": (3,), "L L L L": ()}
TINY_LAYERS, TINY_WINDOW, TINY_STEPS = 4, 8, 300
WIDER = 128  # the window whose perplexity is reported beside
QUICK_TINY, QUICK_STEPS = ("L F L L", "L L L L"), 100
COUNT, COUNT_LONG = 8, 12  # full layers below 1,000 tokens and at 2,000
CHANCE_DIGIT = 0.35  # a plan below this does no better than guess digits and repeat itself
TEXTS, TEXT_TOKENS, CONTEXT = 2, 512, 128  # perplexity: of the tokens after the first CONTEXT


def run(
    config: MASFormerConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """Convert the embedded model (or the one given) without training, by several plans, and test the claims.

    `config` sets window, kind and sinks of the local layers; which layers are full is what the experiment varies, and
    a config that lists its own is measured beside the others as the plan "given". `seed` starts the tiny decoders and
    draws the random plan. The full budget fills the tables of `TABLES`, or `only` some. Raises ValueError for an
    unknown budget or table.
    """
    check_budget(budget)
    if unknown := [name for name in only if name not in TABLES]:
        raise ValueError(f"only={unknown[0]!r} is not a table; choose from {', '.join(TABLES)}")
    if model is None or tokenizer is None:
        model, tokenizer = models.load()
    bench = Bench(model, tokenizer, config or MASFormerConfig.quick(), seed, say)
    if budget != FULL:
        tables = {"recall": _recall(bench, QUICK_TINY, QUICK_STEPS), "plans": _quick_plans(bench)}
        tables["importance"] = _importance(bench)
    else:
        tables = {name: TABLES[name](bench) for name in only or TABLES}
    return LabResult("masformer", budget, seed, claims(tables), tables)


class Bench:
    """Model, settings, texts and the importance of the layers."""

    def __init__(self, model, tokenizer, config: MASFormerConfig, seed: int, say) -> None:  # noqa: ANN001
        self.model, self.tokenizer, self.config, self.seed, self.say = model, tokenizer, config, seed, say
        self.layers = model.config.get_text_config().num_hidden_layers

    @cached_property
    def importance(self) -> Importance:
        """The shipped one where it fits the model, else measured."""
        try:
            shipped().check(self.model)
            return shipped()
        except ValueError:
            return profile(self.model, passkey.selection(self.tokenizer), say=self.say)

    @cached_property
    def texts(self) -> list[Tensor]:
        """Texts for perplexity, [512] each: biographies that no prompt is made of."""
        passages = data.quac_passages()[HELD_OUT_PASSAGES : HELD_OUT_PASSAGES + 40]
        long = [ids[:TEXT_TOKENS] for ids in documents(self.tokenizer, passages) if len(ids) >= TEXT_TOKENS]
        return long[:TEXTS]

    def plan(self, name: str, count: int, **changes: int) -> SpanPlan:
        """A plan by its name in the tables. `changes`: another window or other sinks than the config's."""
        every = range(self.layers)
        if name == "full":
            return SpanPlan((None,) * self.layers)
        if name == "profiled":
            full: Sequence[int] = self.importance.choose(count)
        elif name == "all local":
            full = ()
        elif name == "random":
            full = random.Random(self.seed).sample(every, count)
        elif name == "given":
            return self.config.plan(self.layers)
        else:
            full = placement(name, self.layers, count)
        span = changes.get("window", self.config.window)
        sinks = changes.get("sinks", self.config.sinks)
        return SpanPlan.mixed(self.layers, full=full, span=span, kind=self.config.kind, sinks=sinks)

    def row(
        self, name: str, count: int, probes: Sequence[Probe], texts: Sequence[Tensor] = (), **changes: int
    ) -> Row:  # fmt: skip
        """One plan's retrieval on `probes`, perplexity on `texts`, and price at 1,024 tokens."""
        plan = self.plan(name, count, **changes)
        self.say(f"{name}, {len(plan.full)} full layers {changes or ''}")
        with attach(self.model, plan, backend=self.config.backend):
            found = retrieve(self.model, probes)
            ppl = perplexity(self.model, texts, CONTEXT) if texts else None
        length = 1024
        row: Row = {
            "plan": name,
            "full layers": len(plan.full),
            "window": str(changes.get("window", self.config.window)) if len(plan.full) < self.layers else "",
            "sinks": plan.sinks,
            "accuracy": found.accuracy,
            "log p": found.mean_log_p,
        }
        if ppl is not None:
            row["perplexity"] = ppl
        return row | {
            "score entries": plan.cost(length).share,
            "KV bytes": plan.kv_bytes(length, 1, 1, 1) / (2 * length * self.layers),
        }


def _recall(bench: Bench, plans: Sequence[str] = tuple(TINY), steps: int = TINY_STEPS) -> list[Row]:
    """Tiny decoders on recall, one row per plan: steps until solved, accuracy at the end, work relative to full."""
    rows = []
    for name in plans:
        bench.say(f"recall with {name}")
        plan = SpanPlan.mixed(TINY_LAYERS, full=TINY[name], span=TINY_WINDOW)
        last = list(train_recall(plan, seed=bench.seed, steps=steps))[-1]
        rows.append({"layers": name, "score entries": plan.cost(40).share, **last})
    return rows


def _importance(bench: Bench) -> list[Row]:
    """What each layer is worth, and whether it is among the 8 and 12 chosen."""
    found = bench.importance
    return [
        {"layer": i, "drop": drop, "in 8": i in found.choose(COUNT), "in 12": i in found.choose(COUNT_LONG)}
        for i, drop in enumerate(found.drop)
    ]


def _quick_plans(bench: Bench) -> list[Row]:
    probes = passkey.held_out(bench.tokenizer, 2, 250, 300)
    texts = [text[:256] for text in bench.texts[:1]]
    names = ["full", "profiled", "even", *(["given"] if isinstance(bench.config.full, tuple) else [])]
    return [bench.row(name, COUNT, probes, texts) for name in names]


def _plans(bench: Bench) -> list[Row]:
    """Every placement with 8 of 30 layers full, on twelve held-out prompts of 480 to 930 tokens."""
    probes = passkey.held_out(bench.tokenizer)
    asked: list[tuple[str, int, dict]] = [
        ("full", bench.layers, {}), ("profiled", 8, {}), ("profiled", 8, {"window": WIDER}), ("profiled", 10, {}),
        ("profiled", 12, {}),
        ("bottom", 8, {}), ("top", 8, {}), ("middle", 8, {}), ("even", 8, {}), ("random", 8, {}),
        ("all local", 0, {}), ("profiled", 8, {"sinks": 0}), ("all local", 0, {"sinks": 0}),
    ]  # fmt: skip
    if isinstance(bench.config.full, tuple):
        asked.append(("given", len(bench.config.full), {}))
    return [bench.row(name, count, probes, bench.texts, **changes) for name, count, changes in asked]


def _selection(bench: Bench) -> list[Row]:
    """Retrieval by number of full layers, on the prompts that the layers were chosen on."""
    probes = passkey.selection(bench.tokenizer)
    rows = [bench.row("profiled", count, probes) for count in (0, 2, 4, 6, 8, 10, 15)]
    return rows + [bench.row(name, 15, probes) for name in ("bottom", "top", "even")]


def _long(bench: Bench) -> list[Row]:
    """The same at about 2,000 tokens, four held-out prompts."""
    probes = passkey.held_out(bench.tokenizer, 4, 1535, 2383, seed=2)
    asked: list[tuple[str, int, dict]] = [
        ("full", bench.layers, {}), ("profiled", 8, {}), ("profiled", 8, {"window": WIDER}), ("profiled", 12, {}),
        ("bottom", 12, {}), ("even", 12, {}), ("all local", 0, {}),
    ]  # fmt: skip
    return [bench.row(name, count, probes, **changes) for name, count, changes in asked]


TABLES = {"recall": _recall, "importance": _importance, "plans": _plans, "selection": _selection, "long": _long}


def claims(tables: dict[str, list[Row]]) -> tuple[Claim, ...]:
    """What the tables say."""
    found: list[Claim] = []
    if "recall" in tables:
        found += _recall_claims({r["layers"]: r for r in tables["recall"]})
    if "plans" in tables:
        found += _plan_claims(tables["plans"])
    if "long" in tables:
        row = _pick(tables["long"], "profiled", COUNT_LONG)
        found.append(
            Claim(
                "At about 2,000 tokens twelve profiled layers of thirty are enough",
                "0.95 of the digits or more",
                f"{row['accuracy']:.2f}",
                row["accuracy"] >= 0.95,
            )
        )
    return tuple(found)


def _recall_claims(rows: dict[str, Row]) -> list[Claim]:
    mixed = {name: row for name, row in rows.items() if name.count("F") == 1}
    local = rows["L L L L"]
    return [
        Claim(
            "One full layer is enough to recall what lies beyond every window",
            f"accuracy 0.99 or more within {TINY_STEPS} steps",
            ", ".join(f"{name}: {row['accuracy']:.3f} after {row['step']} steps" for name, row in mixed.items()),
            all(row["accuracy"] >= 0.99 for row in mixed.values()),
        ),
        Claim(
            "Local layers alone cannot",
            f"accuracy 0.15 or less (chance is {CHANCE:.3f})",
            f"{local['accuracy']:.3f} after {local['step']} steps",
            local["accuracy"] <= 0.15,
        ),
    ]


def _plan_claims(rows: list[Row]) -> list[Claim]:
    full, ours = _pick(rows, "full"), _pick(rows, "profiled", COUNT)
    wider = [r for r in rows if (r["plan"], r["full layers"], r["window"]) == ("profiled", COUNT, str(WIDER))]
    fixed = [r for r in rows if r["plan"] in ("bottom", "top", "even")]
    return [
        Claim(
            "Without training, eight profiled layers of thirty keep retrieval",
            "0.90 of the digits or more",
            f"{ours['accuracy']:.2f} (full {full['accuracy']:.2f})",
            ours["accuracy"] >= 0.90,
        ),
        *(_perplexity_claim(row, full) for row in [ours, *wider]),
        Claim(
            "Eight layers placed by a fixed schedule lose it",
            f"{CHANCE_DIGIT} of the digits or less",
            ", ".join(f"{r['plan']}: {r['accuracy']:.2f}" for r in fixed),
            all(r["accuracy"] <= CHANCE_DIGIT for r in fixed),
        ),
        Claim(
            "Perplexity hides that loss",
            "less than twice that of full attention for every fixed schedule",
            ", ".join(f"{r['plan']}: {r['perplexity'] / full['perplexity']:.2f} times" for r in fixed),
            all(r["perplexity"] < 2 * full["perplexity"] for r in fixed),
        ),
    ]


def _perplexity_claim(row: Row, full: Row) -> Claim:
    ratio = row["perplexity"] / full["perplexity"]
    return Claim(
        f"With a window of {row['window']} perplexity hardly changes",
        "at most 1.03 times that of full attention",
        f"{ratio:.3f} times {full['perplexity']:.1f}",
        ratio <= 1.03,
    )


def _pick(rows: list[Row], plan: str, count: int | None = None) -> Row:
    """The plan's row with the sinks of the experiment: the first of that name and count."""
    return next(r for r in rows if r["plan"] == plan and count in (None, r["full layers"]))

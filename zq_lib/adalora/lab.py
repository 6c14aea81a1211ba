"""AdaLoRA's experiments: planted needs, where the answer is known, and real text, where it is not (section 4).

`run(budget="quick")` is the notebook's minute: ranks of 8 are hidden in four of twelve matrices, and AdaLoRA, LoRA and
LoRA cut by SVD look for them. `run(budget="full")` is the full size and adds text classification; `zq bench adalora`
repeats that over seeds and writes `bench/results/adalora_*.csv`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zq_lib.adalora.adaptation import Adaptation, attach
from zq_lib.adalora.baselines import attach_lora, truncate_by_svd
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.adalora.trace import RankTrace
from zq_lib.core import data, models
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget
from zq_lib.core.questions import cut_batches, question_batches
from zq_lib.core.seeding import seed_everything

PLANTED_RANK, PLANTED_MATRICES = 8, 4
ADALORA, UNIFORM, WIDE, CUT = "AdaLoRA", "LoRA, equal ranks", "LoRA, initial rank", "LoRA, then SVD"


@dataclass(frozen=True)
class Size:
    """How large an experiment is."""

    layers: int
    steps: int
    batch: int
    tokens: int
    pool: int  # training texts, gone through again and again
    test: int


PLANTED = {"quick": Size(2, 160, 8, 12, 320, 96), FULL: Size(3, 400, 8, 16, 1024, 256)}
TEXT = {"quick": Size(6, 60, 16, 24, 480, 200), FULL: Size(6, 300, 16, 32, 3600, 1200)}
RATE = {"planted": 1e-2, "text": 2e-3}
LARGEST_SHARE = {"quick": 0.5, FULL: 0.35}  # of LoRA's error that AdaLoRA's may be; the short training is not done yet


@dataclass
class Problem:
    """A model to adapt, batches to train it on, and how to judge it. `judge` gives the error on the test set."""

    model: nn.Module
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    loss: Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]
    judge: Callable[[nn.Module], float]
    rate: float
    planted: frozenset[str] = frozenset()
    train_also: tuple[str, ...] = ()

    def error(self) -> float:
        """Error of the model as it is now; the smaller the better."""
        return self.judge(self.model)

    def copy(self) -> Problem:
        """The same problem with a model of its own, for a training beside others."""
        return replace(self, model=copy.deepcopy(self.model))


def planted(seed: int = 0, size: Size = PLANTED["quick"], ranks: Mapping[str, int] | None = None) -> Problem:
    """A teacher that differs from the model by hidden updates: of rank 8 in four random matrices, or as `ranks` says.

    The model is the first layers of MiniLM-L6. Singular values of an update fall from 1 to 1/2, times a quarter of its
    matrix's Frobenius norm. The student must reproduce the teacher's hidden states on film review snippets. Raises
    ValueError when `ranks` names a matrix that the model does not have, or plants nothing.
    """
    base, tokenizer = models.load("minilm-l6")
    base.encoder.layer = base.encoder.layer[: size.layers]
    base.pooler = None
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    draw = random.Random(seed)
    drawn = dict.fromkeys(draw.sample(linear, PLANTED_MATRICES), PLANTED_RANK)
    ranks = drawn if ranks is None else ranks
    chosen = frozenset(name for name, rank in ranks.items() if rank)
    if not chosen or not chosen <= set(linear):
        wrong = next(iter(chosen - set(linear)), None)
        raise ValueError(
            f"ranks names {wrong!r}, which is no matrix of the model; choose among {linear[0]!r}, ..., {linear[-1]!r}"
            if wrong
            else f"ranks={dict(ranks)!r} plants nothing; give at least one matrix a rank above 0"
        )
    source = torch.Generator().manual_seed(seed)
    hidden = {name: _update(base.get_submodule(name).weight, ranks[name], source) for name in sorted(chosen)}
    texts = [r.text for r in data.rated("movies")]
    draw.shuffle(texts)
    encoded = [
        dict(tokenizer(part, padding="max_length", truncation=True, max_length=size.tokens, return_tensors="pt"))
        for part in (texts[: size.pool], texts[size.pool : size.pool + size.test])
    ]
    with torch.no_grad():
        for name, change in hidden.items():
            base.get_submodule(name).weight += change
        train, test = (cut_batches(e, size.batch, _states(base, e)) for e in encoded)
        for name, change in hidden.items():
            base.get_submodule(name).weight -= change

    def loss(out: Any, target: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"][..., None]
        return ((out.last_hidden_state - target).square() * mask).sum() / (mask.sum() * target.shape[-1])

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        return sum(float(loss(model(**x), y, x)) for x, y in test) / len(test)

    return Problem(base, train, loss, judge, RATE["planted"], chosen)


def text(seed: int = 0, size: Size = TEXT["quick"]) -> Problem:
    """TREC: which of six kinds of answer does a question ask for? MiniLM-L6 with a new head; error is 1 - accuracy."""
    seed_everything(seed)
    model, tokenizer = models.load("minilm-l6", num_labels=6)
    train, test, _ = question_batches(tokenizer, size.pool, size.test, size.batch, size.tokens, seed)

    def loss(out: Any, target: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(out.logits, target)

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        wrong = [(model(**x).logits.argmax(-1) != y).float() for x, y in test]
        return float(torch.cat(wrong).mean())

    return Problem(model, train, loss, judge, RATE["text"], train_also=("classifier",))


def _update(weight: Tensor, rank: int, source: torch.Generator) -> Tensor:
    """A random change of a rank, whose largest singular value is a quarter of the weight's Frobenius norm."""
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=source)).Q for n in weight.shape)
    return (left * torch.linspace(1, 0.5, rank)) @ right.T * (torch.linalg.matrix_norm(weight) / 4)


def _states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    rows = len(inputs["input_ids"])
    parts = [model(**{k: v[i : i + 64] for k, v in inputs.items()}).last_hidden_state for i in range(0, rows, 64)]
    return torch.cat(parts)


def training(problem: Problem, handle: Adaptation, steps: int) -> Iterator[tuple[int, float]]:
    """Train `handle` on the problem; gives (step, task loss) after each step, so that a page can show it live."""
    optimizer = torch.optim.AdamW(handle.parameters(), lr=problem.rate, weight_decay=0)
    for step in range(steps):
        inputs, target = problem.batches[step % len(problem.batches)]
        loss = problem.loss(problem.model(**inputs), target, inputs)
        loss.backward()
        for group in optimizer.param_groups:  # a short warm-up, then a straight line down
            group["lr"] = problem.rate * min(1.0, (step + 1) / 10, (steps - step) / (0.3 * steps))
        optimizer.step()
        optimizer.zero_grad()
        yield step, float(loss.detach())


@dataclass(frozen=True)
class Moment:
    """Where a comparison is: after a training step of `method`, and, with `row`, at the end of it."""

    method: str
    step: int
    loss: float
    handle: Adaptation
    row: Row | None = None


def watch(problem: Problem, config: AdaLoraConfig, steps: int, seed: int, only: Sequence[str] = ()) -> Iterator[Moment]:
    """Every method at the same final budget and the same scale, step by step; closing it leaves the model clean.

    LoRA of equal ranks trains fewer parameters than AdaLoRA at first, LoRA of the initial rank as many; the latter is
    also cut to the budget by SVD, without training afterwards. `only` names some of AdaLoRA and the two LoRAs.
    """
    start = problem.error()
    heads = [{k: v.clone() for k, v in problem.model.get_submodule(n).state_dict().items()} for n in problem.train_also]

    def begin() -> None:
        torch.manual_seed(seed)
        for name, state in zip(problem.train_also, heads, strict=True):
            problem.model.get_submodule(name).load_state_dict(state)

    def row(method: str, handle: Adaptation) -> Row:
        found = handle.ranks()
        total = sum(found.values())
        hit = sum(r for n, r in found.items() if n in problem.planted)
        return {
            "method": method, "ranks": total, "parameters": handle.parameter_count(), "error": problem.error(),
            "start": start, "on_planted": hit / total if problem.planted else 0.0,
        }  # fmt: skip

    uniform = int(config.target_rank)
    for method, rank in ((ADALORA, 0), (UNIFORM, uniform), (WIDE, config.init_rank)):
        if only and method not in only:
            continue
        begin()
        if method == ADALORA:
            handle = attach(problem.model, config, total_steps=steps, train_also=problem.train_also)
        else:
            handle = attach_lora(problem.model, rank, config.scale, train_also=problem.train_also)
        with handle:
            for step, loss in training(problem, handle, steps):
                yield Moment(method, step, loss, handle)
            yield Moment(method, step, loss, handle, row(method, handle))
            if method == WIDE:
                truncate_by_svd(handle, uniform * len(handle.adapters))
                yield Moment(CUT, step, loss, handle, row(CUT, handle))
    begin()


def compare(
    problem: Problem, config: AdaLoraConfig, steps: int, seed: int, say: Callable[[str], None], only: Sequence[str] = ()
) -> tuple[list[Row], list[Row], RankTrace | None]:
    """`watch` to its end: a row per method, AdaLoRA's ranks, and its trace."""
    rows, ranks, trace = [], [], None
    for moment in watch(problem, config, steps, seed, only):
        if moment.row is None:
            if moment.step == 0:
                say(moment.method)
            continue
        rows.append(moment.row)
        if moment.method == ADALORA:
            trace, found = moment.handle.trace, moment.handle.ranks()
            ranks = [{"matrix": n, "planted": n in problem.planted, "rank": r} for n, r in found.items()]
    return rows, ranks, trace


def run(
    config: AdaLoraConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """Plant needs and look for them; the full budget uses the full size and adds real text.

    `config` sets ranks, score and penalty; the number of steps is the experiment's. `only` names some of the tables
    "planted" and "text". Raises ValueError for an unknown budget.
    """
    check_budget(budget)
    tables: dict[str, list[Row]] = {}
    claims: tuple[Claim, ...] = ()
    names = only or (("planted", "text") if budget == FULL else ("planted",))
    if "planted" in names:
        size = PLANTED[budget]
        chosen = replace(config or AdaLoraConfig.quick(), total_steps=size.steps)
        rows, ranks, trace = compare(planted(seed, size), chosen, size.steps, seed, say)
        tables |= {"planted": rows, "ranks": ranks, "trace": trace_rows(trace)}
        claims = planted_claims(rows, ranks, LARGEST_SHARE[budget])
    if "text" in names:
        size = TEXT[budget]
        chosen = replace(config or AdaLoraConfig.quick(), total_steps=size.steps)
        tables["text"] = compare(text(seed, size), chosen, size.steps, seed, say)[0]
    return LabResult("adalora", budget, seed, claims, tables)


def trace_rows(trace: RankTrace) -> list[Row]:
    """The trace as rows: one per allocation and matrix."""
    return [
        {"step": step, "budget": budget, "matrix": name, "rank": int(rank), "regrown": regrown}
        for step, budget, regrown, ranks in zip(trace.steps, trace.budgets, trace.regrown, trace.ranks(), strict=True)
        for name, rank in zip(trace.names, ranks, strict=True)
    ]


def planted_claims(rows: Sequence[Row], ranks: Sequence[Row], share: float) -> tuple[Claim, ...]:
    """The paper's claims where the truth is known, and the one that is not the paper's: post-hoc SVD is as good."""
    found = {r["method"]: r for r in rows}
    ours, uniform, cut = (found[m] for m in (ADALORA, UNIFORM, CUT))
    chance = sum(r["planted"] for r in ranks) / len(ranks)
    factor = ours["error"] / uniform["error"]
    return (
        Claim(
            "The ranks go where they are needed",
            "at least 58 % of the ranks on the planted matrices",
            f"{ours['on_planted']:.0%}, by chance {chance:.0%}",
            ours["on_planted"] >= 0.58,
        ),
        Claim(
            "Adaptive ranks beat equal ranks at the same final budget",
            f"error at most {share} of LoRA's",
            f"{factor:.2f}",
            factor <= share,
        ),
        Claim(
            "The final budget is met exactly",
            f"{uniform['ranks']} ranks",
            f"{ours['ranks']} ranks",
            ours["ranks"] == uniform["ranks"],
        ),
        Claim(
            "A LoRA of the initial rank, cut afterwards by SVD, is a close rival",
            "error within a factor of two of AdaLoRA's",
            f"{cut['error'] / ours['error']:.2f} times",
            0.5 <= cut["error"] / ours["error"] <= 2,
        ),
    )

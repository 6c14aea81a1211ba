"""LoSparse's experiments: three ways to the same number of weights, trained and untrained (section 7).

`run(budget="quick")` is the notebook's minute: a small encoder learns to tell questions apart while its matrices shrink
to 15 %. `run(budget="full")` adds both one-shot tables on real models; `zq bench losparse` repeats the training over
seeds and writes `bench/results/losparse_*.csv`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.core import models
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget
from zq_lib.core.questions import question_batches
from zq_lib.core.seeding import seed_everything
from zq_lib.losparse import oneshot
from zq_lib.losparse.compression import Compression, attach
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.oneshot import LOW_RANK, ROWS

LOSPARSE, DENSE = "LoSparse", "dense"
METHODS = (LOSPARSE, ROWS, LOW_RANK)
SHARE = 0.05  # rho_L of LoSparse, as in the paper
RATE = 3e-4  # one learning rate for all, as in the experiment that the claims come from
OWN_RATES = {DENSE: 3e-4, LOSPARSE: 1e-3, ROWS: 2e-3, LOW_RANK: 1e-3}  # the best for each that `benchmark.rates` found


@dataclass(frozen=True)
class Size:
    """How large a training is."""

    layers: int
    steps: int
    batch: int
    tokens: int
    pool: int  # training texts, gone through again and again
    test: int


SIZES = {"quick": Size(2, 60, 16, 16, 960, 400), FULL: Size(2, 240, 16, 24, 3840, 1200)}


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> Tensor:
        """Logits [B, classes]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)  # [B, T, 1]
        return self.head((states * mask).sum(1) / mask.sum(1))


Labelled = tuple[Mapping[str, Tensor], Tensor]


@dataclass
class Problem:
    """A model to compress while it learns, batches to learn from, and batches to judge it on."""

    model: nn.Module
    train: Sequence[Labelled]
    test: Sequence[Labelled]

    def loss(self, batch: Labelled) -> Tensor:
        """Mean cross entropy of a batch."""
        return F.cross_entropy(self.model(**batch[0]), batch[1])

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Mean negative log-likelihood and accuracy on the test batches."""
        was = self.model.training
        self.model.eval()
        logits = torch.cat([self.model(**x) for x, _ in self.test])
        labels = torch.cat([y for _, y in self.test])
        self.model.train(was)
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())

    def copy(self) -> Problem:
        """The same problem with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))


def questions(seed: int = 0, size: Size = SIZES["quick"]) -> Problem:
    """TREC: which of six kinds of answer does a question ask for? The first layers of MiniLM-L6 and a new head.

    Embeddings are frozen: they are no part of what is compressed, and would be most of what is trained.
    """
    seed_everything(seed)
    encoder, tokenizer = models.load("minilm-l6")
    encoder.encoder.layer = encoder.encoder.layer[: size.layers]
    encoder.pooler = None
    train, test, kinds = question_batches(tokenizer, size.pool, size.test, size.batch, size.tokens, seed)
    model = Classifier(encoder, len(kinds))
    encoder.embeddings.requires_grad_(False)
    return Problem(model, train, test)


def settings(method: str, ratio: float, steps: int) -> LoSparseConfig:
    """The config of one way to `ratio` of the replaced weights."""
    low_rank = {LOSPARSE: SHARE, ROWS: 0.0, LOW_RANK: ratio}[method]
    return replace(LoSparseConfig.quick(steps), low_rank=low_rank, remaining=ratio - low_rank)


@dataclass(frozen=True)
class Moment:
    """Where a comparison is: after a training step of `method`, and, with `row`, at the end of it.

    `handle` is None for the dense model.
    """

    method: str
    step: int
    loss: float
    handle: Compression | None
    row: Row | None = None


def training(problem: Problem, steps: int, rate: float) -> Iterator[tuple[int, float]]:
    """Train all that is not frozen, AdamW with a straight line down; gives (step, loss) after each step."""
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)  # decay would shrink S and with it the scores
    problem.model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (steps - step) / steps
        loss = problem.loss(problem.train[step % len(problem.train)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step, float(loss.detach())


def watch(
    problem: Problem, ratio: float, steps: int, only: Sequence[str] = METHODS, rates: Mapping[str, float] | None = None
) -> Iterator[Moment]:
    """Each method from the same start to the same share of the replaced weights, step by step.

    `problem` itself is not changed. `rates` are learning rates by method, `RATE` for all if None. The row of a method
    has the share of the replaced layers' parameters that it kept, and the loss and accuracy on the test batches.
    """
    for method in only:
        own, rate = problem.copy(), RATE if rates is None else rates[method]
        torch.manual_seed(0)  # dropout alike
        handle = None if method == DENSE else attach(own.model, settings(method, ratio, steps))
        try:
            for step, loss in training(own, steps, rate):
                yield Moment(method, step, loss, handle)
        except GeneratorExit:  # left half-way: the optimiser is followed no more
            if handle is not None:
                handle.merge()
            raise
        if handle is not None:
            report = handle.finish()
        nll, accuracy = own.judge()
        row = {
            "method": method, "ratio": 1.0 if handle is None else ratio, "rate": rate,
            "kept": 1.0 if handle is None else report.ratio, "nll": nll, "accuracy": accuracy,
        }  # fmt: skip
        yield Moment(method, step, loss, handle, row)


def compare(
    problem: Problem, ratio: float, steps: int, say: Callable[[str], None], only: Sequence[str] = METHODS,
    rates: Mapping[str, float] | None = None,
) -> tuple[list[Row], list[Row], list[Row]]:  # fmt: skip
    """`watch` to its end: a row per method, the training losses, and LoSparse's densities over the steps."""
    rows, curves, density = [], [], []
    for moment in watch(problem, ratio, steps, only, rates):
        if moment.row is None:
            if moment.step == 0:
                say(f"{moment.method}, {ratio:.0%}")
            curves.append({"method": moment.method, "ratio": ratio, "step": moment.step, "loss": moment.loss})
            continue
        rows.append(moment.row)
        if moment.method == LOSPARSE:
            density = density_rows(moment.handle)
    return rows, curves, density


def density_rows(handle: Compression) -> list[Row]:
    """The density trace as rows: one per mask and matrix."""
    trace = handle.trace
    return [
        {"step": step, "share": share, "matrix": name, "rows": kept, "outputs": outputs, "density": kept / outputs}
        for step, share, rows in zip(trace.steps, trace.shares, trace.rows, strict=True)
        for name, kept, outputs in zip(trace.names, rows, trace.outputs, strict=True)
    ]


def run(
    config: LoSparseConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """Compress while training, by three ways to the same ratio; the full budget adds what costs no training.

    `config` sets the ratio (low_rank + remaining); how it is divided is what the experiment varies. `only` names some
    of the tables "trained", "errors" and "perplexity". Raises ValueError for an unknown budget or table.
    """
    check_budget(budget)
    if unknown := [name for name in only if name not in TABLES]:
        raise ValueError(f"only={unknown[0]!r} is not a table; choose from {', '.join(TABLES)}")
    names = only or (TABLES if budget == FULL else ("trained", "errors"))
    config = config or LoSparseConfig.quick()
    tables: dict[str, list[Row]] = {}
    if "trained" in names:
        size, ratio = SIZES[budget], config.low_rank + config.remaining
        methods = (DENSE, *METHODS) if budget == FULL else METHODS
        rows, curves, density = compare(questions(seed, size), ratio, size.steps, say, methods)
        tables |= {"trained": rows, "curves": curves, "density": density}
    if "errors" in names:
        tables["errors"] = oneshot.errors(say, quick=budget != FULL)
    if "perplexity" in names:
        tables["perplexity"] = oneshot.perplexities(say)
    return LabResult("losparse", budget, seed, claims(tables), tables)


TABLES = ("trained", "errors", "perplexity")


def claims(tables: Mapping[str, list[Row]]) -> tuple[Claim, ...]:
    """What the tables say."""
    found: list[Claim] = []
    if "trained" in tables:
        found += trained_claims(tables["trained"])
    if "errors" in tables:
        found += oneshot.error_claims(tables["errors"])
    if "perplexity" in tables:
        found += oneshot.perplexity_claims(tables["perplexity"])
    return tuple(found)


def trained_claims(rows: Sequence[Row], rates: str = "at one learning rate") -> list[Claim]:
    """The paper's claim: at equal parameters the sum of both is better than either alone."""
    found = {r["method"]: r for r in rows}
    return [
        Claim(
            f"Trained {rates}, LoSparse is better than {method} at the same number of parameters",
            f"a smaller loss on the test texts than {found[method]['nll']:.3f}",
            f"{found[LOSPARSE]['nll']:.3f}",
            found[LOSPARSE]["nll"] < found[method]["nll"],
        )
        for method in (ROWS, LOW_RANK)
    ]

"""LoSparse's benchmarks: what compression costs untrained and trained, and what it saves in time, file and memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.core import language, models
from zq_lib.core.lab import FULL, Claim, Row, mean_interval
from zq_lib.core.timing import cpu_seconds, paired_ratio
from zq_lib.losparse import lab, oneshot
from zq_lib.losparse.calibration import Loss, compress_once
from zq_lib.losparse.compression import attach
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Batch
from zq_lib.losparse.lab import DENSE, LOSPARSE, METHODS, OWN_RATES, RATE, SIZES, questions
from zq_lib.losparse.planner import plan as make_plan
from zq_lib.losparse.prices import time_layer
from zq_lib.losparse.storage import save_compressed

Say = Callable[[str], None]
SEEDS = (0, 1, 2)
TRIED_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
ONE, OWN = "at one learning rate", "at each method's own learning rate"
RUNS = (
    (OWN, OWN_RATES, 1.0, (DENSE,)),
    (ONE, None, 0.15, METHODS),
    (OWN, OWN_RATES, 0.15, METHODS),
    (OWN, OWN_RATES, 0.3, METHODS),
)
SPLIT = 9  # a seed whose split is used for nothing but the choice of the learning rates
SHARE = 0.05  # rho_L of everything that is timed
SPEED_RATIOS = (0.5, 0.3, 0.2, 0.1)
SHAPES = (  # inputs, outputs, tokens
    (384, 384, 256), (384, 1536, 256), (1536, 384, 256), (576, 1536, 256), (768, 3072, 256),
    (768, 3072, 32), (576, 1536, 1), (384, 384, 32), (384, 384, 1),
)  # fmt: skip
CALLS = ((8, 32), (4, 128), (1, 16))  # batch and tokens of a call of the whole encoder
TARGETS = (0.7, 0.5, 0.3)


def errors(say: Say) -> dict[str, list[Row]]:
    """Squared error of three approximations at equal parameters, on every matrix of MiniLM and 49 of SmolLM2."""
    rows = oneshot.errors(say)
    return {"errors": rows, "errors_claims": _rows(oneshot.error_claims(rows))}


def perplexity(say: Say) -> dict[str, list[Row]]:
    """Perplexity of SmolLM2 compressed without training."""
    rows = oneshot.perplexities(say)
    return {"perplexity": rows, "perplexity_claims": _rows(oneshot.perplexity_claims(rows))}


def rates(say: Say) -> list[Row]:
    """Test loss of every method at each learning rate, at 15 %, on a split of its own: what `OWN_RATES` rests on."""
    size, rows = SIZES[FULL], []
    for method in (DENSE, *METHODS):
        for rate in TRIED_RATES:
            say(f"rate {rate:g}")
            found, *_ = lab.compare(questions(SPLIT, size), 0.15, size.steps, say, [method], {method: rate})
            rows += found
    return rows


def trained(say: Say) -> dict[str, list[Row]]:
    """The lab's training over seeds and ratios: every run, the means with intervals, curves, densities, claims."""
    size = SIZES[FULL]
    tables: dict[str, list[Row]] = {"trained": [], "curves": [], "density": [], "trained_claims": []}
    for seed in SEEDS:
        problem = questions(seed, size)
        for words, rates, ratio, methods in RUNS:
            say(f"seed {seed}, {words}")
            rows, curves, density = lab.compare(problem, ratio, size.steps, say, methods, rates)
            tables["trained"] += [{"seed": seed, "rates": words, **row} for row in rows]
            if methods == METHODS:
                claims = _rows(lab.trained_claims(rows, words))
                tables["trained_claims"] += [{"seed": seed, "ratio": ratio, **row} for row in claims]
            if seed == SEEDS[0]:
                tables["curves"] += [{"rates": words, **row} for row in curves if row["step"] % 4 == 0]
                tables["density"] += [{"rates": words, "ratio": ratio, **row} for row in density]
    tables["trained_means"] = means(tables["trained"])
    return tables


def means(rows: list[Row]) -> list[Row]:
    """Mean loss and accuracy over seeds with 95 % intervals, and of the loss's difference to LoSparse's, in pairs."""
    found = []
    for words, ratio, method in dict.fromkeys((r["rates"], r["ratio"], r["method"]) for r in rows):
        alike = [r for r in rows if (r["rates"], r["ratio"]) == (words, ratio)]
        own, ours = ([r for r in alike if r["method"] == m] for m in (method, LOSPARSE))
        row: Row = {"rates": words, "ratio": ratio, "method": method, "kept": own[0]["kept"], "seeds": len(own)}
        for name in ("nll", "accuracy"):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval([r[name] for r in own])
        gaps = [r["nll"] - o["nll"] for r, o in zip(own, ours, strict=True)] if ours and method != LOSPARSE else None
        row["minus_losparse"], row["gap_low"], row["gap_high"] = mean_interval(gaps) if gaps else ("", "", "")
        found.append(row)
    return found


def layers(say: Say) -> list[Row]:
    """CPU seconds of one layer, dense and shrunk, in turns: shapes and ratios of the method's description."""
    rows = []
    for inputs, outputs, tokens in SHAPES:
        for ratio in SPEED_RATIOS:
            say(f"{inputs} -> {outputs}, {tokens} tokens, {ratio:.0%}")
            rank = LoSparseConfig(low_rank=SHARE).rank(outputs, inputs)
            kept = round((ratio - SHARE) * outputs)
            found = time_layer(outputs, inputs, rank, kept, tokens, repeats=15)
            rows.append({
                "layer": f"{inputs} to {outputs}", "tokens": tokens, "ratio": ratio, "rank": rank, "rows": kept,
                "shrunk_ms": 1e3 * found["shrunk_s"], "dense_ms": 1e3 * found["dense_s"],
                **{k: found[k] for k in ("gain", "gain_low", "gain_high")},
                "shrunk_parameters": rank * (inputs + outputs) + kept * inputs, "dense_parameters": inputs * outputs,
            })  # fmt: skip
    return rows


def _encoder() -> nn.Module:
    model, _ = models.load("minilm-l6")
    model.pooler = None
    return model


def _small(model: nn.Module, ratio: float) -> nn.Module:
    """A copy at a ratio; which rows stay does not matter to a clock."""
    small = copy.deepcopy(model)
    compress_once(small, LoSparseConfig(low_rank=SHARE, remaining=ratio - SHARE, score="magnitude"))
    return small


@torch.no_grad()
def encoder(say: Say) -> list[Row]:
    """The whole MiniLM-L6 encoder, embeddings and attention included, dense and shrunk, in turns."""
    dense, rows = _encoder(), []
    for ratio in SPEED_RATIOS:
        small = _small(dense, ratio)
        for batch, tokens in CALLS:
            say(f"encoder at {ratio:.0%}, {batch} x {tokens}")
            ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
            found = paired_ratio(lambda m=small, x=ids: m(x), lambda x=ids: dense(x), 21)
            rows.append({
                "ratio": ratio, "batch": batch, "tokens": tokens, "shrunk_ms": 1e3 * found["first_s"],
                "dense_ms": 1e3 * found["second_s"], "gain": found["ratio"], "gain_low": found["ratio_low"],
                "gain_high": found["ratio_high"],
            })  # fmt: skip
    return rows


def step(say: Say) -> list[Row]:
    """CPU seconds of what a training step adds, on the 5.3 million weights of three encoder layers.

    Beside the update of the importance what the published code does to the same gradients: it keeps the importance of
    every entry.
    """
    model = _encoder()
    model.encoder.layer = model.encoder.layer[:3]
    handle = attach(model, low_rank=SHARE, remaining=0.1, total_steps=1000)
    matrices = [m.sparse for m in handle.layers.values()]
    for p in matrices:
        p.grad = torch.randn_like(p)
    entries = [(torch.zeros_like(p), torch.zeros_like(p)) for p in matrices]

    @torch.no_grad()
    def every_entry() -> None:
        for p, (average, window) in zip(matrices, entries, strict=True):
            window.mul_(3).add_((p * p.grad).abs()).div_(4)
            average.mul_(0.85).add_(0.15 * window)

    @torch.no_grad()
    def mask() -> None:
        handle._choose(0.5)
        handle.importance.zero(handle.keep)

    say("importance, entry by entry against row by row")
    found = paired_ratio(lambda: handle.importance.update(13), every_entry, 15)
    state = sum(t.nbytes for t in (handle.importance.average, handle.importance.window))
    say("mask")
    for _ in range(3):
        mask()
    weights = sum(p.numel() for p in matrices)
    return [
        {
            "what": "importance update", "weights": weights, "rows": int(handle.counts.sum()),
            "seconds": found["first_s"], "entry_by_entry_s": found["second_s"], "state_bytes": state,
            "entry_by_entry_bytes": 8 * weights,
        },
        {
            "what": "choice and mask", "weights": weights, "rows": int(handle.counts.sum()),
            "seconds": median(cpu_seconds(mask) for _ in range(31)), "entry_by_entry_s": "", "state_bytes": "",
            "entry_by_entry_bytes": "",
        },
    ]  # fmt: skip


def size(say: Say) -> list[Row]:
    """Bytes of the encoder's saved file and of its parameters in memory, at each ratio; the embeddings stay whole."""
    dense, rows = _encoder(), []
    for ratio in (1.0, *SPEED_RATIOS):
        say(f"size at {ratio:.0%}")
        model = dense if ratio == 1 else _small(dense, ratio)
        numbers = sum(p.numel() for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            if ratio == 1:
                model.save_pretrained(folder)
            else:
                save_compressed(model, folder)
            file = max(path.stat().st_size for path in Path(folder).iterdir())
        memory = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        replaced = sum(p.numel() for n, p in model.encoder.named_parameters() if p.dim() == 2)
        rows.append({
            "ratio": ratio, "parameters": numbers, "replaced": replaced, "file_bytes": file, "memory_bytes": memory,
            "file_per_parameter": file / (4 * numbers),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Case:
    """A model to plan for: what it is judged by, and the call whose time counts."""

    name: str
    model: nn.Module
    batches: list[Batch]
    inputs: list[Batch]
    loss: Loss | None
    tokens: int
    judge: Callable[[nn.Module], float]
    call: Callable[[nn.Module], object]


def _language_model() -> Case:
    model, tokenizer = models.load("smollm2")
    ids = oneshot.help_text(tokenizer)
    pair = torch.stack(oneshot.windows(ids, 0, 2))
    inputs = [{"input_ids": w[None]} for w in oneshot.windows(ids, 512, 8)]
    test = [w for start in oneshot.TESTS for w in oneshot.windows(ids, start)]
    return Case(
        "SmolLM2-135M, perplexity", model, [{"input_ids": pair, "labels": pair}], inputs, None, oneshot.WINDOW,
        lambda m: language.perplexity(m, test), lambda m: m.model(test[0][None]),
    )  # fmt: skip


def _classifier(batch: int, tokens: int) -> Case:
    problem = questions(0, SIZES["quick"])
    for _ in lab.training(problem, SIZES["quick"].steps, RATE):
        pass
    batches = [{**x, "labels": y} for x, y in problem.train[:8]]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return Case(
        f"MiniLM, 2 layers, {batch} x {tokens}, test loss", problem.model.eval(), batches,
        [x for x, _ in problem.train[:8]], loss, batch * tokens,
        lambda m: replace(problem, model=m).judge()[0], lambda m: m(ids, mask),
    )  # fmt: skip


def plan(say: Say) -> dict[str, list[Row]]:
    """Plans for less time without training: what was chosen, what it should cost, and what it then does cost."""
    rows: list[Row] = []
    tried: list[Row] = []
    for case in (_classifier(8, 32), _classifier(1, 16), _language_model()):
        for target in TARGETS:
            say(f"plan for {target:.0%}: {case.name}")
            settings = {"tokens": case.tokens, "inputs": case.inputs, "loss": case.loss, "say": say}
            try:
                made = make_plan(case.model, case.batches, target, **settings)
            except ValueError as no_plan:  # small calls have a price that no setting avoids
                say(str(no_plan))
                continue
            small = copy.deepcopy(case.model)
            handle = made.compress(small)
            with torch.no_grad():
                found = paired_ratio(lambda m=small, c=case: c.call(m), lambda c=case: c.call(c.model), 11)
            rows.append({
                "model": case.name, "target": target, "low_rank": made.config.low_rank,
                "remaining": made.config.remaining, "stay_dense": len(made.stay_dense), "predicted": made.share,
                "parameters": handle.report().model_ratio, "model_time": 1 / found["ratio"],
                "dense": case.judge(case.model), "compressed": case.judge(small),
            })  # fmt: skip
            tried += [{"model": case.name, "target": target, **row} for row in made.rows]
    return {"plan": rows, "plan_shares": tried}


def _rows(claims: list[Claim]) -> list[Row]:
    return [{"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in claims]


BENCHMARKS = {
    "errors": errors, "perplexity": perplexity, "rates": rates, "trained": trained, "layers": layers,
    "encoder": encoder, "step": step, "size": size, "plan": plan,
}  # fmt: skip

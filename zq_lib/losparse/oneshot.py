"""What compression without training costs: in squared error of the weights (7.2), and in perplexity (7.3).

The two rank the methods in opposite order, which is the reason to look at both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zq_lib.core import data, models
from zq_lib.core.lab import Claim, Row
from zq_lib.core.language import perplexity
from zq_lib.losparse.calibration import keep_rows, magnitudes, masked, row_scores
from zq_lib.losparse.config import LoSparseConfig
from zq_lib.losparse.factors import Factors, cut, find_factors
from zq_lib.losparse.layer import size_of
from zq_lib.losparse.targets import find_layers

ROWS, LOW_RANK = "rows only", "low rank only"
EVERY = (0, 5, 10, 15, 20, 25, 29)  # layers of SmolLM2 whose matrices are decomposed
TESTS = (3000, 5000, 7000)  # first tokens of the windows that are judged
Say = Callable[[str], None]
RATIOS = (0.1, 0.2, 0.3, 0.5)
SHARES = (0.0, 0.05, 0.1, 0.2)  # rho_L; 0 is rows only
WINDOW = 256
CHARACTERS = 60_000


def approximation_errors(weight: Tensor, ratios: Sequence[float] = RATIOS) -> Iterator[tuple[float, str, float]]:
    """(ratio, method, error): relative squared error of one matrix [N, K] in the three ways, at equal parameters.

    The rows that stay are those that the low-rank part leaves most of. Nothing is rebuilt: what the leading singular
    triplets explain of a row is a partial sum of its squared coordinates.
    """
    w = weight.detach().double()
    (n, k), total = w.shape, float(w.square().sum())
    small = w if n <= k else w.T
    squares, vectors = torch.linalg.eigh(small @ small.T)  # ascending
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    whole = w.square().sum(1)  # [N]
    if n <= k:
        explained = (vectors.square() * squares).cumsum(1)  # of row i by the first r triplets: sum sigma^2 A_i^2
    else:
        explained = (w @ vectors).square().cumsum(1)
    explained = torch.cat([torch.zeros(n, 1).to(w), explained], 1)  # [N, min(N, K) + 1]
    for ratio in ratios:
        for share in [s for s in SHARES if s < ratio]:
            rank = LoSparseConfig(low_rank=share, remaining=ratio - share).rank(n, k)
            rows = round((ratio * n * k - rank * (n + k)) / k)
            if rows > 0:
                rest = (whole - explained[:, rank]).clamp_min(0).sort().values
                yield ratio, name_of(share), float(rest[: n - min(rows, n)].sum()) / total
        yield ratio, LOW_RANK, float(squares[LoSparseConfig(low_rank=ratio, remaining=0).rank(n, k) :].sum()) / total


def name_of(share: float) -> str:
    """How a row of the tables is called: by its rho_L."""
    return f"LoSparse {share:.0%}" if share else ROWS


def error_rows(model: str, weights: Sequence[Tensor], ratios: Sequence[float] = RATIOS) -> list[Row]:
    """Table 7.2 for one model: the mean relative squared error over its matrices."""
    sums: dict[tuple[float, str], float] = {}
    for weight in weights:
        for ratio, method, error in approximation_errors(weight, ratios):
            sums[ratio, method] = sums.get((ratio, method), 0.0) + error / len(weights)
    return [
        {"model": model, "matrices": len(weights), "ratio": ratio, "method": method, "error": error}
        for (ratio, method), error in sums.items()
    ]


def errors(say: Say, quick: bool = False) -> list[Row]:
    """Table 7.2: all 36 matrices of MiniLM-L6 (12 if `quick`) and 49 of SmolLM2, those of seven of its layers."""
    found = []
    model, _ = models.load("minilm-l6")
    for name, stack in [("MiniLM-L6", model.encoder.layer[:2] if quick else model.encoder.layer)] + (
        [] if quick else [("SmolLM2-135M", [models.load("smollm2")[0].model.layers[i] for i in EVERY])]
    ):
        say(f"errors of {name}")
        found += error_rows(name, [m.weight for block in stack for m in block.modules() if isinstance(m, nn.Linear)])
    return found


def error_claims(rows: Sequence[Row]) -> list[Claim]:
    """In squared error the sum of both is better than rows alone, and worse than low rank alone, at every ratio."""
    found = {(r["model"], r["ratio"], r["method"]): r["error"] for r in rows}
    ours = [(key, error) for key, error in found.items() if key[2].startswith("LoSparse")]
    return [
        Claim(
            f"Untrained and in squared error, LoSparse is {what}",
            f"{sign} at every ratio",
            f"{sum(holds)} of {len(holds)} rows",
            all(holds),
        )
        for what, sign, holds in (
            ("better than rows only", "below", [e < found[m, q, ROWS] for (m, q, _), e in ours]),
            ("worse than low rank only", "above", [e > found[m, q, LOW_RANK] for (m, q, _), e in ours]),
        )
    ]


@dataclass(frozen=True)
class Setting:
    """One column of the perplexity table."""

    method: str
    init: str
    low_rank: float | None  # None: the whole ratio, low rank only
    score: str = "sensitivity"


SETTINGS = (
    Setting(LOW_RANK, "svd", None),
    Setting(ROWS, "svd", 0.0),
    Setting("LoSparse 5%", "svd", 0.05),
    Setting("LoSparse 30%", "svd", 0.3),
    Setting("LoSparse 5%, magnitude", "svd", 0.05, "magnitude"),
    Setting(LOW_RANK, "activation", None),
    Setting("LoSparse 5%", "activation", 0.05),
    Setting("LoSparse 20%", "activation", 0.2),
    Setting("LoSparse 40%", "activation", 0.4),
)
TOTALS = (0.9, 0.7, 0.5)


def perplexities(say: Say, settings: Sequence[Setting] = SETTINGS, totals: Sequence[float] = TOTALS) -> list[Row]:
    """Table 7.3: perplexity of SmolLM2 compressed without training, by setting and ratio.

    The gradient of tokens 0 to 511 of Python's help, covariances on 512 to 2,559, perplexity on three windows behind.
    The factors of one init are computed once, at the largest rank. `keeps` is what is left of the replaced weights.
    """
    model, tokenizer = models.load("smollm2")
    ids = help_text(tokenizer)
    pair = torch.stack(windows(ids, 0, 2))
    batches = [{"input_ids": pair, "labels": pair}]
    inputs = [{"input_ids": w[None]} for w in windows(ids, 512, 8)]
    test = [w for start in TESTS for w in windows(ids, start)]
    found, _ = find_layers(model)
    dense = perplexity(model, test)
    rows: list[Row] = [{"method": "dense", "init": "", "ratio": 1.0, "keeps": 1.0, "perplexity": dense}]
    for init in dict.fromkeys(s.init for s in settings):
        own = [s for s in settings if s.init == init]
        ranks = [max(totals) if s.low_rank is None else s.low_rank for s in own]
        say(f"factors, {init}")
        known = find_factors(model, found, LoSparseConfig(low_rank=max(ranks), remaining=0, init=init), inputs)
        for setting in own:
            scores: dict[str, Tensor] = {}
            for total in totals:
                say(f"{setting.method}, {init}, {total:.0%}")
                share = total if setting.low_rank is None else setting.low_rank
                config = LoSparseConfig(low_rank=share, remaining=total - share, init=init)
                factors = cut(known, config)
                if not scores and share < total:
                    if setting.score == "magnitude":
                        scores = magnitudes(found, factors)
                    else:
                        scores = row_scores(model, found, factors, batches)
                keep = keep_rows(found, scores, config.remaining)
                with masked(found, factors, keep):
                    value = perplexity(model, test)
                rows.append({
                    "method": setting.method, "init": init, "ratio": total, "keeps": kept_share(found, factors, keep),
                    "perplexity": value,
                })  # fmt: skip
    return rows


def kept_share(layers: Mapping[str, nn.Module], factors: Factors, keep: Mapping[str, Tensor]) -> float:
    """Parameters that remain of the layers' weights: r (N + K) + n K of N K."""
    parts = [(*size_of(m), factors[name][0].shape[1], int(keep[name].sum())) for name, m in layers.items()]
    return sum(r * (n + k) + rows * k for n, k, r, rows in parts) / sum(n * k for n, k, _, _ in parts)


def perplexity_claims(rows: Sequence[Row]) -> list[Claim]:
    """The bounds of the method's description (7.5), and that the order is not that of the squared error."""
    found = {(r["method"], r["init"], r["ratio"]): r["perplexity"] for r in rows}
    five = "LoSparse 5%"
    bounds = [
        ("at 90 % with 5 % low rank", 30, found[five, "svd", 0.9]),
        ("at 90 % with 5 % low rank, activation-aware", 22, found[five, "activation", 0.9]),
        ("at 70 % with 5 % low rank", 160, found[five, "svd", 0.7]),
        (
            "at 70 % with 20 to 40 % low rank, activation-aware",
            45,
            min(found["LoSparse 20%", "activation", 0.7], found["LoSparse 40%", "activation", 0.7]),
        ),
    ]
    ours, rest = found[five, "svd", 0.9], [found[m, "svd", 0.9] for m in (LOW_RANK, ROWS)]
    return [
        Claim(f"Untrained SmolLM2 {what}", f"perplexity of {most} or less", f"{value:.1f}", value <= most)
        for what, most, value in bounds
    ] + [
        Claim(
            "Untrained and in perplexity, LoSparse is better than low rank only and rows only",
            "below both at 90 %",
            f"{ours:.1f} against {rest[0]:.3g} and {rest[1]:.3g}",
            ours < min(rest),
        )
    ]


def help_text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokens [n] of the beginning of `core.data.python_help`."""
    text = " ".join(data.python_help())[:CHARACTERS]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(ids: Tensor, start: int, count: int = 1) -> list[Tensor]:
    """`count` windows of 256 tokens, one after the other."""
    return list(ids[start : start + count * WINDOW].split(WINDOW))

"""GEAR's experiment: errors of real keys and values, distance from full precision at equal bits, and at equal bytes.

`run(budget="quick")` is the notebook's quarter of a minute. `run(budget="full")` fills every table on four texts;
`zq bench gear` writes them to `bench/results/gear_*.csv`, from where notebook and README read them. Every quality
stands beside the bits per element that it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import models
from zq_lib.core.lab import FULL, Claim, LabResult, Row, check_budget
from zq_lib.gear import measure
from zq_lib.gear.config import GearConfig
from zq_lib.gear.measure import Expected, Score
from zq_lib.gear.packed import compress

SETTINGS = {
    "plain 2 bit": GearConfig.plain(2),
    "lite": GearConfig.lite(),
    "paper_2bit": GearConfig.paper(2),
    "2 bit + sinks": GearConfig.plain(2, sinks=4),
    "small": GearConfig.small(),
    "K3V2 + sinks": GearConfig.plain((3, 2), sinks=4),
    "plain 3 bit": GearConfig.plain(3),
    "balanced": GearConfig.balanced(),
    "plain 4 bit": GearConfig.plain(4),
    "near_lossless": GearConfig.near_lossless(),
    "paper_4bit": GearConfig.paper(4),
    "8 bit": GearConfig.plain(8),
}
QUICK_SETTINGS = ("plain 2 bit", "lite", "paper_2bit", "plain 3 bit", "balanced")
QUICK_TEXT, QUICK_STEPS = "technical", 96
PAIRS = (  # (setting, against): the difference of the first, position by position
    ("lite", "plain 2 bit"),
    ("paper_2bit", "lite"),
    ("paper_2bit", "plain 3 bit"),
    ("paper_4bit", "plain 4 bit"),
    ("2 bit + sinks", "plain 2 bit"),
    ("balanced", "plain 3 bit"),
    ("near_lossless", "plain 4 bit"),
    ("small", "paper_2bit"),
    ("K3V2 + sinks", "small"),
)
ENOUGH = 2.0  # paired standard errors for one setting to beat another


def parts(bits: int) -> dict[str, GearConfig]:
    """The settings of the error ladder at one width: the backbone alone, one part more, all parts, and another range.

    Outliers are rounded down and a KCVT value shares its range with all heads, as published.
    """
    plain = GearConfig.plain(bits, outlier_round="floor")
    full = plain.but(outliers=0.02, rank=4, rank_decode=2)
    kcvt = {"scheme": "kcvt", "value_vector": "all"}
    return {
        "plain": plain,
        "outliers": plain.but(outliers=0.02),
        "GEAR-L": full.but(outliers=0.0),
        "GEAR": full,
        "KCVT": plain.but(**kcvt),
        "GEAR KCVT": full.but(**kcvt),
        "clip + GEAR": full.but(clip=True),
    }


def run(
    config: GearConfig | None = None,
    seed: int = 0,
    budget: str = "quick",
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LabResult:
    """Compress the embedded model's cache (or that of the one given) and test the paper's claims.

    `config`, if given, is measured beside the others as the setting "given"; `seed` starts the low-rank solver. The
    full budget fills the tables of `TABLES`, or `only` some of them, and judges the claims that they bear on. Raises
    ValueError for an unknown budget or table.
    """
    check_budget(budget)
    if unknown := [name for name in only if name not in TABLES]:
        raise ValueError(f"only={unknown[0]!r} is not a table; choose from {', '.join(TABLES)}")
    if model is None or tokenizer is None:
        model, tokenizer = models.load()
    bench = _Bench(model, tokenizer, config, seed, say)
    if budget != FULL:
        tables = _quick(bench)
    else:
        tables = {}
        for name in only or TABLES:
            tables |= TABLES[name](bench)
    return LabResult("gear", budget, seed, claims(tables), tables)


class _Bench:
    """Model, texts and settings; full-precision runs are kept for the text in work."""

    def __init__(self, model, tokenizer, config: GearConfig | None, seed: int, say) -> None:  # noqa: ANN001
        self.model, self.tokenizer, self.seed, self.say = model, tokenizer, seed, say
        self.settings = SETTINGS if config is None else {**SETTINGS, "given": config}
        self.texts = cache(lambda: measure.texts(tokenizer))

    def scores(self, text: str, names: Sequence[str], steps: int, expected: Expected | None = None) -> dict[str, Score]:
        ids = self.texts()[text]
        expected = expected or measure.full_precision(self.model, ids, steps=steps)
        found = {}
        for name in names:
            self.say(f"{text}: {name}")
            gear = self.settings[name].but(seed=self.seed)
            found[name] = measure.teacher_forced(self.model, ids, gear, steps=steps, expected=expected)
        return found


def _quick(bench: _Bench) -> dict[str, list[Row]]:
    text = QUICK_TEXT
    names = [*QUICK_SETTINGS, *(["given"] if "given" in bench.settings else [])]
    expected = measure.full_precision(bench.model, bench.texts()[text], steps=QUICK_STEPS)
    scores = bench.scores(text, names, QUICK_STEPS, expected)
    some = {layer: expected.prompt[layer] for layer in range(0, len(expected.prompt), 8)}
    layers = _layer_rows(text, some, 2, ("plain", "outliers", "GEAR-L", "GEAR"), bench.seed)
    return {
        "quality": [s.row(text=text, setting=name) for name, s in scores.items()],
        "pairs": _pair_rows(text, scores),
        "layers": layers,
        "errors": _means(layers),
    }


def _errors(bench: _Bench) -> dict[str, list[Row]]:
    """Relative errors of keys and values (no sinks): per layer on the first text, means over layers on all texts."""
    means, layers = [], []
    for text, ids in bench.texts().items():
        bench.say(f"{text}: errors")
        found = dict(enumerate(measure.keys_values(bench.model, ids)))
        for bits in (2, 3, 4) if text == measure.TEXTS[0] else (2,):
            rows = _layer_rows(text, found, bits, tuple(parts(bits)), bench.seed)
            means += _means(rows)
            if text == measure.TEXTS[0]:
                layers += rows
    return {"errors": means, "layers": layers}


def _layer_rows(text: str, found: dict, bits: int, names: Sequence[str], seed: int) -> list[Row]:
    rows = []
    for layer, pair in found.items():
        n = pair[0].shape[2] // 64 * 64
        for name in names:
            gear, row = parts(bits)[name].but(seed=seed), {"text": text, "layer": layer, "bits": bits, "setting": name}
            size = 0
            for side, x, codec in zip(("keys", "values"), pair, (gear.keys, gear.values), strict=True):
                packed = compress(x[:, :, :n], codec, prompt=True)
                row[side] = measure.relative_error(x[:, :, :n], packed.dequantize())
                size += 8 * sum(packed.nbytes().values()) / x[:, :, :n].numel() / 2
            rows.append({**row, "bits_per_element": size})
    return rows


def _means(rows: list[Row]) -> list[Row]:
    """Over layers."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["text"], row["bits"], row["setting"]), []).append(row)

    def mean(of: list[Row], key: str) -> float:
        return sum(r[key] for r in of) / len(of)

    return [
        {
            "text": text, "bits": bits, "setting": setting, "bits_per_element": mean(of, "bits_per_element"),
            "keys": mean(of, "keys"), "values": mean(of, "values"), "layers": len(of),
        }
        for (text, bits, setting), of in groups.items()
    ]  # fmt: skip


def _quality(bench: _Bench) -> dict[str, list[Row]]:
    """KL and top-1 agreement of every setting on every text, and paired differences."""
    quality, pairs = [], []
    for text in measure.TEXTS:
        scores = bench.scores(text, list(bench.settings), measure.STEPS)
        quality += [s.row(text=text, setting=name) for name, s in scores.items()]
        pairs += _pair_rows(text, scores)
    return {"quality": quality, "pairs": pairs}


def _pair_rows(text: str, scores: dict[str, Score]) -> list[Row]:
    rows = []
    for setting, against in PAIRS:
        if setting in scores and against in scores:
            a, b = scores[setting], scores[against]
            difference, error = measure.paired(a, b)
            rows.append(
                {
                    "text": text, "setting": setting, "against": against, "bits": a.bits, "bits_against": b.bits,
                    "difference": difference, "se": error, "z": difference / error if error else 0.0,
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def _greedy(bench: _Bench, new_tokens: int = 64) -> dict[str, list[Row]]:
    """Continue the start of every text greedily: until where are the tokens those of DynamicCache, and how far apart
    in full precision, in log-probability, are the two best tokens there? Near zero it is a tie."""
    rows = []
    for text, ids in bench.texts().items():
        prompt = bench.tokenizer.decode(ids[0, :256])
        for name in ("8 bit", "near_lossless", "balanced", "paper_2bit"):
            bench.say(f"{text}: greedy, {name}")
            pair = measure.generate_pair(bench.model, bench.tokenizer, prompt, bench.settings[name], new_tokens)
            alike = len(pair.full) if pair.divergence is None else pair.divergence
            gap = ""
            if pair.divergence is not None:
                seen = [*bench.tokenizer(prompt).input_ids, *pair.full[:alike]]
                two = bench.model(torch.tensor([seen]), logits_to_keep=1).logits[0, -1].topk(2).values
                gap = float(two[0] - two[1])
            rows.append({"text": text, "setting": name, "tokens": len(pair.full), "alike": alike, "gap": gap})
    return {"greedy": rows}


TABLES = {"errors": _errors, "quality": _quality, "greedy": _greedy}


def claims(tables: dict[str, list[Row]]) -> tuple[Claim, ...]:
    """What the tables say about the paper's claims and about the settings that we recommend instead."""
    found: list[Claim] = []
    if "layers" in tables:
        found += _error_claims(tables["layers"])
    if "quality" in tables:
        found += _quality_claims(tables["quality"], tables["pairs"])
    if "greedy" in tables:
        rows = [r for r in tables["greedy"] if r["setting"] == "8 bit"]
        found.append(
            Claim(
                "At 8 bits greedy generation is that of the full cache",
                "every token of every text",
                ", ".join(f"{r['alike']} of {r['tokens']}{_tie(r)}" for r in rows),
                all(r["alike"] == r["tokens"] for r in rows),
            )
        )
    return tuple(found)


def _tie(row: Row) -> str:
    return f" (where the two best tokens differ by {row['gap']:.3f})" if row["gap"] != "" else ""


def _error_claims(layers: list[Row]) -> list[Claim]:
    table = {(r["bits"], r["setting"], r["layer"]): r for r in layers}
    places = sorted({(bits, layer, side) for bits, _, layer in table for side in ("keys", "values")})

    def compare(statement: str, lower: str, higher: str, gain: float = 0.0, only: int | None = None) -> Claim | None:
        cells = [
            (table[bits, lower, layer][side], table[bits, higher, layer][side])
            for bits, layer, side in places
            if (bits, lower, layer) in table and only in (None, bits)
        ]
        if not cells:
            return None
        below = sum(a < (1 - gain) * b for a, b in cells)
        ratio = sum(a / b for a, b in cells) / len(cells)
        much = f"{gain:.0%} lower" if gain else "lower"
        measured = f"{below} of {len(cells)}, on average {ratio:.2f} times"
        return Claim(statement, f"{much} in every layer, keys and values", measured, below == len(cells))

    made = (
        compare("A low-rank residual lowers the error", "GEAR-L", "plain"),
        compare("Outliers lower it further", "GEAR", "GEAR-L"),
        compare("Low rank helps beside outliers", "GEAR", "outliers"),
        compare("A search for the range lowers it by more at 2 bits", "clip + GEAR", "GEAR", 0.15, only=2),
    )
    return [c for c in made if c is not None]


def _quality_claims(quality: list[Row], pairs: list[Row]) -> list[Claim]:
    names = {r["setting"] for r in quality}

    def rows(setting: str) -> list[Row]:
        return [r for r in quality if r["setting"] == setting]

    def differences(setting: str, against: str) -> list[Row]:
        return [r for r in pairs if (r["setting"], r["against"]) == (setting, against)]

    def said(found: list[Row]) -> str:
        bits = f"{found[0]['bits']:.2f} against {found[0]['bits_against']:.2f} bits"
        return f"{bits}: " + ", ".join(f"{r['difference']:+.4f} ± {r['se']:.4f}" for r in found)

    def beats(statement: str, setting: str, against: str) -> None:
        if {setting, against} <= names:
            found = differences(setting, against)
            expected = f"KL lower by more than {ENOUGH:g} standard errors on every text"
            holds = all(r["difference"] < -ENOUGH * r["se"] for r in found)
            made.append(Claim(statement, expected, said(found), holds))

    made: list[Claim] = []
    beats("At 2 bits a low-rank residual brings the model closer to full precision", "lite", "plain 2 bit")
    beats("Outliers bring it closer still", "paper_2bit", "lite")
    if "paper_2bit" in names:
        found = rows("paper_2bit")
        made.append(
            Claim(
                "The paper's 2-bit GEAR is nearly lossless",
                "93 % top-1 agreement on every text",
                f"{found[0]['bits']:.2f} bits: " + ", ".join(f"{r['top1']:.3f}" for r in found),
                all(r["top1"] >= 0.93 for r in found),
            )
        )
    beats("It is worth its bytes: better than plain 3 bits, which cost less", "paper_2bit", "plain 3 bit")
    beats("Its 4-bit recipe is closer to full precision than plain 4 bits", "paper_4bit", "plain 4 bit")
    beats("Not the paper's: four exact sink tokens improve plain 3 bits", "balanced", "plain 3 bit")
    if "near_lossless" in names:
        found = rows("near_lossless")
        made.append(
            Claim(
                "Not the paper's: 4 bits and sinks are nearly lossless",
                "KL at most 0.010 and 93 % top-1 agreement on every text",
                f"{found[0]['bits']:.2f} bits: " + ", ".join(f"{r['kl']:.4f} and {r['top1']:.3f}" for r in found),
                all(r["kl"] <= 0.010 and r["top1"] >= 0.93 for r in found),
            )
        )
    if "small" in names:
        found = differences("small", "paper_2bit")
        made.append(
            Claim(
                "Not the paper's: `small` is as good as 2-bit GEAR for far fewer bytes",
                f"at most 2.95 bits, KL not higher by more than {ENOUGH:g} standard errors on every text",
                said(found),
                found[0]["bits"] <= 2.95 and all(r["difference"] <= ENOUGH * r["se"] for r in found),
            )
        )
    return made

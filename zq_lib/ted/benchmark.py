"""TED's benchmarks: both comparisons over seeds, the decoder, and what divergence and first stage cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core import models
from zq_lib.core.lab import FULL, Claim, Row, mean_interval
from zq_lib.core.timing import paired_ratio
from zq_lib.ted import arms, digits, lab, lens, text
from zq_lib.ted.arms import START
from zq_lib.ted.cache import StateCache
from zq_lib.ted.config import TedConfig
from zq_lib.ted.divergence import divergence
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.stage_one import fit

Say = Callable[[str], None]
SEEDS = tuple(range(8))  # of real text
DIGIT_SEEDS = tuple(range(5))
CHOOSE_SEEDS = (100,)  # of no other table
CHOSEN_FROM = (1.0, 10.0)  # weights of the filtered states' error
DISTIL_SEEDS = (0, 1)
PAIRS = (  # what is compared with what on text
    (text.KD.name, START), (text.KD.name, text.PLAIN.name), (text.LWD.name, text.KD.name),
    (text.TED.name, text.PLAIN.name), (text.TED.name, text.KD.name), (text.TED.name, text.LWD.name),
    (text.TED.name, text.RANDOM.name), (text.TED.name, text.PCA.name), (text.UNFITTED.name, text.RANDOM.name),
    (text.UNFITTED.name, text.PCA.name), (text.PCA.name, text.RANDOM.name), (text.PCA.name, text.KD.name),
    (text.TED.name, text.UNFITTED.name), (text.WIDE.name, text.TED.name), (text.WIDE.name, text.KD.name),
)  # fmt: skip
ROWS, VOCABULARIES = 256, (1_024, 8_192, 49_152, 131_072)
MEMORY_ROWS = (128, 512)
TEMPERATURE = 2.0


def two_digits(say: Say) -> dict[str, list[Row]]:
    """What probes read behind filters of each width, and the arms at two weights, over seeds."""
    kept: list[Row] = []
    runs: list[Row] = []
    for seed in DIGIT_SEEDS:
        say(f"digits, seed {seed}")
        found, rows = digit_seed(seed)
        kept, runs = kept + found, runs + rows
    return digit_tables(kept, runs)


def digit_seed(seed: int) -> tuple[list[Row], list[Row]]:
    """Probes and arms of one seed."""
    found = digits.digits(digits.SIZES[FULL], seed)
    kept = [{"seed": seed, **row} for row in digits.selectivity(found)]
    problem, runs = found.problem(), []
    for group in digits.arms():
        rows = arms.compare(problem, group, seed)
        runs += [{"seed": seed, **row} for row in (rows[1:] if runs else rows)]
    return kept, runs


def digit_tables(kept: list[Row], runs: list[Row]) -> dict[str, list[Row]]:
    """The tables of all seeds."""
    means = []
    for dim, side, images in dict.fromkeys((r["dim"], r["side"], r["images"]) for r in kept):
        values = [r["accuracy"] for r in kept if (r["dim"], r["side"], r["images"]) == (dim, side, images)]
        mean, low, high = mean_interval(values)
        means.append({
            "dim": dim, "side": side, "images": images, "seeds": len(values), "accuracy": mean, "low": low,
            "high": high, "smallest": min(values), "largest": max(values),
        })  # fmt: skip
    return {
        "selectivity": kept, "selectivity_means": means, "selectivity_claims": _rows(lab.kept_claims(kept)),
        "digits": runs, "digits_means": arm_means(runs, digits.PLAIN.name),
    }  # fmt: skip


def arm_means(runs: Sequence[Row], baseline: str) -> list[Row]:
    """Mean accuracy and loss of each arm over seeds with 95 % intervals, and its paired difference to the baseline."""
    found = []
    gaps = {r["arm"]: r for r in lab.differences(runs, baseline)}
    for arm in dict.fromkeys(lab.label(r, runs) for r in runs):
        own = [r for r in runs if lab.label(r, runs) == arm]
        row: Row = {"arm": arm, "seeds": len(own)}
        for name in ("accuracy", "nll"):
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval([r[name] for r in own])
        gap = gaps.get(arm, {})
        row |= {"baseline": baseline, **{k: gap.get(k, "") for k in ("difference", "low", "high", "wins")}}
        found.append(row)
    return found


def weights(say: Say) -> list[Row]:
    """The arms on text at each weight, judged on questions that are in no other table: what `text.WEIGHTS` rests on."""
    setting, rows = text.setting(text.SIZES[FULL], say=say), []
    for seed in CHOOSE_SEEDS:
        rows += weight_seed(setting, seed, say)
    return rows


def weight_seed(setting: text.Setting, seed: int, say: Say) -> list[Row]:
    """The arms that match states, at each weight, on the questions for choosing."""
    problem, rows = setting.problem(seed, setting.found.choose), []
    for weight in CHOSEN_FROM:
        for arm in text.ARMS:
            if arm.target is not None:
                say(f"weights, seed {seed}: {arm.name}, {weight:g}")
                rows += [{"seed": seed, **row} for row in arms.compare(problem, {arm: weight}, seed)[1:]]
    return rows


def real_text(say: Say) -> dict[str, list[Row]]:
    """All arms on TREC's questions over seeds: every run, means, paired differences, claims."""
    setting = text.setting(text.SIZES[FULL], say=say)
    runs: list[Row] = []
    for seed in SEEDS:
        say(f"text, seed {seed}")
        runs += text_seed(setting, seed)
    return text_tables(runs, setting)


def text_seed(setting: text.Setting, seed: int) -> list[Row]:
    """All arms of one seed."""
    return [{"seed": seed, **row} for row in lab.text_rows(setting, seed, text.ARMS)]


def text_tables(runs: list[Row], setting: text.Setting) -> dict[str, list[Row]]:
    """The tables of all seeds."""
    sizes = {"train": setting.size.train, "test": len(setting.found.test["labels"])}
    teacher = {"arm": "teacher", **arms.judge(setting.teacher, setting.found.test), **sizes}
    pairs = []
    for first, second in PAIRS:
        row: Row = {"first": first, "second": second}
        for value in ("accuracy", "nll"):
            gap = next(r for r in lab.differences(runs, second, value) if r["arm"] == first)
            row |= {
                "seeds": gap["seeds"], f"{value}_difference": gap["difference"], f"{value}_low": gap["low"],
                f"{value}_high": gap["high"], f"{value}_wins": gap["wins"],
            }  # fmt: skip
        pairs.append(row)
    return {
        "text": runs, "text_means": arm_means(runs, text.KD.name), "text_pairs": pairs, "text_teacher": [teacher],
        "text_claims": _rows(lab.text_claims(runs)),
    }  # fmt: skip


def tuned_lens(say: Say) -> list[Row]:
    """Loss behind six layers of SmolLM2 on a held-out text, read by the identity and by a fitted filter."""
    model, tokenizer = models.load("smollm2")
    size = lens.SIZES[FULL]
    train = lens.batches(lens.windows(tokenizer, size.lens_steps * size.batch, size.tokens), size.batch)
    test = lens.batches(lens.windows(tokenizer, size.test, size.tokens, lens.HELD_OUT), size.batch)
    say("lens")
    *_, (_, filters) = lens.lens(model, train, size)
    return lens.lens_rows(model, filters, test)


def decoder(say: Say) -> list[Row]:
    """Ten layers that learn from SmolLM2's thirty: perplexity over the steps of each arm."""
    return [row for seed in DISTIL_SEEDS for row in decoder_seed(seed, say)]


def decoder_seed(seed: int, say: Say) -> list[Row]:
    """All arms on the text of one seed; the held-out text is the same for all."""
    model, tokenizer = models.load("smollm2")
    size = lens.SIZES[FULL]
    count = size.steps * size.batch
    train = lens.batches(lens.windows(tokenizer, count, size.tokens, seed * lens.APART), size.batch)
    texts = lens.windows(tokenizer, size.test, size.tokens, lens.HELD_OUT)
    found = lens.distillation(model, lens.cut(model), train, texts, size, say=lambda s: say(f"seed {seed}, {s}"))
    return [{"seed": seed, **row} for row in found]


def plain_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """What is usually written: T^2 times torch's divergence of two log-softmaxes."""
    q, p = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def chunked_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Ours, which uses up the student's logits."""
    return divergence(student, teacher, temperature=TEMPERATURE, overwrite=True)


WAYS = {"plain": plain_divergence, "chunked": chunked_divergence}


def step(way: str, student: Tensor, teacher: Tensor) -> None:
    """Loss and gradient, from logits that stand for those of a model."""
    WAYS[way](student.detach().requires_grad_(), teacher).backward()


def time_cost(say: Say) -> list[Row]:
    """CPU seconds of loss and gradient, plain against chunked, in turns, by vocabulary; both copy the logits first."""
    rows = []
    for vocabulary in VOCABULARIES:
        say(f"divergence of {vocabulary} words")
        s, t = (torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(i)) for i in range(2))
        ways = [lambda way=way, s=s, t=t: step(way, s.clone(), t) for way in ("chunked", "plain")]
        found = paired_ratio(*ways, 9)
        rows.append(_cost(f"divergence of {vocabulary:,} words", "s", found["first_s"], found["second_s"], ROWS,
                          vocabulary, found["ratio"]))  # fmt: skip
    return rows


def memory_cost(say: Say) -> list[Row]:
    """Peak memory that loss and gradient take beyond both logits, each in a process of its own. Needs Linux."""
    rows = []
    for count, vocabulary in (*((ROWS, v) for v in VOCABULARIES[1:]), *((n, VOCABULARIES[2]) for n in MEMORY_ROWS)):
        say(f"memory of {count} x {vocabulary}")
        plain, ours = (_peak_of({"way": w, "rows": count, "vocabulary": vocabulary}) for w in ("plain", "chunked"))
        rows.append(_cost(f"divergence of {count} x {vocabulary:,} words", "MB", ours, plain, count, vocabulary))
    return rows


def stage_one_cost(say: Say) -> list[Row]:
    """CPU seconds of a step of the first stage on MiniLM-L6: states kept, against the model run for every step."""
    say("first stage")
    setting = quick_setting()
    batch = arms.take(setting.found.train, torch.arange(32))
    layers = (2, 4, 6)
    cache = StateCache.of(setting.teacher, [batch], layers)
    live, kept = (
        TaskFilters(setting.teacher, TedConfig(filter_dim=text.DIM, dropout=0.0), layers) for _ in range(2)
    )  # fmt: skip
    found = paired_ratio(
        lambda: [None for _ in fit(kept, [batch] * 4, cache=cache)], lambda: [None for _ in fit(live, [batch] * 4)], 9
    )
    tokens = int(batch["attention_mask"].sum())
    return [_cost("first stage, 4 steps on MiniLM-L6", "s", found["first_s"], found["second_s"], tokens, "",
                  found["ratio"])]  # fmt: skip


def quick_setting() -> text.Setting:
    """Questions and an encoder that was not fine-tuned, which costs as much as one that was."""
    encoder, tokenizer = models.load("minilm-l6")
    size = text.SIZES["quick"]
    found = text.questions(tokenizer, size)
    return text.Setting(found, size, text.classifier(encoder, len(found.kinds)), StateCache(()))


def cost(say: Say) -> list[Row]:
    """Time and memory of the divergence over a vocabulary, and time of the first stage."""
    return [*time_cost(say), *memory_cost(say), *stage_one_cost(say)]


def _cost(
    what: str, unit: str, ours: float, plain: float, count: int, vocabulary: int | str, gain: float | None = None
) -> Row:
    gain = plain / ours if gain is None else gain
    return {
        "what": what, "unit": unit, "rows": count, "vocabulary": vocabulary, "ours": ours, "plain": plain,
        "gain": gain, "share": 1 / gain,
    }  # fmt: skip


def _peak_of(asked: Row) -> float:
    # Large tensors then go back to the system when they are freed, so that the peak is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "zq_lib.ted.benchmark", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring {asked} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _memory(way: str, rows: int, vocabulary: int) -> float:
    """MB at the peak of a step above what stood before it: both logits."""
    torch.set_num_threads(1)
    step(way, *(torch.randn(8, 1024) for _ in range(2)))
    s, t = (torch.randn(rows, vocabulary) for _ in range(2))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _status("VmRSS")
    step(way, s, t)
    return (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def _rows(claims: Sequence[Claim]) -> list[Row]:
    return [{"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in claims]


BENCHMARKS = {
    "digits": two_digits, "text_weights": weights, "text": real_text, "lens": tuned_lens, "distill": decoder,
    "cost": cost,
}  # fmt: skip

if __name__ == "__main__":  # one memory measurement; `memory_cost` starts it in a process of its own
    print(json.dumps(_memory(**json.loads(sys.argv[1]))))

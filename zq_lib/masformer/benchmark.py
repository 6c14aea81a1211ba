"""MASFormer's benchmarks: local attention against full, conversion by plan, the whole model, and continual training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from zq_lib.core import data, models
from zq_lib.core.lab import Row
from zq_lib.core.timing import cpu_seconds
from zq_lib.masformer import passkey
from zq_lib.masformer.cache import SpanCache
from zq_lib.masformer.config import MASFormerConfig
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.lab import CONTEXT, COUNT, Bench, run
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.passkey import retrieve
from zq_lib.masformer.reference import visible
from zq_lib.masformer.spans import SpanPlan
from zq_lib.masformer.training import TrainingConfig, batches, documents, perplexity, train

Say = Callable[[str], None]
HEADS, WIDTH, WINDOW = 4, 64, 256
LENGTHS = (2048, 4096, 8192)
REPEATS = 5
DECODED = 16
TRAINED_PASSAGES = slice(200, 600)  # of QuAC: neither prompts nor the texts of perplexity
RECIPE = TrainingConfig(steps=16, rate=1e-4)
TRAIN_LENGTH, QUOTE = 512, 128
DIETS = (("full", 0), ("even", 0), ("full", QUOTE), ("even", QUOTE))


def conversion(say: Say) -> dict[str, list[Row]]:
    """The lab's tables, and the claims on them."""
    found = run(budget="full", say=say)
    claims = [
        {"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in found.claims
    ]
    return {**found.tables, "claims": claims}


def speed(say: Say) -> list[Row]:
    """CPU seconds of one layer's attention, forward and with backward: full, full under a window's mask, and local.

    One text, 4 heads of 64, window and block of 256, fp32; the ways take turns, the median of five rounds counts.
    """
    rows = []
    for length in LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, length, WIDTH, generator=torch.Generator().manual_seed(0))
        mask = visible(length, length, WINDOW)
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "full, masked": lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            "window": lambda q, k, v: local_attention(q, k, v, span=WINDOW),
            "window + 4 sinks": lambda q, k, v: local_attention(q, k, v, span=WINDOW, sinks=4),
            "block": lambda q, k, v: local_attention(q, k, v, span=WINDOW, kind="block"),
        }
        say(f"speed: {length} tokens")
        forward = _turns({name: partial(_forward, way, q, k, v) for name, way in ways.items()})
        del ways["full, masked"]  # its backward pass takes a gigabyte
        both = _turns({name: partial(_forward_backward, way, q, k, v) for name, way in ways.items()})
        for name, seconds in forward.items():
            rows.append(
                {
                    "attention": name, "tokens": length, "forward_ms": 1e3 * seconds,
                    "forward_gain": forward["full"] / seconds,
                    "both_ms": 1e3 * both[name] if name in both else "",
                    "both_gain": both["full"] / both[name] if name in both else "",
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def _forward(way: Callable, q: Tensor, k: Tensor, v: Tensor) -> None:
    way(q, k, v)


def _forward_backward(way: Callable, q: Tensor, k: Tensor, v: Tensor) -> None:
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    way(*given).sum().backward()


def _turns(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median CPU seconds of each, after one warm-up; they take turns, so that a busy moment meets all."""
    for call in calls.values():
        call()
    rounds = [{name: cpu_seconds(call) for name, call in calls.items()} for _ in range(REPEATS)]
    return {name: median(r[name] for r in rounds) for name in calls}


@torch.no_grad()
def whole(say: Say) -> list[Row]:
    """The embedded model with 8 of 30 layers full: bytes of the cache, seconds of prefill and of a decoding step.

    Beside each the share of score entries and the end-to-end gain that counting FLOP predicts (Amdahl). Full attention
    and the plan take turns.
    """
    model, tokenizer = models.load()
    ids = torch.cat(documents(tokenizer, data.quac_passages()[:40]))[None]
    text = model.config
    plan = Bench(model, tokenizer, MASFormerConfig.quick(), 0, say).plan("profiled", COUNT)
    full = SpanPlan((None,) * len(plan.layers))
    width = text.hidden_size // text.num_attention_heads
    dense = sum(p.numel() for p in model.model.layers[0].parameters())
    rows = []
    for length in (1024, 4096):
        caches, prefill, steps = {}, {}, {}
        for name, chosen in (("full", full), ("profiled 8", plan)):
            say(f"whole model: {name}, {length} tokens")
            with attach(model, chosen):
                caches[name] = SpanCache(chosen) if name != "full" else DynamicCache()
                prefill[name] = cpu_seconds(partial(_read, model, ids[:, :length], caches[name]))
        for i in range(DECODED):
            for name, chosen in (("full", full), ("profiled 8", plan)):
                with attach(model, chosen):
                    token = ids[:, length + i : length + i + 1]
                    seconds = cpu_seconds(partial(_read, model, token, caches[name]))
                steps.setdefault(name, []).append(seconds)
        for name, chosen in (("full", full), ("profiled 8", plan)):
            cache = caches[name]
            size = cache.nbytes() if isinstance(cache, SpanCache) else sum(
                x.keys.nbytes + x.values.nbytes for x in cache.layers
            )  # fmt: skip
            predicted = chosen.speedup(length, text.hidden_size, text.vocab_size, dense)
            rows.append(
                {
                    "plan": name, "tokens": length, "cache_mb": size / 1e6,
                    "cache_predicted_mb": chosen.kv_bytes(length + DECODED, text.num_key_value_heads, width, 4) / 1e6,
                    "prefill_s": prefill[name], "step_ms": 1e3 * median(steps[name]),
                    "score_entries": chosen.cost(length).share, "attention_of_flop": predicted.attention_share,
                    "predicted_gain": predicted.end_to_end, "prefill_gain": prefill["full"] / prefill[name],
                    "step_gain": median(steps["full"]) / median(steps[name]),
                }
            )  # fmt: skip
    return rows


def _read(model: PreTrainedModel, ids: Tensor, cache: SpanCache | DynamicCache) -> None:
    model(ids, past_key_values=cache, logits_to_keep=1)


def training(say: Say) -> dict[str, list[Row]]:
    """Continual training on long text after conversion: retrieval and perplexity before and after, by placement.

    Full attention is trained in the same way, so that what training gives any model is not counted as recovery. Two
    diets: plain text, and text whose rows quote their own beginning at their end.
    """
    rows, curves = [], []
    for name, quote in DIETS:
        found, curve = trained(name, quote, say)
        rows += found
        curves += curve
    return {"training": rows, "training_curves": curves}


def trained(name: str, quote: int, say: Say) -> tuple[list[Row], list[Row]]:
    """One plan on one diet: retrieval and perplexity before and after, and a row per step."""
    model, tokenizer = models.load()
    bench = Bench(model, tokenizer, MASFormerConfig.quick(), 0, say)
    probes = passkey.held_out(tokenizer, 6, 300, 600)
    source = documents(tokenizer, data.quac_passages()[TRAINED_PASSAGES])
    label: Row = {"plan": name, "diet": "quoting" if quote else "plain"}

    def judge(step: int) -> Row:
        found, ppl = retrieve(model, probes), perplexity(model, bench.texts, CONTEXT)
        score = {"accuracy": found.accuracy, "log_p": found.mean_log_p, "perplexity": ppl}
        return {**label, "step": step, "tokens": step * TRAIN_LENGTH, **score}

    with attach(model, bench.plan(name, COUNT)):
        rows, curve = [judge(0)], []
        stream = batches(source, length=TRAIN_LENGTH, end=tokenizer.eos_token_id, quote=quote)
        for row in train(model, stream, RECIPE):
            curve.append({**label, **row})
            say(f"training: {name}, {label['diet']}, step {row['step']}, loss {row['loss']:.3f}")
        return [*rows, judge(RECIPE.steps)], curve


BENCHMARKS = {"conversion": conversion, "speed": speed, "whole": whole, "training": training}

"""GEAR's benchmarks: quality at equal bytes, time per token, peak memory, and the planner."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from statistics import mean, median

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from zq_lib.core import models
from zq_lib.core.lab import Row
from zq_lib.core.timing import cpu_seconds
from zq_lib.gear import measure
from zq_lib.gear.attention import attend_packed
from zq_lib.gear.cache import GearCache
from zq_lib.gear.config import GearConfig
from zq_lib.gear.lab import SETTINGS, run
from zq_lib.gear.planner import default_candidates, plan

Say = Callable[[str], None]
FULL = "DynamicCache"
OURS = ("plain 2 bit", "paper_2bit", "balanced", "near_lossless", "8 bit")
THEIRS = {"quanto": (2, 4), "hqq": (2, 3, 4, 8)}  # backends of QuantizedCache and their bits
MEASURED = ("plain 2 bit", "paper_2bit", "near_lossless")  # of ours, in memory
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
LENGTH, TOKENS = 1024, 64  # a buffer of new tokens, so that every cache compresses once
MEMORY_LENGTH, FILL, MEMORY_TOKENS = 4096, 2048, 8


def quality(say: Say) -> dict[str, list[Row]]:
    """The lab's tables, and the paper's claims on them."""
    found = run(budget="full", say=say)
    claims = [
        {"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in found.claims
    ]
    return {**found.tables, "claims": claims}


def settings() -> list[Row]:
    """The caches that are compared: name, how it is read, bits of a code, and the package behind it."""
    rows: list[Row] = [{"cache": FULL, "read": "dense", "bits": 32, "package": ""}]
    for name in OURS:
        bits = SETTINGS[name].keys.bits
        rows += [{"cache": name, "read": read, "bits": bits, "package": ""} for read in ("restored", "packed")]
    for backend, widths in THEIRS.items():
        with contextlib.suppress(PackageNotFoundError):
            package = f"{PACKAGES[backend]} {version(PACKAGES[backend])}"
            rows += [
                {"cache": f"QuantizedCache {backend}", "read": "restored", "bits": b, "package": package}
                for b in widths
            ]
    return rows


def _build(model: PreTrainedModel, row: Row) -> Cache:
    if row["cache"] == FULL:
        return DynamicCache(config=model.config)
    if row["cache"] in SETTINGS:
        return GearCache(model.config, SETTINGS[row["cache"]])
    backend = row["cache"].split()[1]
    return QuantizedCache(backend, model.config, nbits=row["bits"], q_group_size=64, residual_length=64)


@contextlib.contextmanager
def _reading(model: PreTrainedModel, row: Row) -> Iterator[None]:
    with attend_packed(model) if row["read"] == "packed" else contextlib.nullcontext():
        yield


@torch.no_grad()
def latency(say: Say) -> list[Row]:
    """CPU time of one decoding step after 1,024 tokens, all caches in turn at every step of one run.

    64 steps, so that every cache compresses its newest tokens once; the ratio is that of the totals.
    """
    model, tokenizer = models.load()
    ids = measure.texts(tokenizer, LENGTH + TOKENS)["technical"]
    prompt = measure.keys_values(model, ids[:, :LENGTH])
    rows = settings()
    caches = []
    for row in rows:
        say(f"latency: fill {row['cache']}, {row['read']}, {row['bits']} bits")
        caches.append(_build(model, row))
        for layer, (keys, values) in zip(caches[-1].layers, prompt, strict=True):
            layer.update(keys, values)
    seconds: list[list[float]] = [[] for _ in rows]
    for step in range(TOKENS):
        if step % 16 == 0:
            say(f"latency: step {step} of {TOKENS}")
        token = ids[:, LENGTH + step : LENGTH + step + 1]
        for k in range(len(rows)):
            i = (k + step) % len(rows)  # nobody is always first

            def one(i: int = i, token: Tensor = token) -> None:
                model(token, past_key_values=caches[i])

            with _reading(model, rows[i]):
                seconds[i].append(cpu_seconds(one))
    full = seconds[0]
    return [
        {
            **row, "tokens": LENGTH, "steps": TOKENS, "ms": 1e3 * mean(s), "median_ms": 1e3 * median(s),
            "ratio": sum(s) / sum(full), "median_ratio": median(a / b for a, b in zip(s, full, strict=True)),
        }
        for row, s in zip(rows, seconds, strict=True)
    ]  # fmt: skip


def memory(say: Say) -> list[Row]:
    """Peak memory while decoding at 4,096 tokens, above the loaded model, each cache in a process of its own.

    Caches are filled in two chunks with random keys and values: their sizes do not depend on what is in them.
    Needs Linux, whose kernel keeps the peak.
    """
    rows = []
    for row in settings():
        if row["cache"] in OURS and row["cache"] not in MEASURED or row["bits"] in (3, 8):
            continue
        say(f"memory: {row['cache']}, {row['read']}, {row['bits']} bits")
        asked = [sys.executable, "-m", "zq_lib.gear.benchmark", json.dumps(row)]
        # large tensors then go back to the system when they are freed, so that the peak is what is in use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"measuring {row['cache']} failed: {done.stderr.strip().splitlines()[-1]}")
        rows.append({**row, "tokens": MEMORY_LENGTH, **json.loads(done.stdout)})
    return rows


@torch.no_grad()
def _memory(row: Row) -> Row:
    torch.set_num_threads(1)
    model, _ = models.load()
    token = torch.tensor([[1]])
    with _reading(model, row):
        warm = _build(model, row)
        _fill(model, warm, 192)
        for _ in range(2):
            model(token, past_key_values=warm)
        del warm
        base = _resident()
        cache = _build(model, row)
        _fill(model, cache, MEMORY_LENGTH)
        held = _resident()
        for _ in range(MEMORY_TOKENS):
            model(token, past_key_values=cache)
    return {
        "cache_mb": sum(map(_stored, cache.layers)) / 1e6,
        "held_mb": (held - base) / 1e6,
        "peak_mb": (_peak() - base) / 1e6,
    }


def _fill(model: PreTrainedModel, cache: Cache, tokens: int) -> None:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for start in range(0, tokens, FILL):
        n = min(FILL, tokens - start)
        for layer in cache.layers:
            layer.update(*torch.randn(2, 1, config.num_key_value_heads, n, width, generator=generator))


def _stored(x: object) -> int:
    """Bytes of all tensors in an object, quantised ones by their parts."""
    if hasattr(x, "nbytes") and callable(x.nbytes):  # a GearLayer
        return sum(x.nbytes().values())
    if isinstance(x, Tensor):
        if hasattr(x, "__tensor_flatten__"):
            return sum(_stored(getattr(x, name)) for name in x.__tensor_flatten__()[0])
        return x.nbytes
    if isinstance(x, dict):
        return sum(map(_stored, x.values()))
    if isinstance(x, list | tuple):
        return sum(map(_stored, x))
    return _stored(vars(x)) if type(x).__module__.startswith("transformers") else 0


def _resident() -> int:
    """Bytes in memory after handing free ones back; the peak starts anew from here."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def planner(say: Say) -> dict[str, list[Row]]:
    """Plans at two budgets, made on one text and judged on the three others, against one setting for all layers.

    The second table is every layer's choice with its reason.
    """
    model, tokenizer = models.load()
    found = measure.texts(tokenizer, 1024)
    calibration = found.pop("technical")[:, :512]
    same = {3.0: ("K3V2 + sinks", GearConfig.plain((3, 2), sinks=4)), 3.5: ("balanced", GearConfig.balanced())}
    plans = {}
    for bits in same:
        say(f"planner: {bits} bits")
        plans[bits] = plan(model, calibration, bits=bits, tokens=measure.PROMPT)
    judged = []
    for text, ids in found.items():
        expected = measure.full_precision(model, ids)
        for bits, (name, uniform) in same.items():
            say(f"planner: {text}, {bits} bits")
            ours, other = (
                measure.teacher_forced(model, ids, gear, expected=expected) for gear in (plans[bits].configs, uniform)
            )
            difference, error = measure.paired(ours, other)
            judged.append(
                {
                    **ours.row(text=text, setting="plan", against=name), "bits_against": other.bits,
                    "kl_against": float(other.kl.mean()), "difference": difference, "se": error,
                    "calibration": "technical", "candidates": len(default_candidates()),
                }
            )  # fmt: skip
    layers = [{"budget": bits, **row} for bits, made in plans.items() for row in made.rows]
    return {"planner": judged, "plan": layers}


BENCHMARKS = {"quality": quality, "latency": latency, "memory": memory, "planner": planner}

if __name__ == "__main__":  # one memory measurement; `memory` starts it in a process of its own
    print(json.dumps(_memory(json.loads(sys.argv[1]))))

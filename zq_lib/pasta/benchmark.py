"""PASTA's benchmarks: the tables of the lab, what steering costs, and what profiling costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zq_lib.core import models
from zq_lib.core.lab import Row
from zq_lib.core.numerics import spearman
from zq_lib.core.timing import cpu_seconds, paired_ratio
from zq_lib.pasta.lab import TABLES, run
from zq_lib.pasta.make_profile import probes
from zq_lib.pasta.profiles import shipped_profile
from zq_lib.pasta.profiling import score_heads
from zq_lib.pasta.prompt import encode
from zq_lib.pasta.steering import attach

Say = Callable[[str], None]


def main(say: Say) -> dict[str, list[Row]]:
    """The lab's main table, and the paper's claims on it."""
    found = run(budget="full", only=["main"], say=say)
    claims = [
        {"claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds} for c in found.claims
    ]
    return {**found.tables, "claims": claims}


def generation(say: Say) -> list[Row]:
    """Steered against unsteered generation and prefill, paired, on prompts of two lengths."""
    model, tokenizer = models.load()
    item = "Previously, the capital of Peru was Lima. *Currently, the capital of Peru is Oslo.* The capital of Peru is"
    rows = []
    with attach(model, profile=shipped_profile()) as steering:
        for length, source in (("short", item), ("long", "The weather is calm and the road is long. " * 40 + item)):
            prompt = encode(tokenizer, source)

            def plain(prompt=prompt, tokens=32) -> None:  # noqa: ANN001
                model.generate(**prompt.inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)

            def steered(prompt=prompt, tokens=32) -> None:  # noqa: ANN001
                steering.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens)

            for what, tokens in (("prefill", 1), ("generate 32 tokens", 32)):
                say(f"{what}, {length} prompt")
                found = paired_ratio(lambda: plain(tokens=tokens), lambda: steered(tokens=tokens), 7)  # noqa: B023
                rows.append({"what": what, "prompt_tokens": prompt.input_ids.shape[1], **_named(found)})
    return rows


def _named(found: Row) -> Row:
    return {"plain_s": found["first_s"], "steered_s": found["second_s"], **{k: found[k] for k in list(found)[2:]}}


def profiling(say: Say) -> list[Row]:
    """CPU seconds of the four methods for all heads, on the same prompts in one run, and how well they agree.

    Times are per prompt: the exact methods on two prompts, the gradient on all 24, where its batches are full.
    """
    model, tokenizer = models.load()
    everything, few = probes("conflict"), probes("conflict")[:2]
    found, rows = {}, []
    for method in ("loop", "batched", "staircase", "gradient"):
        say(f"profiling by {method}")
        given = everything if method == "gradient" else few

        def measure(method=method, given=given) -> None:  # noqa: ANN001
            found[method] = score_heads(model, tokenizer, given, method=method)

        seconds = cpu_seconds(measure) / len(given)
        if method == "gradient":  # the last step of the ladder is compared over all prompts, by rank
            exact = torch.tensor(shipped_profile("conflict").scores)
            top = {tuple(x) for x in shipped_profile("conflict").top(27).pairs}
            mine = found[method].profile(model, "conflict", 27).pairs
            agreement = {
                "difference": "",
                "spearman": spearman(found[method].mean(), exact),
                "top27": len(top & set(mine)),
            }
        else:
            gap = (found[method].table - found["loop"].table).abs().max()
            agreement = {"difference": float(gap), "spearman": 1.0, "top27": 27}
        rows.append({"method": method, "heads": 270, "prompts": len(given), "cpu_s_per_prompt": seconds, **agreement})
    for row in rows:
        row["times_cheaper"] = rows[0]["cpu_s_per_prompt"] / row["cpu_s_per_prompt"]
    return rows


def _table(name: str) -> Callable[[Say], dict[str, list[Row]]]:
    return lambda say: run(budget="full", only=[name], say=say).tables


BENCHMARKS = {
    "profiling": profiling,
    "generation": generation,
    "main": main,
    **{name: _table(name) for name in TABLES if name != "main"},
}

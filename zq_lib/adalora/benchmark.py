"""AdaLoRA's benchmarks: the lab over seeds, and what importance, a step and removal cost beside PEFT's AdaLoRA.

The comparisons with PEFT need the package `peft`; the tables of the lab do not.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from zq_lib.adalora.adaptation import Adaptation, attach
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.adalora.lab import ADALORA, TEXT, WIDE, compare, run
from zq_lib.adalora.lab import text as question_types
from zq_lib.core.lab import FULL, Row, mean_interval
from zq_lib.core.timing import cpu_seconds, paired_ratio

Say = Callable[[str], None]
SEEDS = (0, 1, 2)
WIDTH, INNER, RANK, TARGET = 384, 1536, 12, 8  # MiniLM's shapes; six matrices a block
TASK = {"total_steps": 100_000, "warmup": 0, "final": 0.3, "interval": 1}


class Block(nn.Module):
    """The six linear layers of an encoder block, in a row: as much adapter work as in a transformer, little else."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out(torch.tanh(self.query(x) + self.key(x)) * self.value(x))
        return x + self.down(torch.tanh(self.up(x)))


ROWS = 512  # of the final phase: 16 sentences of 32 tokens
NAMES = ("query", "key", "value", "out", "up", "down")


class Net(nn.Module):
    """Blocks numbered as in a transformer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def pair(blocks: int) -> tuple[nn.Module, Adaptation, nn.Module]:
    """The same network under our adapters and under PEFT's (whose model comes last), rank 12, target 8."""
    import peft

    torch.manual_seed(0)
    ours = Net(blocks)
    theirs = peft.get_peft_model(
        copy.deepcopy(ours),
        peft.AdaLoraConfig(
            init_r=RANK, target_r=TARGET, total_step=100_000, tinit=0, tfinal=30_000, deltaT=1, lora_alpha=2 * RANK,
            target_modules=list(NAMES), orth_reg_weight=0.1,
        ),
    )  # fmt: skip
    return ours, attach(ours, init_rank=RANK, target_rank=TARGET, targets=NAMES, **TASK), theirs


def importance(say: Say) -> list[Row]:
    """The importance update and the choice of triplets for 36 matrices (108 tensors, 0.5 million entries)."""
    ours, handle, theirs = pair(6)
    x = torch.randn(4, WIDTH)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    base, allocator = theirs.base_model.model, theirs.base_model.rankallocator
    budget = handle.schedule.budget(1000)
    rows = []
    for what, mine, peer in (
        ("importance update", handle.importance.update, lambda: allocator.update_ipt(base)),
        ("scores and choice", lambda: handle._choose(budget), lambda: allocator.mask_to_budget(base, budget)),
    ):
        say(what)
        rows.append({"what": what, "tensors": 108, **_named(paired_ratio(mine, peer, 31))})
    handle.detach()
    return rows


def _named(found: Row) -> Row:
    return {"ours_s": found["first_s"], "peft_s": found["second_s"], **{k: found[k] for k in list(found)[2:]}}


def step(say: Say) -> list[Row]:
    """A whole training step, PEFT's against ours: forward, penalty, backward, AdamW, importance, choice."""
    rows = []
    for rows_in_batch in (64, 512):
        ours, handle, theirs = pair(3)
        x = torch.randn(rows_in_batch, WIDTH)
        first = torch.optim.AdamW(handle.parameters(), lr=1e-3)
        second = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)
        factors = [p for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        count = [0]

        def mine(ours=ours, x=x, first=first) -> None:
            ours(x).square().mean().backward()
            first.step()
            first.zero_grad()

        def peer(theirs=theirs, x=x, second=second, factors=factors, count=count) -> None:
            count[0] += 1
            loss = theirs(x).square().mean()
            grams = (f @ f.T if f.shape[0] < f.shape[1] else f.T @ f for f in factors)  # as PEFT's own forward does
            penalty = sum(torch.norm(g - torch.eye(len(g)), p="fro") for g in grams) / len(factors)
            (loss + 0.1 * penalty).backward()
            second.step()
            theirs.base_model.update_and_allocate(count[0])
            second.zero_grad()

        say(f"step, {rows_in_batch} rows")
        rows.append({"what": "training step", "rows": rows_in_batch, **_named(paired_ratio(mine, peer, 15))})
        handle.detach()
    return rows


def removal(
    say: Say, ranks: Sequence[tuple[int, int]] = ((RANK, TARGET), (64, 16), (128, 32)), repeats: int = 15
) -> list[Row]:
    """A step of the final phase, dropped triplets cut out against masked, and the adapters' part of both steps.

    The part is what a step costs beyond the same network with frozen weights and no adapters. The optimiser is the
    fused AdamW: the plain one takes so long over many small tensors that their size hardly matters.
    """
    rows = []
    for rank, target in ranks:
        say(f"removal, {rank} to {target}")
        cut, masked, plain = _final_step(rank, target, True), _final_step(rank, target, False), _plain_step()
        times = [[cpu_seconds(call) for call in (cut[0], masked[0], plain)] for _ in range(repeats + 1)][1:]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        part = statistics.median((c - p) / (m - p) for c, m, p in times)
        rows.append({
            "init_rank": rank, "target_rank": target, "rows": ROWS, "cut_s": medians[0], "masked_s": medians[1],
            "no_adapter_s": medians[2], "adapter_part_left": part,
            "parameters": cut[1], "parameters_masked": masked[1], "state": cut[2], "state_masked": masked[2],
        })  # fmt: skip
    return rows


def _final_step(rank: int, target: int, cut: bool) -> tuple[Callable[[], None], int, int]:
    """A step of the final phase, how many parameters the adapters have, and how many numbers the optimiser keeps."""
    torch.manual_seed(0)
    model = Net(3)
    config = AdaLoraConfig(
        init_rank=rank, target_rank=target, targets=NAMES, total_steps=4, warmup=0, final=2, interval=1, shrink=cut
    )
    handle = attach(model, config)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, fused=True)
    x = torch.randn(ROWS, WIDTH)

    def go() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        go()
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    return go, handle.parameter_count(), state


def _plain_step() -> Callable[[], None]:
    """Forward and backward through the frozen network."""
    model, x = Net(3).requires_grad_(False), torch.randn(ROWS, WIDTH, requires_grad=True)
    return lambda: torch.autograd.grad(model(x).square().mean(), x)


def planted(say: Say) -> dict[str, list[Row]]:
    """The planted experiment at full size over seeds: every run, the ranks, one trace, and the claims."""
    return _over_seeds(say, "planted")


def text(say: Say) -> dict[str, list[Row]]:
    """Question classification over seeds, and the mean of each method with its 95 % interval.

    At the rate that suits the small adapters a LoRA of the initial rank learns next to nothing, so it is also trained
    at a quarter of it: a rival should not lose by its settings.
    """
    tables = _over_seeds(say, "text")
    tables["text"] += slower(say)
    tables["text_means"] = means(tables["text"])
    return tables


def slower(say: Say) -> list[Row]:
    """LoRA of the initial rank and its cut on text, at a quarter of the rate: a row per seed and method."""
    rows = []
    size = TEXT[FULL]
    for seed in SEEDS:
        problem = question_types(seed, size)
        problem.rate /= 4
        config = AdaLoraConfig.quick(size.steps)
        found = compare(
            problem, config, size.steps, seed, lambda name, seed=seed: say(f"slower, seed {seed}: {name}"), [WIDE]
        )
        rows += [{"seed": seed, **row, "method": f"{row['method']}, slower"} for row in found[0]]
    return rows


def _over_seeds(say: Say, table: str) -> dict[str, list[Row]]:
    tables: dict[str, list[Row]] = {table: []}
    for seed in SEEDS:
        found = run(
            seed=seed, budget=FULL, only=[table], say=lambda text, seed=seed: say(f"{table}, seed {seed}: {text}")
        )
        tables[table] += [{"seed": seed, **row} for row in found.tables[table]]
        if table == "planted":
            tables.setdefault("ranks", []).extend({"seed": seed, **row} for row in found.tables["ranks"])
            tables.setdefault("claims", []).extend(
                {"seed": seed, "claim": c.statement, "expected": c.expected, "measured": c.measured, "holds": c.holds}
                for c in found.claims
            )
            if seed == SEEDS[0]:
                tables["trace"] = found.tables["trace"]
    tables[f"{table}_means"] = means(tables[table])
    return tables


def means(rows: list[Row]) -> list[Row]:
    """Mean error of each method over seeds with Student's 95 % interval, and of its difference to AdaLoRA's."""
    found = []
    ours = [r["error"] for r in rows if r["method"] == ADALORA]
    for method in dict.fromkeys(r["method"] for r in rows):
        errors = [r["error"] for r in rows if r["method"] == method]
        gaps = [e - o for e, o in zip(errors, ours, strict=True)]
        (mean, low, high), (gap, gap_low, gap_high) = mean_interval(errors), mean_interval(gaps)
        ranks = next(r["ranks"] for r in rows if r["method"] == method)
        found.append({
            "method": method, "ranks": ranks, "seeds": len(errors), "error": mean, "low": low, "high": high,
            "minus_adalora": gap, "gap_low": gap_low, "gap_high": gap_high,
        })  # fmt: skip
    return found


BENCHMARKS = {"importance": importance, "step": step, "removal": removal, "planted": planted, "text": text}

"""Host side of AdaShift's Triton kernels (`kernels_update.py`): every tensor of a group in one launch (section 5.3).

Two launches make a step: `update` (or `update_rows`) streams over all tensors, `finish` completes one number for each.
The rows of the address table and the list of programs stay on the device until an address changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zq_lib.adashift import kernels_update
from zq_lib.adashift.batch import Batch, Settings
from zq_lib.adashift.spatial import NONE
from zq_lib.adashift.window import weights
from zq_lib.core.kernels import KernelSpec
from zq_lib.core.kernels_launch import DTYPES, INTERPRETED, NAMES, run

ELEMENTS = DTYPES | {torch.float64: tl.float64, torch.int16: tl.int16, torch.int32: tl.int32}


@dataclass(frozen=True)
class Tile:
    """One row of the launch table: entries per program and per pass of its loop, warps, stages of the pipeline."""

    chunk: int
    block: int
    warps: int
    stages: int


# No row has been timed on a GPU. Eight entries for a thread are two wide loads of fp32. A program of 16,384 entries
# moves 0.5 MB, long against the microseconds of its first loads, and 100 million parameters still make several waves.
STREAM = Tile(2_048, 1_024, 4, 1) if INTERPRETED else Tile(16_384, 1_024, 4, 1)
WIDEST = 256  # columns of a row per pass
FINISH = Tile(0, 256, 1, 1)


def unsupported(params: Sequence[Tensor], settings: Settings) -> str:
    """Why the kernels cannot do this, or ''."""
    other = next((p.dtype for p in params if p.dtype not in DTYPES), None)
    return "" if other is None else f"a parameter is {other}, and the kernels take float32, float16 and bfloat16"


class Rows(NamedTuple):
    """A launch of `update_rows`: its columns per pass, whether all rows are multiples of 16 long, its programs."""

    block: int
    even: bool
    work: Tensor  # [programs, 2] int32


class Plan(NamedTuple):
    """The programs of a step; they follow from the shapes."""

    flat: Tensor | None  # [programs, 2] int32
    first: Tensor | None  # [tensors + 1] int32
    rows: list[Rows]


def _plan(sizes: Sequence[tuple[int, int]], phi: str, device: torch.device) -> Plan:
    """The programs for tensors of (entries, blocks)."""
    flat, first, rows = [], [0], {}
    for i, (entries, blocks) in enumerate(sizes):
        if phi == NONE or blocks == 1:
            flat += [(i, chunk) for chunk in range(triton.cdiv(entries, STREAM.chunk))]
        else:
            width = entries // blocks
            block = min(WIDEST, triton.next_power_of_2(width))
            work = rows.setdefault((block, width % 16 == 0), [])
            work += [(i, part) for part in range(triton.cdiv(blocks, STREAM.block // block))]
        first.append(len(flat))

    def send(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(device)

    return Plan(
        send(flat) if flat else None,
        send(first) if flat and phi != NONE else None,
        [Rows(*key, send(work)) for key, work in rows.items()],
    )


def _prepare(batch: Batch, settings: Settings, cache: dict[str, Any]) -> None:
    """Keep the plan, the address table and whether all addresses are multiples of 16 in `cache`."""
    columns = [[0] * len(batch.params) if field is None else [x.data_ptr() for x in field] for field in batch]
    if cache.get("addresses") == columns:
        return
    sizes = [(p.numel(), v.numel()) for p, v in zip(batch.params, batch.vs, strict=True)]
    device = batch.params[0].device
    if cache.get("sizes") != sizes:
        cache.update(sizes=sizes, plan=_plan(sizes, settings.phi, device))
    columns_and_sizes = [*columns, *([column[i] for column in sizes] for i in (0, 1))]
    host = torch.tensor(list(zip(*columns_and_sizes, strict=True)), dtype=torch.int64, pin_memory=device.type == "cuda")
    table = host.to(device, non_blocking=True)
    cache.update(addresses=columns, table=table, aligned=all(a % 16 == 0 for column in columns for a in column))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        cache.setdefault("captured", []).append((host, table, cache["plan"]))  # a replay reads them again


def fused_step(
    batch: Batch,
    settings: Settings,
    cache: dict[str, Any],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of all tensors of `batch` in place, with no number copied from the device.

    `cache` is the caller's, one for these parameters, empty at first. Gradients are divided by `grad_scale` as they
    are read; a `found_inf` other than 0 leaves everything as it is. Both hold one number in fp32 on the device.
    """
    _prepare(batch, settings, cache)
    s, plan, table, like = settings, cache["plan"], cache["table"], batch.params[0]
    shares = weights(s.n, s.beta1)
    rate = s.lr.to(like.device, torch.float32) if isinstance(s.lr, Tensor) else None
    second = (s.beta2, 1 - s.beta2, math.log(s.beta2) if s.beta2 else -1e30, s.eps)
    numbers = (
        s.n, 0.0 if rate is not None else float(s.lr), -1.0 if s.maximize else 1.0, float(s.weight_decay),
        float(s.weight_decay) if s.decoupled else 0.0, math.inf if s.max_step is None else float(s.max_step),
        float(s.beta1), s.beta1 * shares[-1], shares[0], *second,
    )  # fmt: skip
    kinds = dict(
        ELEMENT=ELEMENTS[like.dtype], KEPT=None if batch.rings is None else ELEMENTS[batch.rings[0].dtype],
        PHI=s.phi, MOMENT=batch.exp_avgs is not None, MEAN=s.beta1 == 1,
        COUPLED=s.weight_decay > 0 and not s.decoupled,
    )  # fmt: skip
    part = None
    if plan.flat is not None:
        part = None if s.phi == NONE else torch.empty(len(plan.flat), device=like.device)
        meta = dict(kinds, COUNT=ELEMENTS[batch.ages[0].dtype], CHUNK=STREAM.chunk, BLOCK=STREAM.block)
        args = (table, plan.flat, part, rate, grad_scale, found_inf, *numbers)
        run(kernels_update.update, "adashift.update", len(plan.flat), like, args, STREAM, **meta)
    for block, even, work in plan.rows:
        meta = dict(kinds, ALIGNED=even and cache["aligned"], BLOCK_R=STREAM.block // block, BLOCK=block)
        args = (table, work, rate, grad_scale, found_inf, *numbers)
        run(kernels_update.update_rows, "adashift.update_rows", len(work), like, args, STREAM, **meta)
    args = (table, plan.first, part, found_inf, s.n, *second)
    meta = dict(PHI=s.phi, BLOCK=FINISH.block)
    run(kernels_update.finish, "adashift.finish", len(batch.params), like, args, FINISH, **meta)


def _specs() -> list[KernelSpec]:
    """What to compile ahead of time: both precisions, each phi, with and without ring and elementwise v."""
    moment = dict(MOMENT=True, MEAN=False, COUPLED=False, LR=None, GRAD_SCALE=None, FOUND=None)
    flat = moment | dict(COUNT=tl.int32, CHUNK=16_384, BLOCK=1_024)
    bare = flat | dict(KEPT=None, MOMENT=False)
    amp = {name: "*fp32:16" for name in ("LR", "GRAD_SCALE", "FOUND")}
    specs = []
    for variant, kept, phi, constants, types in (
        ("fp32 max", torch.float32, "max", flat, {}),
        ("fp32 max, bf16 ring", torch.bfloat16, "max", flat, {}),
        ("fp32 max, beta1 0", torch.float32, "max", bare, {}),
        ("bf16 mean, on the device", torch.bfloat16, "mean", flat, amp),
        ("fp32 none", torch.float32, NONE, flat | dict(COUNT=tl.int16, PART=None), {}),
    ):
        element = torch.bfloat16 if variant.startswith("bf16") else torch.float32
        constants = dict(KEPT=ELEMENTS[kept], ELEMENT=ELEMENTS[element], PHI=phi) | constants
        specs.append(_spec("update", kernels_update.update, types, constants, STREAM, variant))
    for dtype in (torch.float32, torch.bfloat16):
        constants = moment | dict(
            ELEMENT=ELEMENTS[dtype], KEPT=ELEMENTS[dtype], PHI="max", ALIGNED=True, BLOCK_R=4, BLOCK=256
        )
        specs.append(_spec("update_rows", kernels_update.update_rows, {}, constants, STREAM, f"{NAMES[dtype]} max"))
    for phi in ("max", "mean"):
        constants = dict(PHI=phi, BLOCK=FINISH.block, FOUND=None)
        specs.append(_spec("finish", kernels_update.finish, {}, constants, FINISH, phi))
    return specs


def _spec(name: str, kernel: Any, types: dict, constants: dict, row: Tile, variant: str) -> KernelSpec:
    constants = {key: value for key, value in constants.items() if key not in types}
    types = types | {"TABLE": "*i64:16", "WORK": "*i32:16", "FIRST": "*i32:16", "PART": "*fp32:16", "n": "i32"}
    return KernelSpec(
        name, kernel,
        signature={a: types.get(a, "fp32") for a in kernel.arg_names if a not in constants},
        constexprs=constants, num_warps=row.warps, num_stages=row.stages, variant=variant,
    )  # fmt: skip


SPECS = _specs()

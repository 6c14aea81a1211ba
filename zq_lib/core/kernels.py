"""Compile every kernel for several GPUs on a machine that has none, and keep an eye on registers, memory and spills.

`python -m zq_lib.core.kernels` compiles the `SPECS` of every built method and fails if one does not compile or does not
fit; with `--write` it stores the figures in bench/results/aot.csv. `--each` compiles one variant of every kernel and
fails as well if a stored figure belongs to another source than today's: quick enough for every change. Run it without
TRITON_INTERPRET: Triton reads that variable when a kernel is decorated, and an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from zq_lib.core.backend import interpreting
from zq_lib.registry import METHODS, built

INTERPRETED = "TRITON_INTERPRET is set, so the kernels cannot be compiled; unset it and start Python again."
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "aot.csv"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one set of argument types and constants, as a launch on a GPU would specialise it.

    `signature` maps every argument that is not in `constexprs` to a Triton type such as "*bf16", "i32" or "fp32"; the
    suffix ":16" says that the value is a multiple of 16, as Triton finds out for itself at a launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    variant: str = ""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, the shared memory that one program may have, and how deep loads may be pipelined in it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    most_stages: int


HIP_STAGES = 1  # on AMD: 64 KiB hold one stage of the tiles that suit the other cards' 163 KiB and more
TARGETS = (
    Target("sm_80", "cuda", 80, 32, 166_912, 4),  # A100: 163 KiB
    Target("sm_90", "cuda", 90, 32, 232_448, 4),  # H100, H200: 227 KiB
    Target("gfx942", "hip", "gfx942", 64, 65_536, HIP_STAGES),  # MI300: 64 KiB
)


@dataclass(frozen=True)
class Compiled:
    """What one compilation used: registers a thread, bytes of shared memory a program, bytes of spills a thread."""

    method: str
    kernel: str
    variant: str
    target: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    triton: str = ""
    source: str = ""  # fingerprint of what was compiled
    error: str = field(default="", compare=False)


@dataclass(frozen=True)
class GpuCase:
    """One benchmark of a kernel: how to check it, and what to time. A method's `kernels_bench.cases` yields these.

    `parity` returns the error against the reference and the largest one allowed; no time counts before it has passed.
    `runs` maps each implementation to a call without arguments. `flops` and `moved` (bytes) are those of an ideal run.
    """

    name: str
    size: Mapping[str, int | str]
    parity: Callable[[], tuple[float, float]]
    runs: Mapping[str, Callable[[], object]]
    flops: float
    moved: float


def fingerprint(spec: KernelSpec) -> str:
    """Eight hexadecimal digits for the kernel's code without comments, its helpers', constants, types and launch."""
    from triton.runtime.jit import JITFunction

    codes, names, waiting = {}, {}, [spec.kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        codes[function.fn.__qualname__] = ast.unparse(tree)
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction) and value.fn.__qualname__ not in codes:
                waiting.append(value)
            elif isinstance(value, int | float | str) or type(value).__name__ == "constexpr":
                names[name] = str(value)
    launch = sorted(spec.signature.items()), sorted((k, str(v)) for k, v in spec.constexprs.items())
    parts = sorted(codes.items()), sorted(names.items()), *launch, spec.num_warps, spec.num_stages
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def compile_all(specs: Iterable[KernelSpec], targets: Sequence[Target] = TARGETS, method: str = "") -> list[Compiled]:
    """Compile each spec for each target. A kernel that fails gives a row with `error` set; nothing is raised for it."""
    if interpreting():
        raise RuntimeError(INTERPRETED)
    return [_compile(spec, target, method) for spec in specs for target in targets]


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call on a GPU, with the caches cleared before each run."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def _compile(spec: KernelSpec, target: Target, method: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = {}, {}
    for i, name in enumerate(spec.kernel.arg_names):
        kind, _, multiple = ("constexpr" if name in spec.constexprs else spec.signature[name]).partition(":")
        signature[name] = kind
        if multiple:
            hints[(i,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    row = dict(method=method, kernel=spec.name, variant=spec.variant, target=target.name, triton=triton.__version__)
    row["source"] = fingerprint(spec)
    try:
        binary = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options={"num_warps": spec.num_warps, "num_stages": min(spec.num_stages, target.most_stages)},
        )
        registers, spills = (_cuda_usage if target.backend == "cuda" else _hip_usage)(binary.asm)
    except Exception as failure:  # the compiler raises many types, and the table must show the other kernels too
        return Compiled(**row, error=f"{type(failure).__name__}: {str(failure).strip()[-200:]}".replace("\n", " "))
    shared = binary.metadata.shared
    error = f"{shared} bytes of shared memory, {target.shared_limit} exist" if shared > target.shared_limit else ""
    return Compiled(**row, registers=registers, shared=shared, spills=spills, error=error)


def _cuda_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers and stack bytes from the binary; a Triton kernel has no stack but for spilled registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _hip_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Vector registers (accumulation registers included) and scratch bytes from the assembly's metadata."""
    text = asm["amdgcn"]
    return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.private_segment_fixed_size:\s+(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(found.group(1))


def columns() -> list[str]:
    """The columns of aot.csv."""
    return [f.name for f in fields(Compiled) if f.name != "error"]


def read(path: Path = RESULTS) -> list[Compiled]:
    """The stored figures."""
    with path.open(newline="") as file:
        return [
            Compiled(**{k: int(v) if k in ("registers", "shared", "spills") else v for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def write(rows: Iterable[Compiled], path: Path = RESULTS) -> None:
    """Store the figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns(), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def stale(path: Path = RESULTS) -> list[str]:
    """What the stored figures lack, or have of another source than today's; empty if they are up to date."""
    stored = {(r.method, r.kernel, r.variant, r.target): r.source for r in read(path)}
    wanted = {
        (m.slug, spec.name, spec.variant, target.name): fingerprint(spec)
        for m in built() for spec in m.load("kernels").SPECS for target in TARGETS
    }  # fmt: skip
    return sorted(" ".join(key) for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))


def _jobs(each: bool) -> list[tuple[str, int, Target]]:
    """Method, place in its SPECS and target; with `each` one variant of a kernel, in bf16 if there is one."""
    jobs = []
    for method in built():
        chosen: dict[str, int] = {}
        specs = method.load("kernels").SPECS
        for i, spec in enumerate(specs):
            first = chosen.setdefault(spec.name, i)
            if "bf16" in spec.variant and "bf16" not in specs[first].variant:
                chosen[spec.name] = i
        places = chosen.values() if each else range(len(specs))
        jobs += [(method.slug, i, target) for i in places for target in TARGETS]
    return jobs


def _one(job: tuple[str, int, Target]) -> Compiled:
    """Compile the i-th spec of a method; a process finds it by name because a kernel cannot be pickled."""
    slug, index, target = job
    return compile_all([METHODS[slug].load("kernels").SPECS[index]], [target], slug)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: compile everything on all cores, print the table, return 1 if anything failed and 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m zq_lib.core.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--write", nargs="?", const=RESULTS, type=Path, help="store the figures if all is well")
    parser.add_argument("--each", type=Path, metavar="CSV", help="one variant of each kernel, figures written there")
    options = parser.parse_args(arguments)
    if options.write and options.each:
        parser.error("--write stores all variants and --each compiles one of each; give one of the two")
    if interpreting():
        sys.exit(INTERPRETED)
    rows = []
    print(f"{'kernel':26}{'variant':14}{'target':8}{'registers':>10}{'shared':>9}{'spilled':>9}")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # a fork of torch's threads may hang
        for row in pool.map(_one, _jobs(bool(options.each))):
            rows.append(row)
            figures = f"{row.registers:10}{row.shared:9}{row.spills:9}"
            print(f"{row.method + '.' + row.kernel:26}{row.variant:14}{row.target:8}{figures}  {row.error}", flush=True)
    failed = sum(bool(row.error) for row in rows)
    print(f"{len(rows)} binaries, {failed} failed")
    if (options.write or options.each) and not failed:
        write(rows, options.write or options.each)
    old = stale() if options.each else []
    if old:
        print(f"stored figures of another source; run python -m zq_lib.core.kernels --write: {'; '.join(old)}")
    return int(failed > 0 or bool(old))


if __name__ == "__main__":
    sys.exit(main())

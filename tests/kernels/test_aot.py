"""Rung 2: every kernel compiles for three GPUs without one, fits their memory, and spills no more than before."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from zq_lib.core import kernels
from zq_lib.core.kernels import Compiled
from zq_lib.pasta.kernels import SPECS

TARGETS = {"sm_80", "sm_90", "gfx942"}


def run(*arguments: str, interpret: bool = False, timeout: float = 1200) -> subprocess.CompletedProcess:
    """A process of its own: in this one the kernels may already be decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(TRITON_DEFAULT_FP_FUSION="1")
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.timeout(1300)
def test_each_kernel_compiles_for_each_gpu_as_the_stored_figures_say_and_these_are_of_todays_sources(tmp_path) -> None:
    path = tmp_path / "aot.csv"
    done = run("-c", f"import sys; from zq_lib.core.kernels import main; sys.exit(main(['--each', {str(path)!r}]))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stored = {(r.method, r.kernel, r.variant, r.target): r for r in kernels.read()}
    compiled = {(r.method, r.kernel, r.variant, r.target): r for r in kernels.read(path)}
    assert {(*key[:2], key[3]) for key in compiled} == {(*key[:2], key[3]) for key in stored}
    assert {key[3] for key in compiled} == TARGETS
    for key, row in compiled.items():
        if stored[key].triton == row.triton:  # another compiler allocates registers differently
            assert row == stored[key]


def test_a_changed_kernel_helper_constant_or_type_makes_the_stored_figures_stale(tmp_path) -> None:
    program = (
        "import triton, triton.language as tl\n"
        "from zq_lib.core.kernels import KernelSpec, fingerprint\n"
        "SCALE = tl.constexpr({scale})\n"
        "@triton.jit\n"
        "def helper(x):\n"
        "    return {helper}\n"
        "@triton.jit\n"
        "def kernel(X, N: tl.constexpr):\n"
        "    x = tl.load(X + tl.arange(0, N))  # {comment}\n"
        "    tl.store(X + tl.arange(0, N), helper(x) * SCALE)\n"
        "print(fingerprint(KernelSpec('k', kernel, {{'X': '{kind}'}}, {{'N': 16}})))\n"
    )
    plain = dict(scale=2, helper="x + 1", comment="one", kind="*fp32")
    changes = ({}, dict(comment="two"), dict(scale=3), dict(helper="x + 2"), dict(kind="*bf16"))
    marks = []
    for i, change in enumerate(changes):
        path = tmp_path / f"kernel{i}.py"
        path.write_text(program.format(**plain | change))
        done = run(str(path))
        assert done.returncode == 0, done.stderr
        marks.append(done.stdout.strip())
    assert marks[0] == marks[1] and len(set(marks)) == 4


def test_no_stored_kernel_spills() -> None:
    assert [row for row in kernels.read() if row.spills] == []


def test_the_specs_cover_each_kernel_at_both_common_widths_in_fp32_and_with_a_mask() -> None:
    have = {(spec.name, spec.variant) for spec in SPECS}
    for name in ("forward", "decode", "backward_queries", "backward_keys"):
        assert {(name, v) for v in ("fp32 64", "bf16 64", "bf16 128", "bf16 64 mask")} <= have
    assert {("merge", v) for v in ("fp32 64", "bf16 64", "bf16 128")} <= have


def test_a_kernel_that_does_not_compile_is_a_row_with_the_reason_and_an_exit_code(tmp_path) -> None:
    (tmp_path / "broken.py").write_text(
        "import triton, triton.language as tl\n"
        "from zq_lib.core.kernels import KernelSpec, compile_all\n"
        "@triton.jit\n"
        "def kernel(X, N: tl.constexpr):\n"
        "    tl.store(X + tl.arange(0, N), tl.dot(tl.arange(0, N), tl.arange(0, N)))\n"
        "for row in compile_all([KernelSpec('broken', kernel, {'X': '*fp32'}, {'N': 16})]):\n"
        "    print(row.target, bool(row.error), row.registers)\n"
    )
    done = run(str(tmp_path / "broken.py"))
    assert done.stdout.split("\n")[:3] == ["sm_80 True 0", "sm_90 True 0", "gfx942 True 0"], done.stderr


def test_more_shared_memory_than_a_gpu_has_is_an_error_with_both_figures(tmp_path) -> None:
    (tmp_path / "large.py").write_text(
        "import triton, triton.language as tl\n"
        "from zq_lib.core.kernels import KernelSpec, compile_all\n"
        "@triton.jit\n"
        "def kernel(X, M: tl.constexpr, N: tl.constexpr):\n"
        "    row = tl.arange(0, M)\n"
        "    x = tl.load(X + row[:, None] * N + tl.arange(0, N)[None, :])\n"
        "    tl.store(X + row[:, None] * M + row[None, :], tl.dot(x, tl.trans(x)))\n"
        "for width in (1024, 2048):\n"
        "    for row in compile_all([KernelSpec('large', kernel, {'X': '*fp16:16'}, {'M': 32, 'N': width}, 16)]):\n"
        "        print(width, row.target, row.error)\n"
    )
    done = run(str(tmp_path / "large.py"))
    for target in kernels.TARGETS:
        message = rf"\d+ bytes of shared memory, {target.shared_limit} exist"
        assert re.search(rf"^2048 {target.name} {message}$", done.stdout, re.M), done.stdout + done.stderr
        assert re.search(rf"^1024 {target.name} $", done.stdout, re.M), done.stdout + done.stderr


def test_compiling_with_the_interpreter_switched_on_is_refused_with_the_remedy() -> None:
    done = run("-m", "zq_lib.core.kernels", interpret=True)
    assert done.returncode != 0 and "unset it and start Python again" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_table_survives_writing_and_reading(tmp_path) -> None:
    rows = [Compiled("pasta", "forward", "bf16 64", "sm_80", 200, 4096, 0, "3.9.0")]
    kernels.write(rows, tmp_path / "aot.csv")
    assert kernels.read(tmp_path / "aot.csv") == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="the process below is the one without a GPU")
def test_importing_the_library_does_not_import_triton() -> None:
    done = run("-c", "import sys, zq_lib, zq_lib.core.kernels; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr

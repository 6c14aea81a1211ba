"""The GPU benchmark's own logic, on a CPU: cases of toy size in the interpreter and a stopwatch that lies."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from zq_lib.bench import gpu
from zq_lib.core.backend import interpreting
from zq_lib.core.kernels import GpuCase
from zq_lib.pasta import kernels_bench

toy = pytest.mark.skipif(not interpreting(), reason="a GPU is here: `make gpu` runs the cases at full size")


def once(call) -> float:
    call()
    return 2.0


def case(error: float = 0.5, **runs) -> GpuCase:
    return GpuCase("prefill", dict(T=4), lambda: (error, 1.0), runs or dict(ours=lambda: None), flops=4e9, moved=2e6)


def test_a_row_holds_time_throughput_and_the_error_it_was_allowed() -> None:
    (row,) = gpu.rows_of("pasta", case(), once, lambda line: None)
    assert row["ms"] == "2" and row["tflops"] == "2" and row["gbytes_per_s"] == "1"
    assert (row["size"], row["error"], row["allowed"]) == ("T=4", "0.5", "1")


@pytest.mark.parametrize("error", [1.1, math.inf, math.nan])
def test_a_case_that_fails_its_check_is_neither_timed_nor_written(error, tmp_path) -> None:
    said, timed = [], []
    assert gpu.rows_of("pasta", case(error, ours=lambda: timed.append(1)), once, said.append) == []
    assert not timed and "REFUSED" in said[0]
    assert gpu.measure([("pasta", case(error))], once, "cpu", said.append, tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_a_peer_that_cannot_run_leaves_the_others_standing() -> None:
    def broken():
        raise RuntimeError("No available kernel\nmore")

    said = []
    rows = gpu.rows_of("pasta", case(ours=lambda: None, peer=broken), once, said.append)
    assert [row["implementation"] for row in rows] == ["ours"]
    assert said[-1].endswith("peer did not run: No available kernel")


def test_rows_are_appended_under_one_header(tmp_path) -> None:
    for _ in range(2):
        assert gpu.measure([("pasta", case())], once, "cpu", lambda line: None, tmp_path) == 0
    with (tmp_path / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0] == rows[1] and tuple(rows[0]) == gpu.COLUMNS
    assert rows[0]["torch"] == torch.__version__ and rows[0]["copy_gbytes_per_s"]


@toy
@pytest.mark.parametrize(("name", "T"), [("prefill", 17), ("training", 17), ("decode", 1)])
def test_every_case_of_pasta_passes_its_check_and_runs_with_its_peers(name, T) -> None:
    found = kernels_bench.cases("cpu", lengths=(17,), caches=(20,), widths=(16,), heads=(2, 1), dtype=torch.float32)
    (wanted,) = [c for c in found if c.name == name]
    said = []
    rows = gpu.rows_of("pasta", wanted, once, said.append)
    assert [row["implementation"] for row in rows][:2] == ["triton, steered", "triton, gate 0"]
    assert {"sdpa, bias column", "sdpa, materialised mask"} <= {row["implementation"] for row in rows}, said
    assert f"T={T} " in rows[0]["size"]


@toy
def test_the_peers_that_steer_compute_what_the_kernel_computes() -> None:
    found = kernels_bench.cases("cpu", lengths=(17,), caches=(), widths=(16,), heads=(2, 1), dtype=torch.float32)
    prefill = next(c for c in found if c.name == "prefill")
    ours = prefill.runs["triton, steered"]().transpose(1, 2)
    for peer in ("sdpa, bias column", "sdpa, materialised mask"):
        torch.testing.assert_close(prefill.runs[peer](), ours, atol=1e-5, rtol=1e-5)
    off = prefill.runs["triton, gate 0"]().transpose(1, 2)
    torch.testing.assert_close(prefill.runs["sdpa flash, unsteered"](), off, atol=1e-5, rtol=1e-5)


@toy
def test_a_wrong_kernel_is_refused(monkeypatch) -> None:
    right = kernels_bench.flash_attention

    def wrong(*args, **named):
        out, lse = right(*args, **named)
        return out * 1.001, lse

    monkeypatch.setattr(kernels_bench, "flash_attention", wrong)
    found = kernels_bench.cases("cpu", lengths=(17,), caches=(), widths=(16,), heads=(1, 1), dtype=torch.float32)
    for broken in found:
        assert gpu.rows_of("pasta", replace(broken, runs={}), once, lambda line: None) == []
        assert broken.parity()[0] > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU, and here is one")
def test_without_a_gpu_the_command_says_so_in_one_sentence(capsys) -> None:
    assert gpu.main() == 1
    assert capsys.readouterr().out.startswith("No GPU is visible to torch")


def test_the_gpu_path_imports_no_notebook_or_demo_package() -> None:
    code = (
        "import sys; import zq_lib.bench.gpu, zq_lib.pasta.kernels_bench; "
        "print([m for m in ('gradio', 'nbval', 'ipywidgets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

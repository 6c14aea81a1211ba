"""What the compiler makes of AdaShift's kernels: the streaming ones are worth nothing without wide loads."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zq_lib.adashift.kernels import SPECS

for spec in SPECS:
    if spec.name == "finish" or spec.variant not in ("fp32 max", "fp32 max, bf16 ring", "fp32 max, beta1 0"):
        continue
    signature, hints = {}, {}
    for i, name in enumerate(spec.kernel.arg_names):
        kind, _, multiple = ("constexpr" if name in spec.constexprs else spec.signature[name]).partition(":")
        signature[name] = kind
        if multiple:
            hints[(i,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    options = dict(num_warps=spec.num_warps, num_stages=spec.num_stages)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    wide = [len(re.findall(rf"{way}\\.global\\S*\\.v4", text)) for way in ("ld", "st")]
    print(spec.name, spec.variant, *wide, sep="|")
"""


def test_whole_blocks_are_loaded_and_stored_sixteen_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(TRITON_DEFAULT_FP_FUSION="1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    # Eight numbers a thread: two loads of fp32 each for parameter, gradient, moment and ring, one of bf16.
    assert done.stdout.split("\n")[:-1] == [
        "update|fp32 max|8|6",
        "update|fp32 max, bf16 ring|7|5",
        "update|fp32 max, beta1 0|4|2",
        "update_rows|fp32 max|8|6",
    ], done.stderr

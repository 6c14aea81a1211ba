"""Which specialisations of GEAR's kernels are compiled ahead of time: each backbone once, with each part of GEAR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zq_lib.core.kernels import KernelSpec
from zq_lib.core.kernels_launch import DTYPES, NAMES, padded
from zq_lib.gear import kernels_decode, kernels_quantize
from zq_lib.gear.kernels_common import MERGE, columns, packed_operand, settings, slice_width

MERGED_AT_ONCE = 16  # parts that the merge kernel holds in registers
SIDE = {
    "CODES": "*u8:16", "SCALE": "*fp16:16", "ZERO": "*fp16:16", "LEFT": "*fp16:16", "RIGHT": "*fp16:16",
    "LEFT_SCALE": "*fp16:16", "RIGHT_SCALE": "*fp16:16", "TOKEN": "*u8:16", "CHANNEL": "*u8:16", "DELTA": "*fp16:16",
    "START": "*i32:16",
}  # fmt: skip
PARTS = {
    "low rank": ("LEFT", "RIGHT"),
    "int8": ("LEFT_SCALE", "RIGHT_SCALE"),
    "outliers": ("TOKEN", "CHANNEL", "DELTA", "START"),
}


@dataclass(frozen=True)
class Variant:
    """One kind of block: bits of keys and values, tokens of a key group (0: a scale per token), which parts it has."""

    name: str
    dtype: torch.dtype = torch.float16
    width: int = 128
    bits: tuple[int, int] = (2, 2)
    group: int = 64
    whole: bool = False
    value_groups: int = 2
    parts: tuple[str, ...] = ()
    meta: str = "fp16"
    masked: bool = False


VARIANTS = (
    Variant("2 bits"),
    Variant("GEAR-L", parts=("low rank",)),
    Variant("GEAR-L mask", parts=("low rank",), masked=True),
    Variant("GEAR", parts=("low rank", "outliers")),
    Variant("GEAR page", parts=("low rank", "outliers"), whole=True),
    Variant("3 bits", width=64, bits=(3, 3), value_groups=1),
    Variant("KCVT 4 bits", bits=(4, 4), whole=True, value_groups=1, parts=("low rank", "int8")),
    Variant("8 bits", dtype=torch.bfloat16, bits=(8, 8), meta="fp32"),
    Variant("per token", bits=(4, 4), group=0, whole=True),
    Variant("wide", width=256, bits=(4, 2), value_groups=4),
    Variant("GEAR", dtype=torch.float32, width=64, value_groups=1, parts=("low rank", "outliers")),
)


def specs() -> list[KernelSpec]:
    """What to compile ahead of time."""
    found = [_packed(variant) for variant in VARIANTS]
    for dtype, width in ((torch.float32, 64), (torch.bfloat16, 128)):
        constants = dict(
            D=width, BLOCK_D=padded(width), BLOCK_M=16, BLOCK_N=settings("exact", dtype, width).tokens,
            DOT=DTYPES[dtype], GATE=None, BIAS=None,
        )  # fmt: skip
        found.append(_spec("exact", kernels_decode.exact, dtype, width, "", constants, {}))
    constants = dict(D=128, BLOCK_D=128, BLOCK_S=MERGED_AT_ONCE)
    found.append(_spec("merge", kernels_decode.merge, torch.float16, 128, "", constants, {}))
    for dtype, bits in ((torch.float16, 2), (torch.bfloat16, 3), (torch.float32, 8)):
        tokens = settings("quantize", dtype, 128).tokens
        for kernel, most in ((kernels_quantize.quantize_keys, 16), (kernels_quantize.quantize_values, 256)):
            constants = kernels_quantize.tile(128, bits, tokens, most) | dict(GROUPS=2)
            if dtype == torch.bfloat16:
                constants |= dict(KEEP=None)
            found.append(_spec(kernel.__name__, kernel, dtype, 128, f"{bits} bits", constants, {}))
    return found


def _packed(variant: Variant) -> KernelSpec:
    """The specialisation of `packed` that a launch on a block of this kind ends up with."""
    launch = settings("parts" if variant.parts else "packed", variant.dtype, variant.width)
    rank = 4 if "low rank" in variant.parts else 0
    side = columns(rank, variant.dtype)
    constants: dict[str, Any] = dict(
        D=variant.width, BLOCK_M=16, BLOCK_N=launch.tokens, BLOCK_E=launch.entries, K_BITS=variant.bits[0],
        K_WIDE=padded(slice_width(variant.width, variant.bits[0])), K_RANK=rank, K_SIDE=side,
        K_GROUPS=0 if variant.group else 2, V_BITS=variant.bits[1],
        V_WIDE=columns(slice_width(variant.width, variant.bits[1]), variant.dtype), V_RANK=rank, V_SIDE=side,
        V_GROUPS=variant.value_groups, WHOLE=variant.whole, DOT=packed_operand(variant.dtype),
    )  # fmt: skip
    for part, names in PARTS.items():
        if part not in variant.parts:
            constants |= {f"{side}_{name}": None for side in "KV" for name in names}
    if not variant.masked:
        constants |= dict(GATE=None, BIAS=None, MASK=None)
    types = {f"{side}_{name}": kind for side in "KV" for name, kind in SIDE.items()}
    for side in "KV":
        types |= {f"{side}_SCALE": f"*{variant.meta}:16", f"{side}_ZERO": f"*{variant.meta}:16"}
        if "int8" in variant.parts:
            types |= {f"{side}_LEFT": "*i8:16", f"{side}_RIGHT": "*i8:16"}
    spec = _spec("packed", kernels_decode.packed, variant.dtype, variant.width, variant.name, constants, types)
    return replace(spec, num_warps=launch.warps, num_stages=launch.stages)


def _spec(
    name: str, kernel: Any, dtype: torch.dtype, width: int, what: str, constants: Mapping[str, Any],
    types: Mapping[str, str],
) -> KernelSpec:  # fmt: skip
    """A kernel on contiguous tensors of this type and width; `constants` and `types` override what is usual."""
    launch = settings("exact", dtype, width) if name == "exact" else MERGE
    if name.startswith("quantize"):
        launch = settings("quantize", dtype, width)
    usual = dict.fromkeys(("Q", "K", "V", "X", "OUT"), f"*{NAMES[dtype]}:16")
    usual |= dict.fromkeys(("GATE", "BIAS", "PART", "PART_LSE", "LSE"), "*fp32:16")
    usual |= dict(MASK="*u8:16", KEEP="*u8:16", CODES="*u8:16", SCALE="*fp16:16", ZERO="*fp16:16", scale="fp32")
    usual |= dict(n="i32:16", group="i32:16") | dict.fromkeys(
        (a for a in kernel.arg_names if a.startswith(("stride_q", "stride_k", "stride_v", "stride_x"))), "i32:16"
    )
    usual |= types
    arguments = kernel.arg_names
    return KernelSpec(
        name, kernel,
        signature={a: usual.get(a, "i32") for a in arguments if a not in constants},
        constexprs={a: constants[a] for a in arguments if a in constants},
        num_warps=launch.warps, num_stages=launch.stages,
        variant=f"{NAMES[dtype]} {width} {what}".strip(),
    )  # fmt: skip

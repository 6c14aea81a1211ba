"""GEAR: a KV cache of low-bit codes, a low-rank residual and sparse outliers (Kang et al., 2024, arXiv 2403.05527).

>>> from zq_lib import gear
>>> cache = gear.GearCache(model.config, "paper_2bit")
>>> with gear.attend_packed(model):  # optional: attention straight on the packed form
...     model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
>>> cache.report()
"""

from __future__ import annotations

from zq_lib.gear.attention import attend_packed, packed_attention
from zq_lib.gear.cache import GearCache, GearLayer
from zq_lib.gear.config import PRESETS, GearConfig
from zq_lib.gear.packed import Block, Packed, compress
from zq_lib.gear.planner import Plan, plan

__all__ = [
    "Block",
    "GearCache",
    "GearConfig",
    "GearLayer",
    "PRESETS",
    "Packed",
    "Plan",
    "attend_packed",
    "compress",
    "packed_attention",
    "plan",
]

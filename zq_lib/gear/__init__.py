"""GEAR: a KV cache of low-bit codes, a low-rank residual and sparse outliers (Kang et al., 2024, arXiv 2403.05527)."""

from __future__ import annotations

from zq_lib.gear.attention import attend_packed, packed_attention
from zq_lib.gear.cache import GearCache
from zq_lib.gear.config import PRESETS, GearConfig

__all__ = ["PRESETS", "GearCache", "GearConfig", "attend_packed", "packed_attention"]

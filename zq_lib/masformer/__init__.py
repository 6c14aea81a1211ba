"""MASFormer: full attention at a few layers, local attention elsewhere (Zhang et al., 2023, arXiv 2310.12442).

>>> from zq_lib import masformer
>>> plan = masformer.shipped().plan(8, span=64, sinks=4)  # eight layers of the embedded model, chosen by measurement
>>> with masformer.attach(model, plan) as conversion:
...     model.generate(**inputs, max_new_tokens=100)  # local layers keep only sinks and window in the cache
...     conversion.report()
"""

from __future__ import annotations

from zq_lib.masformer.cache import SpanCache
from zq_lib.masformer.config import MASFormerConfig
from zq_lib.masformer.conversion import Conversion, ConversionReport, attach, load
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.profiling import Importance, Search, profile, search, shipped
from zq_lib.masformer.spans import Cost, SpanPlan, placement, receptive_field
from zq_lib.masformer.tiny import TinyDecoder
from zq_lib.masformer.training import TrainingConfig, train

__all__ = [
    "Conversion",
    "ConversionReport",
    "Cost",
    "Importance",
    "MASFormerConfig",
    "Search",
    "SpanCache",
    "SpanPlan",
    "TinyDecoder",
    "TrainingConfig",
    "attach",
    "load",
    "local_attention",
    "placement",
    "profile",
    "receptive_field",
    "search",
    "shipped",
    "train",
]

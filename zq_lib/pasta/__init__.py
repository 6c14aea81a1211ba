"""PASTA: post-hoc attention steering (Zhang et al., ICLR 2024, arXiv 2311.02262).

>>> from zq_lib import pasta
>>> prompt = pasta.encode(tokenizer, "Previously, Paris. *Currently, Oslo.* The capital is")
>>> with pasta.attach(model) as steering:
...     steering.generate(prompt, max_new_tokens=8)
"""

from __future__ import annotations

from zq_lib.pasta.config import PastaConfig
from zq_lib.pasta.markup import MarkedText, MarkupError, Span, escape, parse
from zq_lib.pasta.profiles import HeadProfile, intersection, shipped_profile, union
from zq_lib.pasta.profiling import HeadScores, Probe, profile_heads, score_heads
from zq_lib.pasta.prompt import Prompt, encode
from zq_lib.pasta.steering import Steering, SteeringReport, attach

__all__ = [
    "HeadProfile",
    "HeadScores",
    "MarkedText",
    "MarkupError",
    "PastaConfig",
    "Probe",
    "Prompt",
    "Span",
    "Steering",
    "SteeringReport",
    "attach",
    "encode",
    "escape",
    "intersection",
    "parse",
    "profile_heads",
    "score_heads",
    "shipped_profile",
    "union",
]

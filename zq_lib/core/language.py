"""Language models on running text: windows of tokens, and how surprised a model is by them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: Sequence[Tensor], skip: int = 1) -> float:
    """exp of the mean loss over all tokens of `texts` ([T] each) but the first `skip`, which only give context."""
    total, count = 0.0, 0
    for ids in texts:
        logits = model(ids[None].to(model.device), use_cache=False).logits[0, skip - 1 : -1]  # [T - skip, V]
        wanted = ids[skip:].to(logits.device)
        total += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(min(total / count, 700.0))  # a broken model's is beyond any float

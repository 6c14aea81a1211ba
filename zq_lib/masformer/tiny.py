"""A decoder of a few thousand weights whose layers take their spans as an argument, and the recall task it learns.

No masks, no configuration of another library: every layer calls `local_attention` (or causal attention) directly.

The task: eight facts (a key and its value in one token), fillers, then eight keys in another order; at each of them the
value is wanted. Every fact lies further back than a window, so somebody must carry it across.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zq_lib.core.lab import Row
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.spans import Span, SpanPlan

KEYS = VALUES = 8
FILLERS = 24
LENGTH = KEYS + FILLERS + KEYS
VOCABULARY = KEYS * VALUES + KEYS + 1  # facts, questions, the filler
CHANCE = 1 / VALUES


class Block(nn.Module):
    """Pre-norm attention and MLP. `span` None is full attention."""

    def __init__(self, width: int, heads: int, span: Span, kind: str, sinks: int) -> None:
        super().__init__()
        self.heads, self.span, self.kind, self.sinks = heads, span, kind, sinks
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, C]; cos, sin [T, D]."""
        b, t, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.span is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = local_attention(q, k, v, span=self.span, kind=self.kind, sinks=self.sinks)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norms[1](x))


class TinyDecoder(nn.Module):
    """A decoder that follows a plan, with rotary positions.

    >>> model = TinyDecoder(SpanPlan.mixed(4, full=(0,), span=8))
    >>> model(ids)  # [B, T] int64 -> [B, T, classes]
    """

    def __init__(
        self, plan: SpanPlan, vocabulary: int = VOCABULARY, classes: int = VALUES, width: int = 64, heads: int = 4
    ) -> None:  # fmt: skip
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} must be a multiple of twice heads={heads}, for example {4 * heads * 8}")
        self.plan, self.head_width = plan, width // heads
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width, heads, span, plan.kind, plan.sinks) for span in plan.layers])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, classes]."""
        cos, sin = angles(ids.shape[1], self.head_width, ids.device)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def angles(length: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary positions, [T, D] each."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    turned = torch.arange(length, device=device)[:, None] * torch.cat([rates, rates])  # [T, D]
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def recall_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts [B, LENGTH] and the values wanted at their last tokens, [B, KEYS]."""
    order = torch.rand(count, KEYS, generator=generator).argsort(-1)  # keys in the order of the facts
    value = torch.randint(VALUES, (count, KEYS), generator=generator)  # of each key
    asked = torch.rand(count, KEYS, generator=generator).argsort(-1)
    facts = order * VALUES + value.gather(1, order)
    filler = torch.full((count, FILLERS), VOCABULARY - 1)
    return torch.cat([facts, filler, KEYS * VALUES + asked], 1), value.gather(1, asked)


def train_recall(
    plan: SpanPlan, *, seed: int = 0, steps: int = 300, batch: int = 32, rate: float = 4e-3, check: int = 25,
    enough: float = 0.995,
) -> Iterator[Row]:  # fmt: skip
    """Train a tiny decoder on recall; yields a row every `check` steps and stops at `enough` accuracy.

    Rows: step, loss (training) and accuracy on 256 texts that it never trains on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyDecoder(plan)
    generator = torch.Generator().manual_seed(seed + 1)
    test, wanted = recall_batch(256, torch.Generator().manual_seed(seed + 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        ids, target = recall_batch(batch, generator)
        loss = F.cross_entropy(model(ids)[:, -KEYS:].flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % check == 0 or step == steps:
            with torch.no_grad():
                right = (model(test)[:, -KEYS:].argmax(-1) == wanted).float().mean().item()
            yield {"step": step, "loss": loss.item(), "accuracy": right}
            if right >= enough:
                return

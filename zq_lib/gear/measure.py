"""What compression does to a real model: errors of keys and values, and distance from full precision, beside the bits.

The protocol: a prompt is compressed once, then the text goes on in chunks that the model is told, not asked (teacher
forcing). A chunk is exact while it runs and joins the cache afterwards. Every token of the chunks is scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import data
from zq_lib.core.lab import Row
from zq_lib.gear.cache import Gear, GearCache

PROMPT = 388  # six buffers of 64 and 4: with four sinks or without, 384 tokens are compressed and 4 are exact
CHUNK, STEPS = 64, 192
TEXTS = ("reasoning", "technical", "scripture", "encyclopedia")


def reasoning() -> str:
    """Eight arithmetic word problems with worked answers, written for this library."""
    return (Path(__file__).parent / "data" / "reasoning.txt").read_text("utf-8")


def texts(tokenizer: PreTrainedTokenizerBase, tokens: int = 1024) -> dict[str, Tensor]:
    """The first `tokens` tokens of four texts of different kinds, [1, tokens] each, by name (`TEXTS`).

    Raises ValueError when one of them is shorter.
    """
    sources = {
        "reasoning": reasoning(),
        "technical": data.technical(),
        "scripture": data.kjv(),
        "encyclopedia": "\n\n".join(data.quac_passages()),
    }
    found = {}
    for name, source in sources.items():
        # a token is hardly ever longer than 16 characters, and the whole of a long text takes minutes
        ids = tokenizer(source[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens]
        if ids.shape[1] < tokens:
            raise ValueError(f"tokens={tokens} is more than the text {name!r} has; use at most {ids.shape[1]}")
        found[name] = ids
    return found


@torch.no_grad()
def keys_values(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that a full-precision run over `ids` [1, S] caches: per layer [1, G, S, D] float32 each."""
    cache = DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys.float(), layer.values.float()) for layer in cache.layers]


def relative_error(x: Tensor, restored: Tensor) -> float:
    """|x - restored| / |x|, Frobenius."""
    return float((x - restored).norm() / x.norm())


@dataclass(frozen=True, eq=False)
class Expected:
    """What the model does in full precision: log-probabilities [n, V] of the scored positions, and the prompt's keys
    and values per layer, [1, G, prompt, D] each in the model's dtype."""

    log_probs: Tensor
    prompt: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Score:
    """How far a compressed run is from full precision.

    kl     [n] float32: KL(full || compressed) in nats at every scored position.
    agree  [n] bool: is the most likely token the same?
    bits   per element of the compressed prompt, counting everything stored for it; 16 when nothing is compressed.
    bytes  of the whole cache at the end, with sinks and buffer in the model's precision.
    """

    kl: Tensor
    agree: Tensor
    bits: float
    bytes: int

    def row(self, **label: object) -> Row:
        """One table row: bits, KL with its standard error over positions, top-1 agreement."""
        return {
            **label, "bits": self.bits, "kl": float(self.kl.mean()), "kl_se": standard_error(self.kl),
            "top1": float(self.agree.float().mean()), "n": len(self.kl), "bytes": self.bytes,
        }  # fmt: skip


class Pair(NamedTuple):
    """Greedy tokens of a full-precision and of a compressed run, where they first differ (None: nowhere), and the
    compressed cache as it is at the end."""

    full: list[int]
    compressed: list[int]
    divergence: int | None
    cache: GearCache


def standard_error(x: Tensor) -> float:
    """Of the mean of x [n], as if its entries were independent."""
    return float(x.std() / len(x) ** 0.5)


def paired(a: Score, b: Score) -> tuple[float, float]:
    """Mean difference in KL, a - b, position by position, and its standard error."""
    if a.kl.shape != b.kl.shape:
        raise ValueError(f"a has {len(a.kl)} positions and b {len(b.kl)}; score both with the same steps")
    difference = a.kl - b.kl
    return float(difference.mean()), standard_error(difference)


@torch.no_grad()
def full_precision(model: PreTrainedModel, ids: Tensor, *, prompt: int = PROMPT, steps: int = STEPS) -> Expected:
    """One ordinary run over the first prompt + steps tokens of `ids` [1, S]; give it to `teacher_forced`.

    Raises ValueError when `ids` has fewer.
    """
    _check(ids, prompt, steps)
    cache = DynamicCache()
    logits = model(ids[:, : prompt + steps], past_key_values=cache, logits_to_keep=steps).logits[0]
    kept = tuple((layer.keys[:, :, :prompt], layer.values[:, :, :prompt]) for layer in cache.layers)
    return Expected(logits.float().log_softmax(-1), kept)


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel,
    ids: Tensor,
    gear: Gear,
    *,
    prompt: int = PROMPT,
    chunk: int = CHUNK,
    steps: int = STEPS,
    expected: Expected | None = None,
) -> Score:
    """Score a setting on a text (protocol above). Works with any attention; `attend_packed` around it changes how the
    cache is read, not what it holds.

    Args: `ids` [1, S] with S >= prompt + steps; `gear` as GearCache takes it; `expected` from `full_precision` with the
    same prompt and steps, to score several settings. Raises ValueError when the lengths do not fit.
    """
    _check(ids, prompt, steps)
    expected = full_precision(model, ids, prompt=prompt, steps=steps) if expected is None else expected
    had = expected.prompt[0][0].shape[2], len(expected.log_probs)
    if had != (prompt, steps):
        raise ValueError(f"expected is of prompt={had[0]}, steps={had[1]}, not {prompt} and {steps}; use the same")
    cache = GearCache(model.config, gear)
    for layer, (keys, values) in zip(cache.layers, expected.prompt, strict=True):
        layer.update(keys, values)  # a prompt attends to itself exactly, so a run of the model would give the same
    bits, kl, agree = compressed_bits(cache), [], []
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        logits = model(ids[:, prompt + start : prompt + stop], past_key_values=cache).logits[0]
        got, wanted = logits.float().log_softmax(-1), expected.log_probs[start:stop]
        kl.append((wanted.exp() * (wanted - got)).sum(-1))
        agree.append(got.argmax(-1) == wanted.argmax(-1))
    return Score(torch.cat(kl).cpu(), torch.cat(agree).cpu(), bits, cache.nbytes())


def compressed_bits(cache: GearCache) -> float:
    """Bits per compressed element, everything counted that is stored for them; sinks and buffer are not compressed.

    16 when nothing is compressed yet.
    """
    size = elements = 0
    for layer in cache.gear_layers().values():
        for block in layer.blocks:
            for side in (block.keys, block.values):
                size += sum(side.nbytes().values())
                elements += side.codes[..., 0].numel() * side.width
    return 8 * size / elements if elements else 16.0


@torch.no_grad()
def generate_pair(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_text: str, gear: Gear, new_tokens: int = 64
) -> Pair:
    """Continue `prompt_text` greedily, once with DynamicCache and once with GearCache.

    The text is given to the tokenizer as it is; for a chat, apply the template first.
    """
    ids = tokenizer(prompt_text, return_tensors="pt").to(model.device)
    cache, said = GearCache(model.config, gear), []
    for past in (DynamicCache(config=model.config), cache):
        out = model.generate(
            **ids, past_key_values=past, do_sample=False, max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        said.append(out[0, ids.input_ids.shape[1] :].tolist())
    full, compressed = said
    alike = 0
    while alike < min(len(full), len(compressed)) and full[alike] == compressed[alike]:
        alike += 1
    return Pair(full, compressed, None if full == compressed else alike, cache)


def _check(ids: Tensor, prompt: int, steps: int) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < prompt + steps:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} do not hold one text of prompt={prompt} and steps={steps} tokens; give "
            f"at least {prompt + steps}, or fewer steps"
        )

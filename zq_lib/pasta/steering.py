"""Attach PASTA to a model: `attach`, `steer`, `generate`, `report`, `detach`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zq_lib.core.attach import (
    Gate,
    KeyBias,
    attention_modules,
    decoder_blocks,
    key_bias,
    restore_implementation,
    track_past,
    use_implementation,
)
from zq_lib.pasta.attention import NAME
from zq_lib.pasta.config import PastaConfig, head_map
from zq_lib.pasta.profiles import HeadProfile, shipped_profile
from zq_lib.pasta.prompt import Prompt


@dataclass(frozen=True)
class SteeringReport:
    """What steering did: heads as {layer: heads}, how many attention calls were biased, tokens marked and scaled.

    With `record=True`, `before` and `after` hold the share of the marked tokens in the last prompt row, [L, B, H].
    """

    heads: dict[int, tuple[int, ...]]
    alpha: float
    mode: str
    calls: int
    marked_tokens: int
    scaled_tokens: int
    before: Tensor | None = None
    after: Tensor | None = None


def attach(
    model: PreTrainedModel, config: PastaConfig | None = None, *, profile: HeadProfile | None = None, **settings: Any
) -> Steering:
    """Make `model` steerable. Nothing changes until a prompt with marks is steered.

    Args: `config`, or its fields as keywords (`attach(model, alpha=0.03)`); `profile`, checked against the model,
    instead of `heads`. Returns a handle that is also a context manager; `detach()` leaves no trace.

    Raises ValueError, with the model as it was, for heads that do not exist, a profile of another model, a model
    without attention layers or with soft-capped scores, and an attention implementation other than SDPA.

    >>> with pasta.attach(model) as steering:
    ...     prompt = pasta.encode(tokenizer, "Previously, ... *Currently, ...*")
    ...     steering.generate(prompt, max_new_tokens=8)
    """
    if config is None:
        config = PastaConfig(**settings)
    elif settings:
        config = replace(config, **settings)
    return Steering(model, config, profile)


class Steering:
    """The handle that `attach` returns."""

    def __init__(self, model: PreTrainedModel, config: PastaConfig, profile: HeadProfile | None = None) -> None:
        self.model, self.config = model, config
        self._modules = attention_modules(model)
        _refuse_soft_caps(model, self._modules)
        text = model.config.get_text_config()
        if profile is None and config.heads == "profile":
            profile = shipped_profile()
        if profile is not None:
            profile.check(model)
        self.heads = head_map(
            profile.heads if profile is not None else config.heads, max(self._modules) + 1, text.num_attention_heads
        )
        self._gates = gates_for(self._modules, self.heads, text.num_attention_heads, model.device)
        self._bias: KeyBias | None = None
        self._scaled = self._marked = 0
        stack, _ = decoder_blocks(model, self._modules)
        use_implementation(model, NAME)
        self._hook = stack.register_forward_pre_hook(track_past, with_kwargs=True)
        self._attached = True

    @contextlib.contextmanager
    def steer(self, prompt: Prompt, *, record: bool = False) -> Iterator[Self]:
        """Steer every forward of the model inside this block, in this thread or task only, towards `prompt`'s marks.

        A thread started inside the block is not steered (generate inside the thread instead), and a backward pass with
        gradient checkpointing belongs inside the block. A prompt without marks, with everything marked, or alpha = 1
        runs unsteered, bit for bit. With `record=True` the report also holds each head's share of the marked tokens at
        the last row of the latest forward.
        """
        if not self._attached:
            raise RuntimeError("this steering was detached; attach to the model again")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and prompt.input_ids.shape[1] > limit:
            raise ValueError(
                f"prompt has {prompt.input_ids.shape[1]} tokens, but this model reads {limit}; shorten it or encode "
                f"with max_length={limit}"
            )
        bias = prompt_bias(prompt, self.config)
        idle = not bool(bias.beta.any())
        if idle and bool(prompt.marked.any()) and self.config.alpha < 1:
            warnings.warn("all of the prompt is marked, so there is nothing to scale down; not steered", stacklevel=3)
        device = self.model.device
        bias.beta, bias.favoured = bias.beta.to(device), bias.favoured.to(device)
        bias.gates = {} if idle else self._gates
        bias.layers = {m: layer for layer, m in self._modules.items()}
        bias.record = {"before": {}, "after": {}, "probs": {}} if record else None
        self._bias, self._marked = bias, int(prompt.marked.sum())
        self._scaled = int((bias.beta != 0).sum())
        with key_bias(bias):
            yield self

    def generate(self, prompt: Prompt, **options: Any) -> Any:
        """`model.generate` on the prompt, steered. Options are transformers' own; greedy unless they say otherwise."""
        options.setdefault("do_sample", False)
        with self.steer(prompt), torch.no_grad():
            return self.model.generate(**prompt.to(self.model.device).inputs, **options)

    def report(self) -> SteeringReport:
        """What the latest `steer` block did. Raises RuntimeError when nothing has been steered yet."""
        bias = self._bias
        if bias is None or not (bias.calls or bias.record and bias.record["before"]):
            raise RuntimeError("nothing has been steered yet; run the model inside `with steering.steer(prompt):`")
        shares = {}
        for name in ("before", "after"):
            if bias.record and bias.record[name]:
                shares[name] = torch.stack([bias.record[name][layer] for layer in self._modules])
        return SteeringReport(
            self.heads,
            self.config.alpha,
            self.config.mode,
            sum(bias.calls.values()),
            self._marked,
            self._scaled,
            **shares,
        )

    def last_row(self) -> Tensor:
        """Attention probabilities of the last query row in the latest recorded forward, [L, B, H, S], before steering
        its own layer (earlier layers' steering is in it). Raises RuntimeError without `record=True`."""
        if self._bias is None or not (self._bias.record and self._bias.record["probs"]):
            raise RuntimeError("nothing was recorded; use `with steering.steer(prompt, record=True):`")
        return torch.stack([self._bias.record["probs"][layer] for layer in self._modules])

    def detach(self) -> None:
        """Give the model back as it was. Safe to call twice."""
        if self._attached:
            self._attached = False
            self._hook.remove()
            restore_implementation(self.model, NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _refuse_soft_caps(model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    """The bias belongs after the cap, inside the attention function; SDPA knows no cap, and adding it is too late."""
    for module in modules.values():
        if cap := getattr(module, "attn_logit_softcapping", None):
            raise ValueError(
                f"model={type(model).__name__} soft-caps its attention scores (attn_logit_softcapping={cap:g}), which "
                "SDPA cannot do, so it cannot be steered; use a model without such a cap, for example Gemma 3"
            )


def gates_for(
    modules: dict[int, nn.Module], heads: dict[int, tuple[int, ...]], count: int, device: torch.device | str
) -> dict[nn.Module, Gate]:
    """One gate per steered layer: 1 for its steered heads, 0 for the others."""
    gates = {}
    for layer, chosen in heads.items():
        strength = torch.zeros(1, count, device=device)
        strength[0, list(chosen)] = 1.0
        gates[modules[layer]] = Gate(strength, chosen)
    return gates


def prompt_bias(prompt: Prompt, config: PastaConfig) -> KeyBias:
    """The log-bias of every prompt token and the keys that the row rule looks for (section 3.1; see `config`).

    A marked token of weight w is scaled by alpha ** (1 - w), an unmarked one by alpha; rows without marks, padding and
    protected tokens are not scaled.
    """
    valid = prompt.attention_mask.bool()
    marked = prompt.marked & valid
    free = valid & ~marked
    steerable = marked.any(-1, keepdim=True) & free.any(-1, keepdim=True)  # [B, 1]: all or nothing marked says nothing
    if config.protect == "first":
        free &= prompt.attention_mask.cumsum(-1) != 1
    elif config.protect == "special":
        free &= ~prompt.special
    if config.scope == "message":
        for b, row in enumerate(prompt.message):
            free[b] &= torch.isin(row, row[marked[b] & (row >= 0)])
    free &= steerable
    beta = torch.zeros_like(prompt.weights)
    if config.mode == "generation":
        beta[free | (marked & steerable)] = config.log_alpha
        return KeyBias(beta, torch.zeros_like(marked), {}, later_favoured=True, backend=config.backend)
    if config.mode == "target_mass":
        beta[free] = -1.0  # only its place counts: the share replaces alpha
        return KeyBias(beta, marked, {}, share=config.share, backend=config.backend)
    weighted = config.log_alpha * prompt.weights
    if config.mode == "include":
        beta[marked & steerable] = -weighted[marked & steerable]
    else:
        beta[free] = config.log_alpha
        beta[marked] = (config.log_alpha - weighted)[marked]
    return KeyBias(beta, marked, {}, backend=config.backend)

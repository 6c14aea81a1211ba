"""Give an ordinary decoder a plan: `attach`, `report`, `detach`, and `load` for a model that was saved with one.

    with masformer.attach(model, full=(8, 17, 18, 20, 21, 22, 23, 27)) as conversion:
        model.generate(**inputs)          # local layers keep only their window
        conversion.report()
        model.save_pretrained(folder)     # config.json carries the plan under "masformer"

No weight changes: the same model attends with other spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any, Self

from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core import models
from zq_lib.core.attach import attention_modules, decoder_blocks, restore_implementation, use_implementation
from zq_lib.masformer.attention import FULL, LOCAL, MASKED, NAME, PLACE, Place, Work, forget_cache, note_cache
from zq_lib.masformer.cache import SpanCache, plan_of
from zq_lib.masformer.config import MASFormerConfig
from zq_lib.masformer.spans import SpanPlan

KEY = "masformer"  # entry of the model's config


@dataclass(frozen=True)
class ConversionReport:
    """What an attached model did since it was attached (or since the last `clear`)."""

    plan: SpanPlan
    calls: dict[int, int]  # layer -> attention calls
    local_calls: int  # computed with local attention
    full_calls: int
    masked_calls: int  # local layers computed densely: steered, with dropout, or under a mask of one's own
    score_entries: float  # per head, over layers and calls
    full_entries: int  # the same if every layer were full

    @property
    def share(self) -> float:
        """Score entries relative to full attention."""
        return self.score_entries / self.full_entries


def attach(
    model: PreTrainedModel, plan: MASFormerConfig | SpanPlan | None = None, *, backend: str | None = None,
    **settings: Any,
) -> Conversion:  # fmt: skip
    """Let `model` attend by a plan until the handle's `detach`, or the end of its `with` block.

    Args: `plan`, a SpanPlan or a MASFormerConfig (its fields can also be given, or overridden, as keywords); without
    either, the plan that the model's config carries. `backend` "auto", "torch" or "triton" computes the local layers.
    `generate` then uses a `SpanCache` unless it is given a cache.

    Raises ValueError, with the model as it was, for layers or heads that do not exist, windows above the model's
    context, and models that cannot be converted: encoder-decoders, cross-attention, own sliding windows, soft-capped
    scores, attention other than SDPA.

    >>> with masformer.attach(model, full="even", count=8, window=64) as conversion:
    ...     model(**inputs)
    """
    modules = attention_modules(model)
    _refuse(model, modules)
    layers = max(modules) + 1
    if isinstance(plan, SpanPlan):
        if settings:
            raise ValueError(
                f"{next(iter(settings))!r} cannot be given beside a SpanPlan, which says all; use one of them"
            )
    elif plan is None and not settings:
        plan = plan_of(model)
    else:
        config = MASFormerConfig(**settings) if plan is None else replace(plan, **settings)
        plan, backend = config.plan(layers), backend or config.backend
    _check(model, plan, layers)
    return Conversion(model, modules, plan, backend or "auto")


def load(
    name: str | Path, *, backend: str = "auto", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Conversion]:
    """Model, tokenizer and handle of a model that was saved while attached; `options` are those of `models.load`."""
    model, tokenizer = models.load(str(name), **options)
    return model, tokenizer, attach(model, backend=backend)


class Conversion:
    """The handle that `attach` returns."""

    def __init__(
        self, model: PreTrainedModel, modules: dict[int, nn.Module], plan: SpanPlan, backend: str
    ) -> None:  # fmt: skip
        if any(hasattr(module, PLACE) for module in modules.values()):
            raise ValueError("the model follows a plan already; detach that one first")
        self.model, self.plan = model, plan
        self.work = Work()
        use_implementation(model, NAME)
        self._modules = modules
        self._had = getattr(model.config, KEY, None)
        self._attached = True
        setattr(model.config, KEY, plan.to_dict())
        for layer, module in modules.items():
            setattr(module, PLACE, Place(plan, layer, backend, self.work))
        stack, _ = decoder_blocks(model, modules)
        self._hooks = [
            stack.register_forward_pre_hook(partial(note_cache, plan), with_kwargs=True),
            stack.register_forward_hook(forget_cache, always_call=True),
        ]
        if hasattr(model, "_prepare_cache_for_generation"):
            model._prepare_cache_for_generation = MethodType(_prepare_cache, model)

    def report(self) -> ConversionReport:
        """What the model did since it was attached. Raises RuntimeError when it has not run yet."""
        calls = self.work.calls
        if not calls:
            raise RuntimeError("the model has not run since it was attached; run it, then ask for the report")
        by_layer = {layer: sum(n for (i, _), n in calls.items() if i == layer) for layer in self._modules}
        local, full, masked = (sum(n for (_, h), n in calls.items() if h == how) for how in (LOCAL, FULL, MASKED))
        return ConversionReport(
            self.plan, by_layer, local, full, masked, self.work.score_entries, self.work.full_entries
        )

    def clear(self) -> None:
        """Start the report anew."""
        self.work.calls.clear()
        self.work.score_entries, self.work.full_entries = 0.0, 0

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the model (and tokenizer) so that `load` finds the plan again: safetensors and config.json."""
        self.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def detach(self) -> None:
        """Give the model back as it was. Safe to call twice."""
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for module in self._modules.values():
            delattr(module, PLACE)
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        if self._had is None:
            delattr(self.model.config, KEY)
        else:
            setattr(self.model.config, KEY, self._had)
        restore_implementation(self.model, NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
) -> None:  # fmt: skip
    """transformers' own preparation of `generate`'s cache, then a SpanCache in place of the DynamicCache it made."""
    given = model_kwargs.get("past_key_values")
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if given is None and type(made) is DynamicCache and not made.offloading:
        cache = model_kwargs["past_key_values"] = SpanCache(model)
        if generation_config.is_assistant:
            cache.activate_past_recording()


def _refuse(model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    """What cannot be converted, with the reason."""
    name, text = type(model).__name__, model.config.get_text_config()
    if getattr(text, "add_cross_attention", False):
        raise ValueError(f"model={name} has cross-attention, whose keys have no order; use a decoder without it")
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "sliding_window", None) or kinds - {"full_attention"}:
        raise ValueError(
            f"model={name} has sliding windows of its own, and two plans would contradict each other; change its "
            "layer_types and sliding_window instead (SpanPlan.to_layer_types gives them), or use a model without"
        )
    for module in modules.values():
        if cap := getattr(module, "attn_logit_softcapping", None):
            raise ValueError(
                f"model={name} soft-caps its attention scores (attn_logit_softcapping={cap:g}), which the full layers' "
                "SDPA cannot do; use a model without such a cap"
            )


def _check(model: PreTrainedModel, plan: SpanPlan, layers: int) -> None:
    text = model.config.get_text_config()
    if len(plan.layers) != layers:
        raise ValueError(f"plan has {len(plan.layers)} layers but the model has {layers}; make one for {layers}")
    context, heads = getattr(text, "max_position_embeddings", None), text.num_attention_heads
    for layer, span in enumerate(plan.layers):
        if isinstance(span, tuple) and len(span) != heads:
            raise ValueError(f"layers[{layer}] has {len(span)} spans but the model has {heads} heads; give one each")
        largest = max((s for s in plan.spans(layer) if s is not None), default=0)
        if context and largest > context:
            raise ValueError(
                f"layers[{layer}] has a window of {largest}, above the model's context of {context} tokens; use a "
                f"smaller one, or None for full attention"
            )

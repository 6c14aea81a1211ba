"""The attention that a mixed-span model runs: local where the plan says so, transformers' own elsewhere.

A local layer hands its queries, keys and span to `local_attention`, which never builds a [T, S] score matrix. Only what
that function cannot express (a steered layer, dropout, a mask that is more than causal and padding) is computed densely
under the span's mask.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import repeat_kv

from zq_lib.core.attach import active_bias, dense_attention, register
from zq_lib.masformer.cache import Held, SpanCache
from zq_lib.masformer.local import local_attention
from zq_lib.masformer.reference import positions, visible
from zq_lib.masformer.spans import SpanPlan, entries

NAME = "zq_masformer"
PLACE = "_zq_masformer"  # attribute of an attached attention module: where it stands in the plan
LOCAL, FULL, MASKED = "local", "full", "masked"  # how a call was computed


@dataclass
class Work:
    """What the calls of an attached model did."""

    calls: dict[tuple[int, str], int] = field(default_factory=dict)  # (layer, how) -> calls
    score_entries: float = 0.0  # per head, summed over layers and calls
    full_entries: int = 0  # the same if every layer were full

    def note(self, plan: SpanPlan, layer: int, how: str, queries: int, length: int) -> None:
        """Count a call of `queries` new tokens in a text of `length`."""
        self.calls[layer, how] = self.calls.get((layer, how), 0) + 1
        spans = plan.layers[layer] if isinstance(plan.layers[layer], tuple) else (plan.layers[layer],)
        for span in spans:
            self.score_entries += _between(length - queries, length, span, plan) / len(spans)
        self.full_entries += _between(length - queries, length, None, plan)


def _between(start: int, stop: int, span: int | None, plan: SpanPlan) -> int:
    before = entries(start, span, plan.kind, plan.sinks) if start else 0
    return entries(stop, span, plan.kind, plan.sinks) - before


@dataclass(frozen=True)
class Place:
    """One layer's place in the plan, kept on its attention module."""

    plan: SpanPlan
    layer: int
    backend: str
    work: Work


_RUNNING: ContextVar[SpanCache | None] = ContextVar("zq_lib_span_cache", default=None)


def span_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function transformers calls: shapes and arguments as its AttentionInterface defines them.

    query [B, H, T, D]; key, value [B, G, S, D], rotated and cached; returns [B, T, H, D] contiguous and no weights.
    """
    place: Place | None = getattr(module, PLACE, None)
    if place is None:
        raise RuntimeError(
            f"{type(module).__name__} runs {NAME!r} but no plan is attached to it; attach to the model, or call "
            "model.set_attn_implementation('sdpa')"
        )
    plan, layer, queries = place.plan, place.layer, query.shape[2]
    span, cache = plan.layers[layer], _RUNNING.get()
    held = None if cache is None else cache.held(layer)
    length = key.shape[2] if held is None else held.length
    ordinary = {"dropout": dropout, "scaling": scaling, **kwargs}
    if span is None or (held is not None and held.exact and active_bias(module) is None and attention_mask is None):
        place.work.note(plan, layer, FULL if span is None else LOCAL, queries, length)
        return dense_attention(module)(module, query, key, value, attention_mask, **ordinary)
    padding, plain = (None, True) if attention_mask is None else padding_of(attention_mask)
    special = dropout or any(kwargs.get(name) is not None for name in ("position_bias", "s_aux"))
    if special or not plain or active_bias(module) is not None:
        place.work.note(plan, layer, MASKED, queries, length)
        key, value = (_in_text_order(x, held) for x in (key, value))
        mask = visible(queries, length, span, plan.kind, plan.sinks, padding=padding, device=query.device)
        if attention_mask is not None and not plain:
            mask = _both(mask, attention_mask)
        return _masked(module, query, key, value, mask, **ordinary), None
    place.work.note(plan, layer, LOCAL, queries, length)
    position = None
    if held is not None:
        columns = held.columns.clamp(min=0)
        real = (held.columns >= 0) if held.gaps else None
        position = columns[0] if columns.shape[0] == 1 else columns
        if padding is not None:
            columns = columns.expand(padding.shape[0], -1)
            position = positions(length, padding).gather(1, columns)  # [B, S]
            padding = padding.gather(1, columns)
        if real is not None:
            padding = real.expand(key.shape[0], -1) if padding is None else padding & real
    out = local_attention(
        query, key, value, span=span, kind=plan.kind, sinks=plan.sinks, position=position, padding=padding,
        scale=scaling, softcap=kwargs.get("softcap"), backend=place.backend,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


_SEEN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> what it says: all layers share one mask


def padding_of(mask: Tensor) -> tuple[Tensor | None, bool]:
    """Which keys are real, [B, S] bool or None for all, and whether the mask says no more than that and causality.

    `mask` is transformers' own, [B, 1, T, S] for the last T positions of S.
    """
    if mask not in _SEEN:
        _SEEN[mask] = _read(mask)
    return _SEEN[mask]


def _read(mask: Tensor) -> tuple[Tensor | None, bool]:
    queries, keys = mask.shape[-2:]
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None, False
    padding = mask[:, 0, -1].clone()  # the last query sees every real key; a clone, or the mask would live on
    key = torch.arange(keys, device=mask.device)
    causal = key <= key[keys - queries :, None]
    if queries > 1 and not torch.equal(mask[:, 0], causal & padding[:, None]):
        return None, False
    return (None if bool(padding.all()) else padding), True


def _in_text_order(x: Tensor, held: Held | None) -> Tensor:
    """Keys or values at their columns of the text, [B, G, length, D]; dropped ones are 0, and no query sees them."""
    if held is None:
        return x
    out = x.new_zeros(*x.shape[:2], held.length + 1, x.shape[3])  # the last column takes what is to be left out
    index = torch.where(held.columns < 0, held.length, held.columns).expand(x.shape[0], -1)
    return out.scatter(2, index[:, None, :, None].expand_as(x), x)[:, :, :-1]


def _both(seen: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return seen & mask
    return torch.where(seen, mask, torch.finfo(mask.dtype).min)


def _masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: object,
) -> Tensor:  # fmt: skip
    """Dense attention under a mask, [B, T, H, D]; an active bias is applied where it applies to dense layers."""
    if active_bias(module) is not None:
        if mask.shape[1] != 1:
            raise ValueError("a layer with one span per head cannot be steered; give the layer a single span")
        mask = mask.expand(query.shape[0], -1, -1, -1)
        return dense_attention(module)(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]  # fmt: skip
    group = query.shape[1] // key.shape[1]
    if kwargs.get("position_bias") is not None:
        mask = torch.where(mask, kwargs["position_bias"], torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(
        query, repeat_kv(key, group), repeat_kv(value, group), attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2).contiguous()


def note_cache(plan: SpanPlan, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the module that runs the stack: tells the attention which cache holds the keys."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"past_key_values={type(cache).__name__} allocates its keys in advance, which local layers cannot read; "
            "use SpanCache (the default of generate) or DynamicCache"
        )
    if not isinstance(cache, SpanCache):
        _RUNNING.set(None)
        return
    if cache.plan != plan:
        raise ValueError("past_key_values was made for another plan; use SpanCache(model) of the model that runs")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        cache.set_padding(mask)
    _RUNNING.set(cache)


def forget_cache(module: nn.Module, args: tuple, output: object) -> None:
    """Forward hook that undoes `note_cache`."""
    _RUNNING.set(None)


register(NAME, span_attention_forward, rank=2)

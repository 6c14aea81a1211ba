"""What methods that change a model share: finding its attention layers, swapping how they attend, biasing keys.

A `KeyBias` is plain data on a context variable, so that two threads (or two users of one demo) never see each other's
emphasis, and so that any attention implementation of this library can honour it whatever else it does to the keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BIAS_AWARE: dict[str, int] = {}  # attention implementations that apply the active KeyBias -> rank, see `register`


@dataclass(frozen=True)
class Gate:
    """How strongly each head of one layer takes the bias."""

    strength: Tensor  # [B or 1, H] float32
    heads: tuple[int, ...]  # those that may be non-zero; the others keep the stock attention


@dataclass(eq=False)
class KeyBias:
    """The rank-one score bias strength[b, h] * rows[b, i] * beta[b, j] of a prompt of P tokens.

    A query row is biased only if it sees at least one favoured key (the row rule): then a causal prefix, and a late row
    whose sliding window has left the marks behind, are exactly what they were.
    """

    beta: Tensor  # [B, P] float32, natural log
    favoured: Tensor  # [B, P] bool
    gates: Mapping[nn.Module, Gate]  # attention module -> gate
    later_favoured: bool = False  # whether keys after the prompt count as favoured
    backend: str = "auto"
    share: float | None = None  # when set, favoured keys get this share of every row instead of a fixed bias
    past: int = 0  # keys cached before the running forward; kept by `track_past`
    layers: Mapping[nn.Module, int] = field(default_factory=dict)  # every attention module -> layer, for recording
    record: dict[str, dict[int, Tensor]] | None = None  # filled with the last row's shares when not None
    calls: dict[int, int] = field(default_factory=dict)  # layer -> how often it was biased

    def keys(self, rows: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """`beta` and `favoured` for the `keys` keys of a layer, [rows, keys] each.

        A cache that forgets (sliding window) holds the last `keys` positions; later positions are not biased; beams and
        several return sequences repeat each prompt row `rows / B` times.
        """
        start = max(0, self.past + queries - keys)
        beta, favoured = self.beta[:, start : start + keys], self.favoured[:, start : start + keys]
        missing = keys - beta.shape[1]
        if missing > 0:
            beta = torch.nn.functional.pad(beta, (0, missing))
            favoured = torch.nn.functional.pad(favoured, (0, missing), value=self.later_favoured)
        copies, rest = divmod(rows, beta.shape[0])
        if rest:
            raise ValueError(
                f"the model runs {rows} rows but the emphasis has {beta.shape[0]}; "
                f"steer with a prompt of as many rows as the batch"
            )
        if copies > 1:
            beta, favoured = beta.repeat_interleave(copies, 0), favoured.repeat_interleave(copies, 0)
        return beta, favoured


def rows_that_see(favoured: Tensor, queries: int, mask: Tensor | None, causal: bool) -> Tensor:
    """The row rule: which queries see a favoured key, [B, T] bool. `favoured` [B, S]; `mask` is transformers' own."""
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return (visible[:, :1] & favoured[:, None, None, :]).any(-1)[:, 0]  # [B, T]
    if causal and queries > 1:
        return favoured.cumsum(-1)[:, favoured.shape[1] - queries :] > 0
    return favoured.any(-1, keepdim=True).expand(-1, queries)


_ACTIVE: ContextVar[tuple[KeyBias, ...]] = ContextVar("zq_lib_key_bias", default=())


@contextlib.contextmanager
def key_bias(bias: KeyBias) -> Iterator[KeyBias]:
    """Make `bias` the active one for its modules, in this thread or task only. Inner contexts win over outer ones."""
    _ACTIVE.set((bias, *_ACTIVE.get()))
    try:
        yield bias
    finally:  # by identity, not by token: generators may close in another order, or in another context
        _ACTIVE.set(tuple(b for b in _ACTIVE.get() if b is not bias))


def active_bias(module: nn.Module) -> KeyBias | None:
    """The innermost active bias that concerns this attention module (to bias it, or only to record it)."""
    for bias in _ACTIVE.get():
        if module in bias.layers:
            return bias
    return None


def track_past(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the module that runs the stack: notes how many keys are cached, for caches that forget."""
    cache = kwargs.get("past_key_values")
    for bias in _ACTIVE.get():
        bias.past = 0 if cache is None else int(cache.get_seq_length())


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> self-attention module of a decoder. Raises ValueError when the model has none."""
    found = {
        m.layer_idx: m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and getattr(m, "is_causal", False)
        and not getattr(m, "is_cross_attention", False)
    }
    if not found or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model={type(model).__name__} has no causal attention layers of transformers' attention interface; "
            "use a decoder such as Llama, Qwen2, GPT-2, OPT, GPT-NeoX or Gemma"
        )
    return dict(sorted(found.items()))


def decoder_blocks(model: nn.Module, modules: Mapping[int, nn.Module]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The module that runs the stack of layers, and layer -> the block around its attention."""
    names = {m: name for name, m in model.named_modules()}
    blocks, parent = {}, ""
    for layer, module in modules.items():
        name = names[module]
        while not isinstance(model.get_submodule(parent := name.rpartition(".")[0]), nn.ModuleList):
            name = parent
        blocks[layer] = model.get_submodule(name)
    return model.get_submodule(parent.rpartition(".")[0]), blocks


def register(name: str, function: Callable, *, rank: int = 0) -> None:
    """Register an attention implementation with transformers. The mask function goes with it: without one,
    transformers builds no mask and ignores padding in silence.

    Of several in use on one model the highest rank runs. Rank 0 computes with dense keys and values; a higher one reads
    some cache of its own and leaves ordinary tensors to `dense_attention`.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    BIAS_AWARE[name] = rank


def dense_attention(module: nn.Module) -> Callable:
    """The attention function for ordinary keys and values in this module: transformers' SDPA, or, where a bias is
    active, the registered implementation that applies it."""
    if active_bias(module) is None:
        return sdpa_attention_forward
    return AttentionInterface()[next(name for name, rank in BIAS_AWARE.items() if rank == 0)]


_SWAPPED: WeakKeyDictionary[nn.Module, tuple[str, list[str]]] = WeakKeyDictionary()  # model -> (original, in use)


def use_implementation(model: PreTrainedModel, name: str) -> None:
    """Switch `model` to a bias-aware implementation; `restore_implementation` undoes one use.

    Raises ValueError, leaving the model as it was, when its current implementation cannot be replaced faithfully.
    """
    current = model.config._attn_implementation
    if model in _SWAPPED and current in BIAS_AWARE:
        original, names = _SWAPPED[model]
    else:  # a copy of an attached model is not in the table, and its original is not known
        original, names = ("sdpa" if BIAS_AWARE.get(current) == 0 else current), []
    if original != "sdpa" and original not in BIAS_AWARE:
        raise ValueError(
            f"attention implementation {current!r} cannot be replaced; call model.set_attn_implementation('sdpa') first"
        )
    wanted = max([name, *names, *([original] if original in BIAS_AWARE else [])], key=BIAS_AWARE.__getitem__)
    model.set_attn_implementation(wanted)
    if model.config._attn_implementation != wanted:
        raise ValueError(
            f"model={type(model).__name__} does not let its attention implementation be changed at run time; "
            "define its class in a module and route its attention through transformers' AttentionInterface"
        )
    _SWAPPED[model] = (original, [*names, name])


def restore_implementation(model: PreTrainedModel, name: str) -> None:
    """Undo one `use_implementation`; the last one puts the original implementation back."""
    original, names = _SWAPPED.pop(model)
    names.remove(name)
    if names:
        _SWAPPED[model] = (original, names)
    if model.config._attn_implementation in BIAS_AWARE:  # else the user has chosen another since
        model.set_attn_implementation(max(names, key=BIAS_AWARE.__getitem__) if names else original)

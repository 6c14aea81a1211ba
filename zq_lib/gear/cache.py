"""`GearCache`, a transformers cache whose full-attention layers store tokens compressed (section 3, algorithm 1).

New tokens are exact until the buffer is full; then they become one segment, and are never compressed again. The prompt
itself attends to exact keys and values: what is compressed is what is retained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from zq_lib.gear.config import PRESETS, GearConfig
from zq_lib.gear.packed import Block, check_width, compress
from zq_lib.gear.view import NAME, View

Gear = GearConfig | str | Sequence[GearConfig]


class GearLayer(CacheLayerMixin):
    """One layer's cache. `config` is how it compresses; `model_config` tells which attention reads it."""

    is_sliding = False

    def __init__(self, config: GearConfig, model_config: PretrainedConfig) -> None:
        super().__init__()
        self.config, self.model_config = config, model_config
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.exact_keys: Tensor | None = None  # [B, G, E, D]: sinks, then the buffer
        self.exact_values: Tensor | None = None
        self.sinks = 0  # how many of the exact tokens are sinks; set when the first segment is made
        self.columns: Tensor | None = None  # see View
        self.valid: Tensor | None = None  # [B, P] bool, False for padding; columns from P on are text

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values, [B, G, T, D] (T may be 0)."""
        check_width(self.config.keys, key_states.shape[-1])
        check_width(self.config.values, value_states.shape[-1])
        if self.valid is not None:
            copies, rest = divmod(key_states.shape[0], self.valid.shape[0])
            if rest:
                raise ValueError(
                    f"attention_mask has {self.valid.shape[0]} rows but the model runs {key_states.shape[0]}; give the "
                    "mask of this batch to set_padding()"
                )
            self.valid = self.valid.repeat_interleave(copies, 0)  # beams and several sequences per prompt
        self.dtype, self.device = key_states.dtype, key_states.device
        self.exact_keys, self.exact_values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append `key_states`, `value_states` [B, G, T, D]; return those of all tokens so far.

        They are restored tensors, or, when the packed attention runs, stand-ins that carry the view. Tokens that are
        compressed by this call are still exact in what it returns. Raises ValueError for NaN, infinities and tensors
        that cannot belong to the same cache; the layer is then as it was.
        """
        if fresh := not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        keys = torch.cat([self.exact_keys, key_states], 2)
        values = torch.cat([self.exact_values, value_states], 2)
        view = View(self.blocks, keys, values, self.sinks, self.columns, self.config.backend)
        try:
            self._keep(keys, values)
        except ValueError:
            self.is_initialized = not fresh  # so that the same cache can take another dtype or batch
            raise
        if view.blocks and self.model_config._attn_implementation == NAME:
            return view.handles()
        return view.dense()

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, new, old in (("keys", keys, self.exact_keys), ("values", values, self.exact_values)):
            expected = (old.shape[0], old.shape[1], keys.shape[2], old.shape[3])
            if tuple(new.shape) != expected or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} of shape {tuple(new.shape)} and {new.dtype} do not fit this cache, which holds "
                    f"{tuple(expected)} and {old.dtype}; use one cache per model and batch, or call reset() first"
                )

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Store the exact tokens, of which the oldest whole buffers become one segment. All of it or nothing."""
        config = self.config
        sinks = self.sinks if self.blocks else config.sinks
        # a rejected guess is cropped later, so while recording the newest buffer stays exact
        recent = max(config.recent, config.buffer) if self.record_past else config.recent
        n = max(0, keys.shape[2] - sinks - recent) // config.buffer * config.buffer
        if n == 0 or not (self.blocks or self._every_row_has(sinks, keys.shape[2])):
            self.exact_keys, self.exact_values = keys, values
            return
        columns = self.columns
        if not self.blocks and (columns := self._sinks_first(sinks, keys.shape[2])) is not None:
            moved = columns.shape[1]
            index = columns[:, None, :, None]
            keys, values = (
                torch.cat([x[:, :, :moved].gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), x[:, :, moved:]], 2)
                for x in (keys, values)
            )
        start = sinks + sum(block.length for block in self.blocks)  # stored column of the segment's first token
        prompt, valid = n >= config.long_segment(), self._valid(start, n, columns)
        new = Block(
            *(
                compress(x[:, :, sinks : sinks + n], codec, prompt=prompt, valid=valid, seed=start)
                for x, codec in ((keys, config.keys), (values, config.values))
            ),
            length=n,
        ).cut(config.buffer)
        joined = self.blocks[-1].join(new) if self.blocks else None
        self.blocks = (*self.blocks, new) if joined is None else (*self.blocks[:-1], joined)
        self.exact_keys, self.exact_values = (
            torch.cat([x[:, :, :sinks], x[:, :, sinks + n :]], 2) for x in (keys, values)
        )
        self.sinks, self.columns = sinks, columns

    def _every_row_has(self, sinks: int, length: int) -> bool:
        """Whether the sinks of every row are here; the first chunk of a padded prompt may be all padding."""
        return self.valid is None or bool((length - (~self.valid[:, :length]).sum(-1) >= sinks).all())

    def _sinks_first(self, sinks: int, length: int) -> Tensor | None:
        """The stored order of the first columns that puts each row's first real tokens first, or None if it is that."""
        if self.valid is None or sinks == 0:
            return None
        valid = torch.nn.functional.pad(self.valid, (0, max(0, length - self.valid.shape[1])), value=True)[:, :length]
        first = valid & (valid.cumsum(-1) <= sinks)
        columns = (~first).to(torch.uint8).argsort(dim=-1, stable=True)
        moved = (columns != torch.arange(length, device=columns.device)).any(0)
        last = int(moved.nonzero().max()) + 1 if moved.any() else 0
        return columns[:, :last].clone() if last else None

    def _valid(self, start: int, n: int, columns: Tensor | None) -> Tensor | None:
        """Which of the n stored columns from `start` are text, [B, n] bool; None if all are."""
        if self.valid is None:
            return None
        end = start + n
        width = end if columns is None else max(end, columns.shape[1])  # padding may reach beyond this segment
        valid = torch.nn.functional.pad(self.valid, (0, max(0, width - self.valid.shape[1])), value=True)[:, :width]
        if columns is not None:
            valid = torch.cat([valid.gather(1, columns), valid[:, columns.shape[1] :]], 1)
        valid = valid[:, start:end]
        return None if valid.all() else valid

    def set_padding(self, attention_mask: Tensor) -> None:
        """`attention_mask` [B, P], 0 for padding. Only columns that are not compressed yet are affected."""
        mask = attention_mask.bool()
        if self.is_initialized and mask.shape[0] != self.exact_keys.shape[0]:
            raise ValueError(
                f"attention_mask has {mask.shape[0]} rows but the cache holds {self.exact_keys.shape[0]}; give the "
                "mask of this batch, or call reset() first"
            )
        self.valid = None if mask.all() else mask.clone()

    def view(self) -> View:
        """The layer as it is now. Raises ValueError when it is empty."""
        if not self.is_initialized:
            raise ValueError("the cache is empty; run the model with it first")
        return View(
            self.blocks, self.exact_keys, self.exact_values, self.sinks, self.columns, self.config.backend
        )  # fmt: skip

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [B, G, S, D] each, in the order of the text."""
        return self.view().dense()

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.view().length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for a call with `query_length` queries."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Keep the newest buffer exact from now on, because `crop` may take some of it back (assisted generation)."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        """Whether a small `crop` leaves no trace: it does not once the newest tokens may have been compressed."""
        return self.record_past or not self.blocks

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a number of at most 0).

        A segment that is cut stays stored and its last tokens are hidden: nothing is compressed twice.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} is positive; give how many to remove as a negative number"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        if self.columns is not None and left < self.columns.shape[1]:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} would cut the prompt's padding, up to column "
                f"{self.columns.shape[1]}; reset() the cache and run the shorter prompt instead"
            )
        blocks, packed = [], max(0, left - self.sinks)  # compressed columns that may stay
        for block in self.blocks:
            if packed > 0:
                blocks.append(block.crop(min(block.length, packed)))
                packed -= blocks[-1].length
        exact = left - sum(block.length for block in blocks)
        self.blocks = tuple(blocks)
        self.exact_keys, self.exact_values = (x[:, :, :exact].clone() for x in (self.exact_keys, self.exact_values))
        if not blocks:
            self.sinks = 0

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply to every stored tensor; all have the batch first."""
        if not self.is_initialized:
            return
        self.blocks = tuple(block.map(change) for block in self.blocks)
        self.exact_keys, self.exact_values = change(self.exact_keys), change(self.exact_values)
        self.columns = None if self.columns is None else change(self.columns)
        self.valid = None if self.valid is None else change(self.valid)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search, without loss."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._change(lambda x: x[indices.to(x.device), ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the model's device."""
        if self.is_initialized:
            self._change(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._clear()

    def nbytes(self) -> dict[str, int]:
        """Bytes of every stored tensor, by component."""
        found = {"codes": 0, "metadata": 0, "low rank": 0, "outliers": 0, "exact": 0, "positions": 0}
        for block in self.blocks:
            for side in (block.keys, block.values):
                for part, size in side.nbytes().items():
                    found[part] += size
        if self.is_initialized:
            found["exact"] = self.exact_keys.nbytes + self.exact_values.nbytes
        found["positions"] = sum(x.nbytes for x in (self.columns, self.valid) if x is not None)
        return found


class GearCache(Cache):
    """Drop-in `past_key_values` for any decoder of transformers.

    >>> cache = GearCache(model.config, "paper_2bit")
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.nbytes(), cache.report()

    Args: `config` of the model; `gear` a GearConfig, the name of a preset, or one GearConfig per layer (a plan); the
    rest as in `Cache`. Only full-attention layers are compressed; sliding-window and other layers keep transformers'
    own. Raises ValueError for an unknown preset, a wrong number of layers and heads that do not fit the settings.
    """

    def __init__(
        self, config: PretrainedConfig, gear: Gear = "paper_2bit", *, offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:  # fmt: skip
        text = config.get_text_config(decoder=True)
        if offloading and not torch.cuda.is_available():
            raise ValueError("offloading=True needs a GPU to offload from; leave it out on a machine without one")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"config={type(config).__name__} is an encoder-decoder; GearCache is for decoders")
        kinds, settings = get_layer_types_and_kwargs(text)
        self.gear = gear_per_layer(gear, len(kinds))
        self.model_config = text
        layers = [
            GearLayer(chosen, text) if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            for kind, kwargs, chosen in zip(kinds, settings, self.gear, strict=True)
        ]
        if not any(isinstance(layer, GearLayer) for layer in layers):
            raise ValueError(
                f"config={type(config).__name__} has no full-attention layer to compress; use DynamicCache"
            )
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy of the tokens that belongs to the same model: it follows that model's attention, not a copy of it."""
        memo[id(self.model_config)] = self.model_config
        found = memo[id(self)] = object.__new__(type(self))
        found.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return found

    def gear_layers(self) -> dict[int, GearLayer]:
        """The layers that compress, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, GearLayer)}

    def set_padding(self, attention_mask: Tensor) -> None:
        """Tell which columns of the prompt are padding, [B, P] with 0 for padding, before the model runs.

        They then take no part in ranges and outliers, and each row's sinks are its first real tokens. The packed
        attention does this by itself.
        """
        for layer in self.gear_layers().values():
            layer.set_padding(attention_mask)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Restored keys and values, layer by layer."""
        for layer in self.layers:
            yield layer.dequantize() if isinstance(layer, GearLayer) else (layer.keys, layer.values)

    def save(self, path: str | Path) -> None:
        """Write the compressed prefix to one safetensors file; see `storage.save`."""
        from zq_lib.gear.storage import save

        save(self, path)

    @staticmethod
    def load(path: str | Path, config: PretrainedConfig, device: str | torch.device = "cpu") -> GearCache:
        """The cache that `save` wrote, for the model of this config; see `storage.load`."""
        from zq_lib.gear.storage import load

        return load(path, config, device)

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        return sum(self.nbytes_by_component().values())

    def nbytes_by_component(self) -> dict[str, int]:
        """The same by component; "other layers" are those that transformers keeps dense."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if isinstance(layer, GearLayer):
                parts = layer.nbytes()
            else:
                parts = {"other layers": sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor))}
            for part, size in parts.items():
                found[part] = found.get(part, 0) + size
        return found

    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in 16 bits, whatever the model computes in."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, GearLayer) and layer.is_initialized:
                keys, values, length = layer.exact_keys, layer.exact_values, layer.get_seq_length()
                total += 2 * length * keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
            elif not isinstance(layer, GearLayer):
                total += sum(2 * x.numel() for x in vars(layer).values() if isinstance(x, Tensor))
        return total

    def report(self) -> dict[str, float | int]:
        """Tokens, bytes, ratio against 16 bits, and bits per cached element. Raises ValueError when empty."""
        dense, size = self.dense_nbytes(), self.nbytes()
        if not dense:
            raise ValueError("the cache is empty; run the model with it first")
        return {
            "tokens": self.get_seq_length(),
            "bytes": size,
            "ratio": dense / size,
            "bits_per_element": 16 * size / dense,
            **self.nbytes_by_component(),
        }


def gear_per_layer(gear: Gear, layers: int) -> list[GearConfig]:
    """One GearConfig per layer from any form that `GearCache` takes."""
    if isinstance(gear, str):
        if gear not in PRESETS:
            raise ValueError(f"gear={gear!r} is not a preset; choose one of {', '.join(PRESETS)}, or give a GearConfig")
        gear = PRESETS[gear]()
    if isinstance(gear, GearConfig):
        return [gear] * layers
    chosen = list(gear)
    if len(chosen) != layers or not all(isinstance(c, GearConfig) for c in chosen):
        raise ValueError(f"gear has {len(chosen)} entries but the model has {layers} layers; give one GearConfig each")
    return chosen

"""Hidden states and logits of a frozen model, computed once and kept by example, in memory or on disk.

Rows are kept without their padding and put where the batch's mask has tokens, so that other batches, lengths and
padding sides give the same states.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zq_lib.ted.layers import EXAMPLE, Batch, Seen, mask_of, see

FACTS = "states.json"
LABELS = ("labels", "start_positions", "end_positions")
Place = tuple[int, int, int, int, int]  # shard, row in it, first token, token after the last, fingerprint of the text


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients in a `with` block; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class StateCache:
    """States of some layers of a model, and its logits, by example.

    Every batch needs the examples' numbers under the key "example", [B] whole numbers, so that an example is known in
    whatever batch it comes. `dtype` torch.bfloat16 halves the room. With a `folder` everything is on disk, and read
    from there as it is needed; `StateCache.open` finds it again.

    >>> cache = StateCache.of(teacher, batches, layers=(2, 4, 6))
    >>> cache.seen(batch).states
    """

    def __init__(
        self, layers: Sequence[int], folder: str | Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.layers, self.dtype = tuple(layers), dtype
        self.folder = None if folder is None else Path(folder)
        self.per_token: bool | None = None  # whether there are logits for every token; None without any
        self._shards: list[dict[str, Any]] = []  # of a batch: "states" [K, tokens, d] and "logits" [rows or tokens, V]
        self._places: dict[int, Place] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Batch],
        layers: Sequence[int],
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        logits: bool = True,
    ) -> Self:
        """Run the model, in eval mode, over batches and keep what it shows; its logits too unless told otherwise."""
        cache = cls(layers, folder, dtype)
        for batch in batches:
            cache.add(batch, look(model, batch, layers, logits=logits))
        if cache.folder is not None:
            cache._write_facts()
        return cache

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """A cache that was written to a folder. Raises FileNotFoundError for a folder without one."""
        folder = Path(folder)
        if not (folder / FACTS).exists():
            raise FileNotFoundError(
                f"{folder.name!r} holds no states; it needs {FACTS}, which StateCache.of writes last"
            )
        facts = json.loads((folder / FACTS).read_text())
        cache = cls(facts["layers"], folder)
        cache.per_token = facts["per_token"]
        cache._places = {int(example): tuple(place) for example, place in facts["places"].items()}
        cache._shards = [_opened(folder, shard) for shard in range(facts["shards"])]
        return cache

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, example: int) -> bool:
        return example in self._places

    @torch.no_grad()
    def add(self, batch: Batch, seen: Seen) -> None:
        """Keep what the model showed of a batch; an example that is known already is replaced."""
        mask = mask_of(batch, seen.states[0].shape[:2])
        parts = {"states": torch.stack([h[mask] for h in seen.states])}  # [K, tokens, d]
        if seen.logits is not None:
            self.per_token = seen.logits.dim() == 3
            parts["logits"] = seen.logits[mask] if self.per_token else seen.logits
        parts = {name: t.detach().to("cpu", self.dtype or t.dtype).contiguous() for name, t in parts.items()}
        shard, stops = len(self._shards), mask.sum(1).cumsum(0).tolist()
        prints = _fingerprints(batch, mask)
        for row, example in enumerate(_examples(batch)):
            start = stops[row - 1] if row else 0
            self._places[example] = (shard, row, start, stops[row], prints[row])
        if self.folder is None:
            self._shards.append(parts)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(parts, self.folder / _name(shard))
            self._shards.append(_opened(self.folder, shard))

    def seen(self, batch: Batch) -> Seen:
        """What the model showed of the batch's examples, where the batch has their tokens; zero on padding.

        Raises ValueError for an example that was not kept, or was kept with another text.
        """
        examples = _examples(batch)
        if missing := [e for e in examples if e not in self._places]:
            raise ValueError(f"example {missing[0]} is not among the {len(self)} kept; run StateCache.of over all data")
        mask = mask_of(batch, _shape(batch))
        places = [self._places[e] for e in examples]
        counts, prints = mask.sum(1).tolist(), _fingerprints(batch, mask)
        for example, place, count, own in zip(examples, places, counts, prints, strict=True):
            if (count, own) != (place[3] - place[2], place[4]):
                raise ValueError(
                    f"example {example} was kept with {place[3] - place[2]} tokens and now has {count}, or others; run "
                    "StateCache.of anew when texts, truncation or augmentation change"
                )
        rows = torch.cat([self._shards[p[0]]["states"][:, p[2] : p[3]] for p in places], 1).to(mask.device)
        states = rows.new_zeros(len(rows), *mask.shape, rows.shape[-1])  # [K, B, S, d]
        states[:, mask] = rows
        return Seen(tuple(states), self._logits(places, mask))

    def _logits(self, places: Sequence[Place], mask: Tensor) -> Tensor | None:
        if self.per_token is None:
            return None
        spans = [(p[0], p[2], p[3]) if self.per_token else (p[0], p[1], p[1] + 1) for p in places]
        rows = torch.cat([self._shards[s]["logits"][a:b] for s, a, b in spans]).to(mask.device)
        if not self.per_token:
            return rows
        logits = rows.new_zeros(*mask.shape, rows.shape[-1])
        logits[mask] = rows
        return logits

    def _write_facts(self) -> None:
        facts = {
            "layers": self.layers, "shards": len(self._shards), "per_token": self.per_token, "places": self._places
        }  # fmt: skip
        (self.folder / FACTS).write_text(json.dumps(facts))


def look(
    model: nn.Module, batch: Batch, layers: Sequence[int], cache: StateCache | None = None, logits: bool = False
) -> Seen:
    """What a frozen model shows of a batch: from the cache if there is one, else it is run in eval mode.

    Without `logits` only the body of a transformers model runs; its loss is never computed. Raises ValueError for a
    cache of other layers.
    """
    if cache is None:
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        with still(model):
            return see(model if logits else getattr(model, "base_model", model), inputs, layers)
    if cache.layers != tuple(layers):
        raise ValueError(
            f"the cache holds layers {cache.layers} and the filters stand behind {tuple(layers)}; make another"
        )
    return cache.seen(batch)


def _opened(folder: Path, shard: int) -> dict[str, Any]:
    """Tensors of a file that are read when they are sliced."""
    with safe_open(folder / _name(shard), "pt") as file:
        return {name: file.get_slice(name) for name in file.keys()}


def _name(shard: int) -> str:
    return f"states-{shard:05}.safetensors"


def _shape(batch: Batch) -> tuple[int, int]:
    """[B, S] of a batch: of its mask, or else of what the model reads."""
    for key in ("attention_mask", "input_ids", "inputs_embeds"):
        if key in batch:
            return tuple(batch[key].shape[:2])
    raise ValueError(f"the batch has keys {sorted(batch)}; a cache needs attention_mask, input_ids or inputs_embeds")


def _examples(batch: Batch) -> list[int]:
    if EXAMPLE not in batch:
        raise ValueError(f"the batch has no {EXAMPLE!r}; add the examples' numbers [B], by which states are kept")
    return batch[EXAMPLE].tolist()


def _fingerprints(batch: Batch, mask: Tensor) -> list[int]:
    """A number for the text of each row, whatever its padding; 0 for a batch without input_ids."""
    if "input_ids" not in batch:
        return [0] * len(mask)
    position = mask.long().cumsum(1) * mask
    return ((batch["input_ids"] + 1) * position * 2654435761 % 2**31 * mask).sum(1).tolist()

"""Head profiles: which heads to steer, how that was found, and for which model. Saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zq_lib.pasta.config import head_map

_FORMAT = "zq_lib head profile 1"
_PROBES = 16  # weights that identify a checkpoint


@dataclass(frozen=True)
class Fingerprint:
    """What a profile belongs to: the architecture and a few embedding weights, which survive a change of dtype."""

    model_type: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    probe: tuple[float, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Fingerprint:
        config = model.config.get_text_config()
        weight = model.get_input_embeddings().weight.detach()
        step = max(1, weight.numel() // _PROBES)
        probe = weight.flatten()[:: step + 1][:_PROBES].float().cpu()
        return cls(
            config.model_type, config.num_hidden_layers, config.num_attention_heads, config.hidden_size,
            config.vocab_size, tuple(float(f"{x:.4g}") for x in probe),
        )  # fmt: skip

    def matches(self, other: Fingerprint) -> bool:
        """Same architecture and, where both have one, the same probe up to bfloat16 rounding."""
        mine, theirs = asdict(self), asdict(other)
        a, b = mine.pop("probe"), theirs.pop("probe")
        near = (
            not a
            or not b
            or (len(a) == len(b) and torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0.02, atol=1e-3))
        )
        return mine == theirs and near


@dataclass(frozen=True)
class HeadProfile:
    """A set of heads {layer: [heads]} with its provenance.

    `scores` [L, H] is the mean gain of steering one head alone (empty for files of the official format), `alpha`,
    `method`, `task`, `items` and `seed` say how it was measured.
    """

    heads: dict[int, list[int]]
    task: str = ""
    method: str = ""
    alpha: float = 0.01
    items: int = 0
    seed: int = 0
    model: str = ""
    fingerprint: Fingerprint | None = None
    scores: list[list[float]] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The heads as (layer, head) pairs, by layer."""
        return [(layer, h) for layer, hs in sorted(self.heads.items()) for h in sorted(hs)]

    def __len__(self) -> int:
        return len(self.pairs)

    def ranked(self) -> list[tuple[int, int]]:
        """All heads from best to worst by `scores`; ties by (layer, head). Raises ValueError without scores."""
        if not self.scores:
            raise ValueError(f"profile {self.task or 'without a task'!r} has no scores; only its head set is known")
        cells = [(-s, layer, h) for layer, row in enumerate(self.scores) for h, s in enumerate(row)]
        return [(layer, h) for _, layer, h in sorted(cells)]

    def top(self, k: int) -> HeadProfile:
        """The same profile with its k best heads."""
        ranked = self.ranked()
        if not 1 <= k <= len(ranked):
            raise ValueError(f"k={k} heads cannot be taken from {len(ranked)}; choose 1 to {len(ranked)}")
        return HeadProfile(**{**_shallow(self), "heads": as_map(ranked[:k])})

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError when the profile was made for another model or names heads that this one lacks."""
        if self.fingerprint is not None and not self.fingerprint.matches(here := Fingerprint.of(model)):
            raise ValueError(
                f"profile {self.task!r} was made for {self.model or self.fingerprint.model_type} "
                f"({self.fingerprint.layers} layers x {self.fingerprint.heads} heads), not for this {here.model_type} "
                f"({here.layers} x {here.heads}); profile this model with pasta.profile_heads, or give heads="
            )
        config = model.config.get_text_config()
        head_map(self.heads, config.num_hidden_layers, config.num_attention_heads)

    def save(self, path: str | Path) -> None:
        """Write JSON with one line per layer of scores."""
        data = {"format": _FORMAT, **asdict(self), "heads": {str(k): sorted(v) for k, v in sorted(self.heads.items())}}
        data["scores"] = [[float(f"{s:.5g}") for s in row] for row in self.scores]
        text = json.dumps(data, indent=1)
        Path(path).write_text(_join_number_lists(text) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read a profile of ours, or a bare {"layer": [heads]} file as the paper's authors publish them.

        Raises ValueError for anything else, naming the file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"path={str(path)!r} is not JSON ({error}); give a head profile") from error
        return cls.from_data(data, str(path))

    @classmethod
    def from_data(cls, data: Any, name: str = "data") -> HeadProfile:
        """The parsed form of `load`."""
        try:
            if not data:
                raise ValueError("it names no heads")
            if data.get("format") != _FORMAT:
                return cls({int(k): [int(h) for h in v] for k, v in data.items()})
            kept = {k: v for k, v in data.items() if k != "format"}
            kept["heads"] = {int(k): list(v) for k, v in kept["heads"].items()}
            if kept["fingerprint"]:
                probe = tuple(kept["fingerprint"]["probe"])
                kept["fingerprint"] = Fingerprint(**{**kept["fingerprint"], "probe": probe})
            return cls(**kept)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f'{name!r} is not a head profile; give {{"layer": [heads], ...}} or a file that HeadProfile.save wrote'
            ) from error


def as_map(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """(layer, head) pairs as {layer: [heads]}."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(pairs):
        found.setdefault(layer, []).append(head)
    return found


def intersection(profiles: Sequence[HeadProfile], k: int) -> HeadProfile:
    """The paper's multi-task set: heads in the top k of every task (Algorithm 1).

    Leave a task's own profile out and the set is task-agnostic for it (section 3.2): found on the other tasks only.
    """
    return _combine(profiles, k, set.intersection, "intersection")


def union(profiles: Sequence[HeadProfile], k: int) -> HeadProfile:
    """Heads in the top k of any task."""
    return _combine(profiles, k, set.union, "union")


def _combine(profiles: Sequence[HeadProfile], k: int, how: Any, name: str) -> HeadProfile:
    if not profiles:
        raise ValueError(f"profiles=[] leaves nothing for the {name}; give at least one")
    chosen = how(*(set(p.top(k).pairs) for p in profiles))
    if not chosen:
        raise ValueError(f"k={k}: no head is in every task's top {k}; raise k or take the union")
    first = profiles[0]
    task = f"{name} of top {k}: " + ", ".join(p.task for p in profiles)
    return HeadProfile(**{**_shallow(first), "heads": as_map(chosen), "task": task, "scores": []})


def _shallow(profile: HeadProfile) -> dict[str, Any]:
    return {name: getattr(profile, name) for name in profile.__dataclass_fields__}


def _join_number_lists(text: str) -> str:
    """Put the innermost lists of numbers on one line each."""
    import re

    return re.sub(r"\[\s+(-?[\d.][^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)


@cache
def shipped_profile(task: str = "conflict") -> HeadProfile:
    """The profile of the embedded SmolLM2-135M-Instruct, made by `python -m zq_lib.pasta.make_profile`.

    `task` is "conflict" or "pick". Raises ValueError for another.
    """
    source = files("zq_lib.pasta") / "data" / f"profile_{task}.json"
    if not source.is_file():
        raise ValueError(f"task={task!r} has no shipped profile; choose 'conflict' or 'pick'")
    return HeadProfile.from_data(json.loads(source.read_text(encoding="utf-8")), source.name)

"""PASTA's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

MODES = ("exclude", "include", "generation", "target_mass")
PROTECT = ("none", "first", "special")
SCOPES = ("all", "message")
FLOOR = 1e-8  # alpha below this is hard masking; log(FLOOR) keeps the bias finite

Heads = Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] | str


@dataclass(frozen=True)
class PastaConfig:
    """How to steer.

    alpha        scale of the tokens that are not marked, 0 < alpha <= 1 (paper: 0.01); 1 changes nothing.
    heads        which heads: {layer: [heads]}, [(layer, head), ...], "all", or "profile" for the profile shipped with
                 the embedded model. A `HeadProfile` has `.heads` in the first form.
    mode         "exclude" scales the unmarked prompt down (the paper's form); "include" scales the marked tokens up by
                 1 / alpha, so generated tokens lose against the marked ones but not against the rest; "generation"
                 scales the whole prompt down against what was generated (a negative control); "target_mass" gives the
                 marked tokens the share `share` of every row.
    share        the share for "target_mass", between 0 and 1.
    protect      "none" (paper), "first" or "special": prompt tokens that are never scaled. The first token is an
                 attention sink, so scaling it down is a large part of PASTA's effect.
    scope        "all" (paper) scales every unmarked token; "message" only those of a message that has a mark.
    backend      "auto", "torch" or "triton".
    """

    alpha: float = 0.01
    heads: Heads = "profile"
    mode: str = "exclude"
    share: float = 0.9
    protect: str = "none"
    scope: str = "all"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha!r} must be above 0 and at most 1; the paper uses 0.01, and 1 is no steering"
            )
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r} must lie strictly between 0 and 1, for example 0.9")
        for name, allowed in (("mode", MODES), ("protect", PROTECT), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        if isinstance(self.heads, str) and self.heads not in ("all", "profile"):
            raise ValueError(f"heads={self.heads!r} is not known; give {{layer: [heads]}}, 'all' or 'profile'")

    @property
    def log_alpha(self) -> float:
        """log(alpha) in double precision, floored so that it stays finite."""
        return math.log(max(self.alpha, FLOOR))

    @classmethod
    def quick(cls) -> Self:
        """The notebook's setting: the paper's alpha on the shipped profile."""
        return cls()

    @classmethod
    def paper(cls, heads: Heads) -> Self:
        """The paper's setting for a model with its own profile: alpha 0.01, all unmarked tokens scaled down."""
        return cls(alpha=0.01, heads=heads, mode="exclude", protect="none", scope="all")


def head_map(heads: Heads, layers: int, heads_per_layer: int) -> dict[int, tuple[int, ...]]:
    """Normalise any accepted form to {layer: sorted heads}, checking that every head exists.

    Raises ValueError naming the first head that does not exist and the model's range.
    """
    if isinstance(heads, str) and heads == "all":
        return {layer: tuple(range(heads_per_layer)) for layer in range(layers)}
    try:
        pairs = (
            [(_index(layer), _index(h)) for layer, hs in heads.items() for h in hs]
            if isinstance(heads, Mapping)
            else [(_index(layer), _index(h)) for layer, h in heads]
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"heads={heads!r} cannot be read; give {{layer: [heads]}}, [(layer, head)] or 'all'"
        ) from error
    for layer, head in pairs:
        if not (0 <= layer < layers and 0 <= head < heads_per_layer):
            raise ValueError(
                f"heads names layer {layer}, head {head}, but this model has layers 0-{layers - 1} "
                f"with heads 0-{heads_per_layer - 1} each"
            )
    found: dict[int, set[int]] = {}
    for layer, head in pairs:
        found.setdefault(layer, set()).add(head)
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def _index(number: int | str) -> int:
    """A layer or head number, which JSON may have made a string."""
    return int(number) if isinstance(number, str) else operator.index(number)

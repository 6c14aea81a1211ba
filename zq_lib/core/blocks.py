"""Module names of a model read as a map: its blocks, and the matrices that each block has."""

from __future__ import annotations

from collections.abc import Sequence


def grid(names: Sequence[str]) -> tuple[list[int], list[str], dict[str, tuple[int, int]]]:
    """The blocks, the matrices' names in a block, and name -> (row, column) of the map.

    >>> grid(["enc.0.query", "enc.0.out.dense", "enc.1.query"])
    ([0, 1], ['query', 'out.dense'], {'enc.0.query': (0, 0), 'enc.0.out.dense': (0, 1), 'enc.1.query': (1, 0)})
    """
    places: dict[str, tuple[int, str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        places[name] = (0, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    return blocks, kinds, {n: (blocks.index(b), kinds.index(k)) for n, (b, k) in places.items()}


def short(name: str) -> str:
    """A matrix' name without what every name has; attention's output keeps apart from the block's.

    >>> short("encoder.attention.self.query"), short("encoder.attention.output.dense"), short("encoder.output.dense")
    ('query', 'attention output', 'output')
    """
    name = name.replace("attention.output", "attention output")
    parts = [p for p in name.split(".") if p not in ("attention", "self", "dense", "encoder", "model", "self_attn")]
    return ".".join(parts) or name

"""TED's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

MAPS = ("uniform", "interval")
FILTERS = ("linear", "mlp")
POOLS = ("auto", "first", "mean", "last", "token")
POSITIONS = ("all", "pooled")
DIVERGENCES = ("kl", "reverse_kl", "jsd", "mse")
SCALES = ("variance", "none")
BACKENDS = ("auto", "torch", "triton")


class PaperTask(NamedTuple):
    """One row of the authors' scripts: DeBERTaV3-base to DeBERTaV3-xs."""

    batch: int
    length: int
    epochs: int
    learning_rate: float
    kd_weight: float
    layer_weight: float


PAPER_TASKS: dict[str, PaperTask] = {
    "MNLI": PaperTask(64, 256, 3, 7e-5, 5, 7500),
    "QQP": PaperTask(64, 256, 8, 6e-5, 20, 1000),
    "QNLI": PaperTask(32, 256, 3, 5e-5, 20, 100),
    "SST-2": PaperTask(32, 256, 6, 4e-5, 20, 20),
    "RTE": PaperTask(16, 256, 6, 6e-5, 20, 50),
    "CoLA": PaperTask(32, 256, 6, 6e-5, 0, 10),
    "MRPC": PaperTask(32, 256, 6, 7e-5, 20, 100),
    "STS-B": PaperTask(16, 128, 6, 1e-4, 20, 50),
    "SQuAD2.0": PaperTask(8, 384, 3, 5e-5, 10, 5000),
}


@dataclass(frozen=True)
class TedConfig:
    """Which layers are matched, through which filters, and what the student's loss is made of (sections 3 and 4).

    layers           which student layer learns from which teacher layer. "uniform": pair k of K is student layer
                     round(k L_s / K) and teacher layer round(k L_t / K). "interval": the last layer of each of K equal
                     groups, as published. Or pairs ((student, teacher), ...), layers counted from 1.
    pairs            K. None is the depth of the shallower model, and for "interval" the largest K that divides both.
    filter_dim       d_f, the filters' width, the same for both models. None is the wider model's width. A filter of its
                     model's width or more forgets nothing, it only weighs directions; a narrow one has to choose.
    filter           "linear", or "mlp": W2 act(W1 h + b1) + b2 with W1 square.
    pool             what the first stage's head reads: "first", "mean" or "last" token, "token" for a head on every
                     one, "auto" what the model itself does.
    positions        tokens whose filtered states are matched: "all", or "pooled", the one that the head reads.
    kd               distillation of the output: "kl", "reverse_kl", "jsd" or "mse". A head with one output always has
                     "mse", because the divergence of one class is 0.
    beta             the teacher's share in the mixture of "jsd".
    temperature      T of both softmaxes.
    temperature_squared  multiply the divergence by T^2, so that its gradient does not shrink with T.
    task_weight      weight of the loss on the labels; 0 needs no labels.
    kd_weight        weight of the output's distillation; 0 leaves it out.
    layer_weight     weight of the filtered states' mean squared error; 0 leaves it out.
    scale            "variance" divides every pair by the variance of the teacher's filtered states, so that weights of
                     1 to 10 fit any model; "none" is the paper.
    train_filters    whether the student's filters train on in the second stage.
    dropout          of the first stage's heads.
    sample           rows per step on which a language model's first stage computes its loss; None is all of them.
    backend          "auto", "torch" or "triton".
    """

    layers: str | tuple[tuple[int, int], ...] = "uniform"
    pairs: int | None = None
    filter_dim: int | None = None
    filter: str = "linear"
    pool: str = "auto"
    positions: str = "all"
    kd: str = "kl"
    beta: float = 0.5
    temperature: float = 2.0
    temperature_squared: bool = True
    task_weight: float = 1.0
    kd_weight: float = 1.0
    layer_weight: float = 1.0
    scale: str = "variance"
    train_filters: bool = True
    dropout: float = 0.1
    sample: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("filter", FILTERS), ("pool", POOLS), ("positions", POSITIONS), ("kd", DIVERGENCES), ("scale", SCALES),
            ("backend", BACKENDS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        self._check_layers()
        for name in ("pairs", "filter_dim", "sample"):
            value = getattr(self, name)
            if value is not None and (not _whole(value) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or None")
        for name in ("task_weight", "kd_weight", "layer_weight"):
            if not _number(value := getattr(self, name)) or value < 0:
                raise ValueError(f"{name}={value!r} must be a number of at least 0")
        if self.task_weight + self.kd_weight + self.layer_weight == 0:
            raise ValueError("task_weight, kd_weight and layer_weight are all 0, which trains nothing; raise one")
        if not _number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0; the usual one is 2")
        if not _number(self.beta) or not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta!r} must lie between 0 and 1; its limits are kd='reverse_kl' and kd='kl'")
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in MAPS:
                raise ValueError(
                    f"layers={self.layers!r} is not known; choose one of {', '.join(MAPS)}, or give pairs such as "
                    "((1, 2), (2, 4))"
                )
            return
        try:
            pairs = tuple((int(student), int(teacher)) for student, teacher in self.layers)
        except (TypeError, ValueError):
            pairs = ()
        if not pairs or pairs != tuple(tuple(pair) for pair in self.layers):
            raise ValueError(
                f"layers={self.layers!r} must hold pairs (student layer, teacher layer), as ((1, 2), (2, 4))"
            )
        if min(min(pair) for pair in pairs) < 1:
            raise ValueError(f"layers={self.layers!r} counts from 1, the first block; 0 would be the embeddings")
        if self.pairs not in (None, len(pairs)):
            raise ValueError(f"pairs={self.pairs} but layers holds {len(pairs)}; leave pairs out")
        object.__setattr__(self, "layers", pairs)  # from JSON they are lists

    def to_json(self) -> str:
        """All settings as JSON; `from_json` reads them back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for a setting that does not exist."""
        found: dict[str, Any] = json.loads(text)
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ValueError(f"{unknown[0]!r} is no setting of TedConfig; remove it")
        return cls(**found)

    @classmethod
    def quick(cls, filter_dim: int | None = 16) -> Self:
        """The lab's setting: narrow filters, weights 5 and 1 on the normalised error."""
        return cls(filter_dim=filter_dim, kd_weight=5.0, layer_weight=1.0)

    @classmethod
    def paper(cls, task: str = "MNLI") -> Self:
        """The authors' weights for a task of `PAPER_TASKS`: filters of the teacher's width, on errors as they are."""
        if task not in PAPER_TASKS:
            raise ValueError(f"task={task!r} has no published setting; choose one of {', '.join(PAPER_TASKS)}")
        row = PAPER_TASKS[task]
        return cls(
            layers="interval", kd_weight=float(row.kd_weight), layer_weight=float(row.layer_weight), scale="none"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

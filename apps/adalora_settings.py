"""What the AdaLoRA page can be set to, and what a setting plans to do. No training and nothing of a page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from zq_lib.adalora import AdaLoraConfig, Plan, plan
from zq_lib.adalora.config import SCORES
from zq_lib.adalora.lab import PLANTED, RATE, Size

KINDS = {  # a block's matrices: what the page calls them, and their module names
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attn out": "attention.output.dense",
    "FFN in": "intermediate.dense",
    "FFN out": "output.dense",
}
SIZES = {"planted": PLANTED["quick"], "questions": Size(6, 80, 8, 12, 640, 304)}
PROBLEMS = {"planted needs": "planted", "TREC questions": "questions"}
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
SCALE = 4.0  # alpha / rank of every method, so that they are compared at the same scale
PLANTS = {
    "four matrices": (8, 0, 0, 0, 8, 0, 8, 0, 0, 0, 0, 8),  # what the library draws for seed 0
    "feed-forward": (0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 8, 8),
    "one matrix": (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0),
    "everywhere": (2,) * 12,
}
MOST_STEPS = {"planted": 200, "questions": 80}
LIMITS: dict[str, tuple[float, float]] = {
    "init_rank": (2, 12), "target_rank": (1, 6), "warmup": (0, 0.4), "final": (0, 0.5), "interval": (1, 40),
    "penalty": (0, 0.5), "seed": (0, 9),
}  # fmt: skip
MOST_PLANTED = 12


@dataclass(frozen=True)
class Settings:
    """What the controls say. `plant` are the hidden ranks of the first two layers' matrices in KINDS' order; `steps`
    and `rate` are by default the problem's own; `warmup` and `final` are shares of the steps."""

    problem: str = "planted"
    plant: tuple[int, ...] = PLANTS["four matrices"]
    init_rank: int = 8
    target_rank: int = 2
    steps: int | None = None
    warmup: float = 0.1
    final: float = 0.35
    interval: int = 10
    penalty: float = 0.01
    score: str = "adalora"
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("problem", tuple(SIZES)), ("score", SCORES), ("rate", (None, *RATES))):
            if getattr(self, name) not in allowed:
                offered = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{name}={getattr(self, name)!r} is not offered here; choose one of {offered}")
        defaults = {"steps": SIZES[self.problem].steps, "rate": RATE["planted" if self.is_planted else "text"]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        limits = {**LIMITS, "steps": (20, MOST_STEPS[self.problem])}
        for name, (low, high) in limits.items():
            value, whole = getattr(self, name), isinstance(high, int)
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "a whole number" if whole else "a number"
                raise ValueError(f"{name}={value!r} is out of range; choose {what} from {low} to {high}")
        if self.target_rank >= self.init_rank:
            raise ValueError(
                f"target_rank={self.target_rank} is not below init_rank={self.init_rank}, so no rank would be given "
                "up; raise init_rank or lower target_rank"
            )
        object.__setattr__(self, "plant", _checked(self.plant))

    @property
    def is_planted(self) -> bool:
        return self.problem == "planted"

    @property
    def size(self) -> Size:
        """How large the problem is."""
        return SIZES[self.problem]

    @property
    def config(self) -> AdaLoraConfig:
        """The library's settings."""
        return AdaLoraConfig(
            init_rank=self.init_rank, target_rank=self.target_rank, alpha=SCALE * self.init_rank,
            total_steps=self.steps, warmup=float(self.warmup), final=float(self.final), interval=self.interval,
            orthogonality=float(self.penalty), score=self.score,
        )  # fmt: skip

    @property
    def planted(self) -> dict[str, int]:
        """Hidden rank by module name, without the zeros; nothing where nothing is planted."""
        if not self.is_planted:
            return {}
        return {name: rank for name, rank in zip(names("planted"), self.plant, strict=True) if rank}

    @property
    def rival(self) -> tuple[Any, ...]:
        """What LoRA's results depend on."""
        plant = self.plant if self.is_planted else ()
        return (self.problem, plant, self.seed, self.steps, self.rate, self.init_rank, self.target_rank)

    @property
    def plan(self) -> Plan:
        """The library's dry run: budgets, parameters and what looks odd."""
        return plan(skeleton(self.problem), self.config)

    def python(self) -> str:
        """A program that trains with these settings, writes the adapter and compares."""
        size = f"lab.Size({', '.join(str(n) for n in vars(self.size).values())})"
        given = {
            "init_rank": self.init_rank, "target_rank": self.target_rank, "alpha": SCALE * self.init_rank,
            "total_steps": self.steps, "warmup": float(self.warmup), "final": float(self.final),
            "interval": self.interval, "orthogonality": float(self.penalty), "score": self.score,
        }  # fmt: skip
        config = "".join(f"    {name}={value!r},\n" for name, value in given.items())
        if self.is_planted:
            hidden = "".join(f"    {name!r}: {rank},\n" for name, rank in self.planted.items())
            problem = f"hidden = {{\n{hidden}}}\nproblem = lab.planted({self.seed}, {size}, hidden)\n"
        else:
            problem = f"problem = lab.text({self.seed}, {size})\n"
        return (
            "import torch\n\n"
            "from zq_lib import adalora\n"
            "from zq_lib.adalora import lab\n\n"
            f"config = adalora.AdaLoraConfig(\n{config})\n"
            f"{problem}"
            f"problem.rate = {self.rate}\n\n"
            f"torch.manual_seed({self.seed})\n"
            "rivals = problem.copy()\n"
            "with adalora.attach(problem.model, config, train_also=problem.train_also) as handle:\n"
            f"    for step, loss in lab.training(problem, handle, {self.steps}):\n"
            "        pass  # `loss` is the task's alone; the ranks find their place by themselves\n"
            '    print(lab.ADALORA, problem.error(), "ranks", handle.ranks())\n'
            '    adalora.to_peft_lora(handle, "adapter")\n\n'
            "others = (lab.UNIFORM, lab.WIDE)  # the second one is also cut by SVD\n"
            f"for row in lab.compare(rivals, config, {self.steps}, {self.seed}, print, others)[0]:\n"
            '    print(row["method"], row["error"], "ranks", row["ranks"])\n'
        )


def _checked(plant: Any) -> tuple[int, ...]:
    """Twelve hidden ranks. Raises ValueError for anything else, and where nothing is planted."""
    found = tuple(plant) if isinstance(plant, list | tuple) else ()
    fits = all(isinstance(r, int) and not isinstance(r, bool) and 0 <= r <= MOST_PLANTED for r in found)
    if len(found) != len(names("planted")) or not fits:
        raise ValueError(
            f"plant={plant!r} does not fit; give {len(names('planted'))} whole numbers from 0 to {MOST_PLANTED}, "
            "one per matrix"
        )
    if not any(found):
        raise ValueError("plant hides nothing: every rank is 0; give at least one matrix a rank above 0")
    return found


@lru_cache(maxsize=len(SIZES))
def names(problem: str) -> tuple[str, ...]:
    """The adapted matrices' module names, layer by layer."""
    start = "" if problem == "planted" else "bert."
    return tuple(f"{start}encoder.layer.{i}.{kind}" for i in range(SIZES[problem].layers) for kind in KINDS.values())


@lru_cache(maxsize=len(SIZES))
def skeleton(problem: str) -> nn.Module:
    """The problem's model without any numbers: enough to plan a training."""
    shape = BertConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=SIZES[problem].layers
    )
    with torch.device("meta"):
        if problem == "planted":
            return BertModel(shape, add_pooling_layer=False)
        return BertForSequenceClassification(shape)

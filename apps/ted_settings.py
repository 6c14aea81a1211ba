"""What the TED page's three parts can be set to, and the program that each setting is. Nothing of a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zq_lib.ted import TedConfig
from zq_lib.ted.digits import CLASSES, DIMS, KD, LAYERS, LWD, PLAIN
from zq_lib.ted.lab import narrow

ROWS, COLUMNS = 8, 16  # pixels of a pair
INK = {".": 0.0, " ": 0.0, "+": 0.5, "#": 1.0}
MOST_PICTURES = 40  # drawings of each digit to choose from
KD_WEIGHTS = (0.0, 1.0, 5.0, 20.0)
LAYER_WEIGHTS = (0.0, 1.0, 10.0, 100.0)
MOST_SEED = 9
QUESTION = "How far is it to the moon?"
MOST_QUESTION = 150  # characters


def _offered(name: str, value: Any, offered: Any) -> None:
    if isinstance(value, bool) or value not in tuple(offered):
        raise ValueError(f"{name}={value!r} is not offered here; choose one of {', '.join(map(str, offered))}")


def _whole(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name}={value!r} does not exist; choose a whole number from 0 to {most}")


@dataclass(frozen=True)
class Digits:
    """A pair of digits, and the filter of width `dim` behind `layer` that is asked about it.

    `picture` is which of its drawings of the digits is taken. A `drawing` takes their place: up to 8 lines of up to 16
    characters of INK.
    """

    dim: int = 8
    layer: int = LAYERS
    left: int = 3
    right: int = 7
    picture: int = 0
    drawing: str = ""

    def __post_init__(self) -> None:
        _offered("dim", self.dim, DIMS)
        _offered("layer", self.layer, range(1, LAYERS + 1))
        for name in ("left", "right"):
            _whole(name, getattr(self, name), CLASSES - 1)
        _whole("picture", self.picture, MOST_PICTURES - 1)
        if not isinstance(self.drawing, str):
            raise ValueError(f"drawing={self.drawing!r} must be a text")
        lines = self.lines
        if len(lines) > ROWS or max(map(len, lines), default=0) > COLUMNS:
            raise ValueError(
                f"drawing has {len(lines)} lines, the longest of {max(map(len, lines))} characters; draw at most "
                f"{ROWS} of {COLUMNS}"
            )
        if strange := sorted(set("".join(lines)) - set(INK)):
            raise ValueError(f"drawing has the character {strange[0]!r}; use # for ink, + for half and . for none")

    @property
    def lines(self) -> list[str]:
        """The drawing's lines; none if nothing was drawn."""
        return self.drawing.rstrip().splitlines()

    @property
    def asked(self) -> tuple[int, int, int, str]:
        """Which pair it is, whatever is looked at of it."""
        return self.left, self.right, self.picture, "\n".join(self.lines)

    def python(self) -> str:
        """A program that fits the filters and probes them."""
        return (
            "from zq_lib.ted import digits\n\n"
            "found = digits.digits()  # a teacher that is trained on both digits of a pair\n"
            f"for row in digits.selectivity(found, dims=({self.dim},), layers=({self.layer},)):\n"
            '    if row["images"] == "new":  # that no model has seen; width 0 is the state itself\n'
            "        print(row)\n"
        )


@dataclass(frozen=True)
class Training:
    """A distillation of the small reader of digits: TED, and what it is compared with at the same weights.

    `layers` of the student learn from the teacher's of the same number. `seed` is the student's and that of the order
    of its examples; the teacher and the pairs are always the same.
    """

    kd_weight: float = 5.0
    layer_weight: float = 1.0
    dim: int = 8
    layers: tuple[int, ...] = tuple(range(1, LAYERS + 1))
    seed: int = 0

    def __post_init__(self) -> None:
        _offered("kd_weight", self.kd_weight, KD_WEIGHTS)
        _offered("layer_weight", self.layer_weight, LAYER_WEIGHTS)
        _offered("dim", self.dim, DIMS)
        layers = self.layers if isinstance(self.layers, list | tuple) else [self.layers]
        if not layers:
            raise ValueError(f"layers is empty; choose at least one of 1 to {LAYERS}, or set layer_weight=0")
        for layer in layers:
            _offered("layers", layer, range(1, LAYERS + 1))
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        _whole("seed", self.seed, MOST_SEED)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Matched layers, (student's, teacher's)."""
        return tuple((n, n) for n in self.layers)

    @property
    def config(self) -> TedConfig:
        """The library's settings for TED."""
        return TedConfig(
            layers=self.pairs, filter_dim=self.dim, kd_weight=self.kd_weight, layer_weight=self.layer_weight
        )

    @property
    def arms(self) -> list[Any]:
        """What is trained, the most complete first: arms that a weight of 0 makes equal come once."""
        matched = [narrow(self.dim), LWD] if self.layer_weight else []
        return [*matched, *([KD] if self.kd_weight else []), PLAIN]

    def python(self) -> str:
        """A program that trains all arms from one start."""
        names = ", ".join({"KD": "digits.KD", "LWD": "digits.LWD", PLAIN.name: "digits.PLAIN"}.get(
            arm.name, f"lab.narrow({self.dim})") for arm in self.arms)  # fmt: skip
        return (
            "from dataclasses import replace\n\n"
            "from zq_lib.ted import arms, digits, lab\n\n\n"
            "class Problem(arms.Problem):\n"
            "    def settings(self, arm, weight):\n"
            f"        return replace(super().settings(arm, weight), layers={self.pairs})\n\n\n"
            "found = digits.digits()\n"
            f"start = replace(found, seed={self.seed}).problem()  # the student's seed; the teacher stays\n"
            f"cache = arms.keep_states(found.teacher, found.teacher, found.train.rows, {self.layers})\n"
            f"problem = Problem(**{{**vars(start), 'cache': cache, 'kd_weight': {self.kd_weight:g}}})\n"
            f"chosen = dict.fromkeys([{names}], {self.layer_weight:g})\n"
            f"for row in arms.compare(problem, chosen, {self.seed}):\n"
            "    print(row)\n"
        )


@dataclass(frozen=True)
class Question:
    """A question for the teacher and its students: which kind of answer does it ask for?"""

    question: str = QUESTION

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question={self.question!r} has no words; write a question")
        object.__setattr__(self, "question", " ".join(self.question.split()))
        if len(self.question) > MOST_QUESTION:
            raise ValueError(
                f"question has {len(self.question)} characters, more than {MOST_QUESTION}; shorten "
                f"{self.question[:30]!r}…"
            )

    def python(self) -> str:
        """A program that trains all models and asks them."""
        return (
            "from zq_lib.ted import TaskFilters, TedConfig, arms, lab, text\n"
            "from zq_lib.ted.stage_one import fit\n\n"
            f"question = {self.question!r}\n"
            "setting = text.setting(say=print)  # MiniLM-L6, fine-tuned on TREC's questions\n"
            "problem = setting.problem(seed=0)\n"
            'models = {"teacher": setting.teacher, "start": problem.student}\n'
            "chosen = (text.PLAIN, text.KD, text.LWD, text.PCA, text.TED)\n"
            "for moment in arms.watch(problem, {arm: text.WEIGHTS[arm] for arm in chosen}, seed=0):\n"
            "    if moment.row:\n"
            "        models[moment.arm] = moment.student\n"
            "        print(moment.row)\n"
            "for row in lab.answers(models, setting.found, question):\n"
            "    print(row)\n\n"
            "train, layers = setting.found.train, range(1, 7)\n"
            "filters = TaskFilters(setting.teacher, TedConfig(filter_dim=text.DIM), layers)\n"
            "cache = arms.keep_states(setting.teacher, setting.teacher, train, layers)\n"
            "batches = arms.Shuffled(train, problem.batch, 0)\n"
            "rounds = {'epochs': problem.filter_epochs, 'learning_rate': problem.filter_rate}\n"
            "for step in fit(filters, batches, cache=cache, **rounds):\n"
            "    pass\n"
            "for row in lab.layer_answers(filters, setting.found, question):\n"
            "    print(row)\n"
        )

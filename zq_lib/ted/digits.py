"""Two digits side by side, the left one wanted (section 7.1): a teacher that knows too much, and what a filter keeps.

The teacher reads both digits, and its states say both. The task asks for the left one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from zq_lib.core import data
from zq_lib.core.lab import FULL, Row
from zq_lib.core.seeding import seed_everything
from zq_lib.ted.arms import LABELS, Arm, Problem, Shuffled, in_order, keep_states, train
from zq_lib.ted.cache import StateCache
from zq_lib.ted.config import TedConfig
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.layers import EXAMPLE
from zq_lib.ted.probe import probe
from zq_lib.ted.stage_one import FilterStep, fit

CLASSES, PATCHES, PIXELS = 10, 8, 16  # two digits of 8 x 8 are two rows of four patches of 4 x 4
WIDTH, SMALL, LAYERS, HEADS = 64, 12, 3, 4
PLAIN = Arm(LABELS, kd=False)
KD = Arm("KD")
LWD = Arm("LWD", "identity")
TED_WIDE = Arm("TED 64", "trained", 64)
TED = Arm("TED 8", "trained", 8)
ARMS = (PLAIN, KD, LWD, TED_WIDE, TED)
WEIGHTS = (1.0, 10.0)
DIMS = (4, 8, 16, 64)
SIDES = ("left", "right")


@dataclass(frozen=True)
class Size:
    """How large the experiment is: pairs that the teacher, the students and the test have; epochs of each training."""

    teacher_pairs: int
    pairs: int
    test: int
    teacher_epochs: int
    start_epochs: int
    epochs: int
    filter_epochs: int


SIZES = {"quick": Size(3000, 1000, 1000, 8, 10, 6, 12), FULL: Size(4000, 1000, 2000, 15, 12, 12, 20)}
BATCH, TEACHER_RATE, RATE = 64, 2e-3, 1e-2


class PairForSequenceClassification(BertPreTrainedModel):
    """An encoder of patches; its head reads the class token, the first one, whose patch is empty."""

    base_model_prefix = ""  # the model is its own base: patches must be embedded before the body sees them

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(PIXELS, config.hidden_size)
        self.body = BertModel(config, add_pooling_layer=False)
        self.body.embeddings.word_embeddings = None  # there are no words
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits [B, 10] of patches [B, 9, 16], and the mean cross entropy if there are labels."""
        states = self.body(inputs_embeds=self.embed(inputs_embeds)).last_hidden_state
        logits = self.classifier(states[:, 0])
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def reader(width: int, seed: int) -> PairForSequenceClassification:
    """An untrained reader of three layers."""
    seed_everything(seed)
    config = BertConfig(
        vocab_size=1, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * width, max_position_embeddings=PATCHES + 1, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=width**-0.5,
    )  # fmt: skip
    return PairForSequenceClassification(config)


def load_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images [n, 8, 8] from 0 to 1 and labels [n]. Raises ModuleNotFoundError without."""
    images, labels = data.digits()
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)


@dataclass
class Pairs:
    """Pairs of digits as rows for models, `inputs_embeds` [n, 9, 16] and `labels` [n] of the left one; and `right`."""

    rows: dict[str, Tensor]
    right: Tensor

    @property
    def labels(self) -> dict[str, Tensor]:
        """The digit on either side, [n] each."""
        return {"left": self.rows["labels"], "right": self.right}


def draw(images: Tensor, labels: Tensor, count: int, source: torch.Generator) -> Pairs:
    """`count` pairs drawn at random from images [n, 8, 8] and their labels [n]."""
    left, right = torch.randint(len(images), (2, count), generator=source)
    wide = torch.cat([images[left], images[right]], 2)  # [n, 8, 16]
    patches = wide.unfold(1, 4, 4).unfold(2, 4, 4).reshape(count, PATCHES, PIXELS)
    tokens = F.pad(patches, (0, 0, 1, 0))  # [n, 9, 16], the first one for the class token
    return Pairs({"inputs_embeds": tokens, "labels": labels[left], EXAMPLE: torch.arange(count)}, labels[right])


@dataclass
class Digits:
    """The experiment of a seed: the trained teacher, and pairs for the students, for the test and for probes.

    `test` is of images that no model has seen, `known` are new pairs of images that the teacher has seen: what its
    states say of those is not mixed up with what it does not recognise.
    """

    teacher: PairForSequenceClassification
    train: Pairs
    test: Pairs
    known: Pairs
    cache: StateCache  # of the training pairs, every layer, with logits
    size: Size
    seed: int

    def problem(self) -> Problem:
        """A small student trained on labels alone, the start of every arm."""
        student = reader(SMALL, self.seed)
        for _ in train(student, self.train.rows, BATCH, self.size.start_epochs, RATE, self.seed):
            pass
        return Problem(
            self.teacher, student, self.train.rows, self.test.rows, self.cache, batch=BATCH, epochs=self.size.epochs,
            rate=RATE, kd_weight=5.0, filter_epochs=self.size.filter_epochs,
        )  # fmt: skip


def digits(size: Size = SIZES["quick"], seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Digits:
    """Split the images, pair them, and train the teacher on both digits of a pair."""
    images, labels = load_images()
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=source)
    parts = [(images[part], labels[part]) for part in (order[:1200], order[1200:])]
    many = draw(*parts[0], size.teacher_pairs, source)
    own, known = (draw(*parts[0], count, source) for count in (size.pairs, size.test))
    test = draw(*parts[1], size.test, source)
    say("teacher")
    teacher = reader(WIDTH, seed)
    for _ in train_both(teacher, many, size.teacher_epochs, seed):
        pass
    cache = keep_states(teacher, teacher, own.rows, range(1, LAYERS + 1))
    return Digits(teacher, own, test, known, cache, size, seed)


def train_both(teacher: PairForSequenceClassification, pairs: Pairs, epochs: int, seed: int) -> Iterator[float]:
    """Train a reader on both digits; the right one through a head that is thrown away."""
    other = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.AdamW([*teacher.parameters(), *other.parameters()], lr=TEACHER_RATE, weight_decay=0)
    rows = {**pairs.rows, "right": pairs.right}
    teacher.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = TEACHER_RATE * (1 - epoch / epochs)
        for batch in Shuffled(rows, BATCH, seed + epoch):
            states = teacher.body(inputs_embeds=teacher.embed(batch["inputs_embeds"])).last_hidden_state[:, 0]
            loss = F.cross_entropy(teacher.classifier(states), batch["labels"])
            loss = loss + F.cross_entropy(other(states), batch["right"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())
    teacher.eval()


def class_states(model: nn.Module, pairs: Pairs) -> list[Tensor]:
    """The class token's state [n, d] behind every layer."""
    cache = keep_states(model, model, pairs.rows, range(1, LAYERS + 1))
    found = [cache.seen(batch).states for batch in in_order(pairs.rows)]
    return [torch.cat([states[k][:, 0] for states in found]) for k in range(LAYERS)]


def fit_filters(found: Digits, dim: int, seed: int = 0) -> Iterator[tuple[FilterStep, TaskFilters]]:
    """The first stage of the teacher's filters of one width, step by step, on the states that are kept."""
    torch.manual_seed(seed)
    filters = TaskFilters(found.teacher, TedConfig(filter_dim=dim))
    batches = Shuffled(found.train.rows, BATCH, seed)
    for step in fit(filters, batches, epochs=found.size.filter_epochs, cache=found.cache, learning_rate=1e-2):
        yield step, filters


def selectivity(found: Digits, dims: Sequence[int] = DIMS, layers: Sequence[int] = (LAYERS,)) -> list[Row]:
    """What a linear probe reads of either digit: from the teacher's class token, and from its filtered state.

    A row per layer, width, side and kind of images, "known" to the teacher or "new"; width 0 is the state itself.
    """
    parts = {"train": found.train, "known": found.known, "new": found.test}
    states = {name: class_states(found.teacher, pairs) for name, pairs in parts.items()}
    rows = []
    for dim in (0, *dims):
        filters = None
        if dim:
            *_, (_, filters) = fit_filters(found, dim, found.seed)
        for layer in layers:
            shown = {name: h[layer - 1] for name, h in states.items()}
            if filters is not None:
                with torch.no_grad():
                    shown = {name: filters.filters[layer - 1](h) for name, h in shown.items()}
            for side, images in product(SIDES, ("known", "new")):
                own, other = (parts[name].labels[side] for name in ("train", images))
                accuracy = probe(shown["train"], own, shown[images], other)
                rows.append({"layer": layer, "dim": dim, "side": side, "images": images, "accuracy": accuracy})
    return rows


def arms(weights: Sequence[float] = WEIGHTS) -> list[Mapping[Arm, float]]:
    """The arms with their weights, in groups that `compare` takes: those without filtered states come once."""
    plain = {arm: 1.0 for arm in ARMS if arm.target is None}
    return [plain, *({arm: weight for arm in ARMS if arm.target} for weight in weights)]

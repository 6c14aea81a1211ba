"""Real text: which of six kinds of answer does a question ask for? (section 7.2)

The teacher is all-MiniLM-L6-v2, fine-tuned; the student has three layers of width 96 and word vectors that are
principal components of the teacher's. TREC's questions take the place of the docstrings of the method's description.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from zq_lib.core import data, models
from zq_lib.core.lab import FULL
from zq_lib.core.seeding import seed_everything
from zq_lib.ted.arms import LABELS, Arm, Problem, keep_states, train
from zq_lib.ted.cache import StateCache
from zq_lib.ted.layers import EXAMPLE

WIDTH, LAYERS, HEADS = 96, 3, 4  # of the student
DIM = 16
KD = Arm("KD")
LWD = Arm("LWD", "identity")
RANDOM = Arm(f"random projection to {DIM}", "random", DIM)
PCA = Arm(f"PCA to {DIM}", "pca", DIM)
UNFITTED = Arm(f"TED {DIM}, student's filters untrained", "trained", DIM, fitted=False)
TED = Arm(f"TED {DIM}", "trained", DIM)
WIDE = Arm("TED 384", "trained", 384)
PLAIN = Arm(LABELS, kd=False)
ARMS = (PLAIN, KD, LWD, RANDOM, PCA, UNFITTED, TED, WIDE)
WEIGHTS = {arm: 10.0 if arm in (LWD, RANDOM, WIDE) else 1.0 for arm in ARMS}  # the best that `benchmark.weights` found
KD_WEIGHT = 5.0


@dataclass(frozen=True)
class Size:
    """How large the experiment is: questions to learn from, to choose settings on, and to be judged on; epochs."""

    train: int
    choose: int
    test: int | None  # None: all that are left
    tokens: int
    teacher_epochs: int
    start_epochs: int
    epochs: int
    batch: int = 32
    teacher_batch: int = 16


SIZES = {"quick": Size(480, 80, 400, 16, 2, 3, 3), FULL: Size(1600, 400, None, 24, 2, 3, 4)}
TEACHER_RATE, START_RATE, RATE = 1e-4, 2e-3, 1e-3


class MeanForSequenceClassification(BertPreTrainedModel):
    """BERT's encoder, the mean over its tokens and a linear head: how sentence encoders such as MiniLM are read."""

    def __init__(self, config: BertConfig) -> None:
        config.classifier_pooling = "mean"
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits [B, classes], and the mean cross entropy if there are labels."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, T, d]
        mask = attention_mask[..., None].to(states.dtype)
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


@dataclass
class Questions:
    """Tokenised questions in three parts that share none, with the names of their classes."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    kinds: list[str]
    train: dict[str, Tensor]
    choose: dict[str, Tensor]
    test: dict[str, Tensor]
    texts: list[str]  # of the test

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Other questions as inputs of a model, cut to the same length."""
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}


def questions(tokenizer: PreTrainedTokenizerBase, size: Size = SIZES["quick"]) -> Questions:
    """TREC's questions, in an order that is always the same, cut into the parts of `size`."""
    rows = data.trec()
    random.Random(0).shuffle(rows)
    kinds = sorted({q.coarse for q in rows})
    stops = (0, size.train, size.train + size.choose)
    last = None if size.test is None else stops[-1] + size.test
    parts = [rows[: stops[1]], rows[stops[1] : stops[2]], rows[stops[2] : last]]
    found = []
    for part in parts:
        inputs = tokenizer(
            [q.text for q in part], padding="max_length", truncation=True, max_length=size.tokens, return_tensors="pt"
        )
        labels = torch.tensor([kinds.index(q.coarse) for q in part])
        encoded = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        found.append({**encoded, "labels": labels, EXAMPLE: torch.arange(len(part))})
    return Questions(tokenizer, size.tokens, kinds, *found, [q.text for q in parts[2]])


def classifier(encoder: BertModel, classes: int) -> MeanForSequenceClassification:
    """An encoder's weights under the mean over tokens and a new head."""
    config = copy.deepcopy(encoder.config)
    config.num_labels = classes
    model = MeanForSequenceClassification(config)
    model.bert.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler.")})
    return model.eval()


def teacher(
    found: Questions, size: Size, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> MeanForSequenceClassification:
    """MiniLM-L6 fine-tuned on the questions."""
    seed_everything(seed)
    model = classifier(models.load("minilm-l6")[0], len(found.kinds))
    for step, loss in enumerate(train(model, found.train, size.teacher_batch, size.teacher_epochs, TEACHER_RATE, seed)):
        if step % 20 == 0:
            say(f"teacher, step {step}: loss {loss:.2f}")
    return model


def student(model: MeanForSequenceClassification, seed: int = 0) -> MeanForSequenceClassification:
    """An untrained student whose word vectors are the principal components of the teacher's, and stay so.

    With word vectors that train, the student knows the training questions by heart after four epochs, and no arm is
    better than its start.
    """
    config = BertConfig(
        vocab_size=model.config.vocab_size, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=64, num_labels=model.config.num_labels,
    )  # fmt: skip
    seed_everything(seed)
    small = MeanForSequenceClassification(config)
    words = model.bert.embeddings.word_embeddings.weight.detach()
    centred = words - words.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :WIDTH]  # eigh sorts ascending
    with torch.no_grad():
        small.bert.embeddings.word_embeddings.weight.copy_(centred @ vectors)
    small.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    return small


@dataclass
class Setting:
    """What all seeds share: the questions, the teacher, and what it shows of the training questions."""

    found: Questions
    size: Size
    teacher: MeanForSequenceClassification
    cache: StateCache

    def problem(self, seed: int, test: Mapping[str, Tensor] | None = None) -> Problem:
        """A student trained on labels alone, the start of every arm; judged on the test unless told otherwise."""
        small = student(self.teacher, seed)
        for _ in train(small, self.found.train, self.size.batch, self.size.start_epochs, START_RATE, seed):
            pass
        return Problem(
            self.teacher, small, self.found.train, self.found.test if test is None else test, self.cache,
            batch=self.size.batch, epochs=self.size.epochs, rate=RATE, kd_weight=KD_WEIGHT, filter_epochs=5,
        )  # fmt: skip


def setting(size: Size = SIZES["quick"], seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Setting:
    """Fine-tune the teacher and keep what it shows of the training questions."""
    _, tokenizer = models.load("minilm-l6")
    found = questions(tokenizer, size)
    model = teacher(found, size, seed, say)
    return Setting(found, size, model, keep_states(model, student(model), found.train))

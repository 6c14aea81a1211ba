"""The second stage's loss: the student matches what the task needs of the teacher's states, and its output (1.3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zq_lib.ted import heads
from zq_lib.ted.cache import look
from zq_lib.ted.config import TedConfig
from zq_lib.ted.divergence import divergence
from zq_lib.ted.filtered import filtered_error
from zq_lib.ted.filters import TaskFilters
from zq_lib.ted.layers import Batch, Seen, bare, mask_of, pooled_positions


@dataclass(frozen=True)
class Terms:
    """L_II and what it is made of, before their weights: scalars, and `errors` [K] of the pairs after scaling."""

    total: Tensor
    task: Tensor
    kd: Tensor
    layer: Tensor
    errors: Tensor


class TedLoss(nn.Module):
    """task_weight L_task + kd_weight L_KD + layer_weight 1/K sum_k |F_s(H_s) - F_t(H_t)|^2 (equation of stage II).

    Its parameters are copies of the student's filters, which train on with the student: give both to the optimiser. The
    teacher, its filters and all heads are no part of this module. Weights of 0 make it plain distillation
    (`layer_weight=0`) or fine-tuning, and need no filters.

    >>> ted = TedLoss(teacher, teacher_filters, student_filters, config)
    >>> optimizer = torch.optim.AdamW([*student.parameters(), *ted.parameters()])
    >>> seen = see(student, batch, ted.layers)
    >>> ted(seen, batch).total.backward()
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        teacher_filters: TaskFilters | None = None,
        student_filters: TaskFilters | None = None,
        config: TedConfig | None = None,
        *,
        task: str | None = None,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        allow_untrained: bool = False,
    ) -> None:
        """`teacher` may be None where every call brings what it shows. `task` is one of `heads.TASKS`, by default that
        of the filters or the teacher. `tokenizers` of student and teacher are compared word by word if given; otherwise
        the sizes of the vocabularies are.

        Raises ValueError for filters that do not fit each other, are missing, untrained or of unknown scale, and for
        models that read the same numbers as other words.
        """
        super().__init__()
        self.config = config or (student_filters.config if student_filters is not None else TedConfig())
        self._teacher = (None if teacher is None else bare(teacher), teacher_filters)
        self.layers: tuple[int, ...] = ()
        self.teacher_layers: tuple[int, ...] = ()
        if self.config.layer_weight:
            _check_filters(teacher_filters, student_filters, self.config, allow_untrained)
            self.layers, self.teacher_layers = student_filters.layers, teacher_filters.layers
            self.filters = copy.deepcopy(student_filters.filters).requires_grad_(self.config.train_filters)
            scaled = self.config.scale == "variance"
            scale = teacher_filters.variance if scaled else torch.ones(len(self.layers))
            self.register_buffer("scale", scale.float())
            task = task or teacher_filters.task
            if tokenizers is None:
                _check_vocabularies(student_filters.model, teacher_filters.model)
        if tokenizers is not None:
            check_tokenizers(*tokenizers)
        if task is None:
            if teacher is None:
                raise ValueError("teacher=None and no filters: give task, so that the loss knows what the logits mean")
            task = heads.task_of(self.teacher)
        self.task = task

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model that is learnt from."""
        return self._teacher[0]

    def forward(self, student: Seen, batch: Batch, teacher: Seen | None = None, overwrite: bool = False) -> Terms:
        """The loss of a batch, for what `see` showed of the student at `layers`.

        `teacher` is what it shows of the same batch at `teacher_layers`, for instance `cache.seen(batch)`; by default
        the teacher is run. It gets no gradient. `overwrite` uses up a language model's logits, see `divergence`.

        Raises ValueError for a teacher in train mode or whose numbers are not finite, outputs that do not fit, rows of
        padding alone and labels that are missing.
        """
        zero = (student.logits if student.logits is not None else student.states[0]).new_zeros((), dtype=torch.float32)
        task = self._task(student, batch) if self.config.task_weight else zero
        kd, layer, errors = zero, zero, zero.new_zeros(len(self.layers))
        if self.config.kd_weight or self.config.layer_weight:
            teacher = self._look(batch) if teacher is None else teacher
        if self.config.kd_weight:
            kd = self._kd(student, batch, teacher, overwrite)
        if self.config.layer_weight:
            errors = self._errors(student, batch, teacher)
            layer = errors.mean()
        total = self.config.task_weight * task + self.config.kd_weight * kd + self.config.layer_weight * layer
        if not bool(torch.isfinite(total)):
            _explain(student, teacher, kd)
        return Terms(total, *(x.detach() for x in (task, kd, layer, errors)))

    def _look(self, batch: Batch) -> Seen:
        if self.teacher is None:
            raise ValueError("this loss has no teacher; give what it shows of the batch, teacher=cache.seen(batch)")
        if self.teacher.training:
            raise ValueError("the teacher is in train mode, where dropout would be copied too; call teacher.eval()")
        return look(self.teacher, batch, self.teacher_layers, logits=bool(self.config.kd_weight))

    def _task(self, student: Seen, batch: Batch) -> Tensor:
        if student.loss is None:
            raise ValueError("the student gave no loss; add labels to the batch, or set task_weight=0")
        if self.task == "span":  # transformers' own counts padding among the places where an answer may begin
            return heads.head_loss(
                "span", heads.without_padding(student.logits, mask_of(batch, student.logits.shape[:2])), batch
            )
        return student.loss

    def _kd(self, student: Seen, batch: Batch, teacher: Seen, overwrite: bool) -> Tensor:
        config, s, t = self.config, student.logits, teacher.logits
        if s is None or t is None:
            raise ValueError(
                f"the {'student' if s is None else 'teacher'} shows no logits; give a model with a head, keep logits "
                "in the cache, or set kd_weight=0"
            )
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(
                f"the student has {s.shape[-1]} outputs and the teacher {t.shape[-1]}; give both the same classes or "
                "vocabulary (model.resize_token_embeddings), or set kd_weight=0"
            )
        keep = None
        if self.task == "span":  # a distribution over the positions, for the start and for the end
            mask = mask_of(batch, s.shape[:2])
            s, t = (heads.without_padding(x, mask).transpose(1, 2) for x in (s, t))
        elif s.dim() == 3:
            keep = heads.rows_with_labels(self.task, batch.get("labels"), mask_of(batch, s.shape[:2]))
        return divergence(
            s, t, kind="mse" if s.shape[-1] == 1 else config.kd, temperature=config.temperature,
            squared=config.temperature_squared, beta=config.beta, keep=keep,
            overwrite=overwrite and self.task == "language", backend=config.backend,
        )  # fmt: skip

    def _errors(self, student: Seen, batch: Batch, teacher: Seen) -> Tensor:
        keep = mask_of(batch, student.states[0].shape[:2])
        of_teacher = self._teacher[1]
        if self.config.positions == "pooled":
            keep = pooled_positions(keep, of_teacher.pool)
        with torch.no_grad():
            target = of_teacher.filtered(teacher.states)
        own = [f.filtered(h) for f, h in zip(self.filters, student.states, strict=True)]
        return filtered_error(own, target, keep, self.config.backend) / self.scale


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both give every word the same number: one batch is read by both models."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        word = min((w for w in own.keys() | other.keys() if own.get(w) != other.get(w)), key=lambda w: (len(w), w))
        raise ValueError(
            f"the tokenizers differ: {word!r} is {own.get(word)} for the student and {other.get(word)} for the "
            "teacher, but one batch is read by both; use a student with the teacher's tokenizer"
        )


def _check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    own, other = (getattr(model.config, "vocab_size", None) for model in (student, teacher))
    if own != other:
        raise ValueError(
            f"the student's vocabulary has {own} words and the teacher's {other}, so they read one batch differently; "
            "use one tokenizer, or give tokenizers=(student's, teacher's) if they are the same but for padding"
        )


def _check_filters(
    teacher: TaskFilters | None, student: TaskFilters | None, config: TedConfig, allow_untrained: bool
) -> None:
    if teacher is None or student is None:
        raise ValueError(
            "layer_weight is above 0 and needs filters of both models; make them with task_filters, or set 0"
        )
    if len(teacher.layers) != len(student.layers):
        raise ValueError(
            f"the teacher has {len(teacher.layers)} filters and the student {len(student.layers)}; make both with "
            "task_filters(teacher, student, config)"
        )
    if teacher.dim != student.dim:
        raise ValueError(
            f"the teacher's filters have width {teacher.dim} and the student's {student.dim}; make both with the same "
            "filter_dim"
        )
    for name, filters in (("teacher", teacher), ("student", student)):
        if filters.origin == "untrained" and not allow_untrained:
            raise ValueError(
                f"the {name}'s filters are untrained; run fit(filters, batches) first, or set allow_untrained=True"
            )
    if config.scale == "variance" and not bool((teacher.variance > 0).all()):
        raise ValueError(
            "scale='variance' but the variance of the teacher's filtered states is not known or 0; fit the filters, "
            "call measure, or set scale='none'"
        )


def _explain(student: Seen, teacher: Seen | None, kd: Tensor) -> None:
    """Say what is not finite, if it is the teacher or cannot be trained away; a student's overflow is the trainer's."""
    known = {} if teacher is None else {f"states of pair {k + 1}": h for k, h in enumerate(teacher.states)}
    if teacher is not None and teacher.logits is not None:
        known["logits"] = teacher.logits
    for name, t in known.items():
        if bool(t.isnan().any()):
            raise ValueError(f"the teacher's {name} hold NaN; check its weights and its precision, fp16 overflows")
    if bool(kd.isposinf()) and not bool(student.logits.isnan().any()):
        raise ValueError(
            "the divergence is infinite: the student rules out (-inf) a class that the teacher does not; mask the same "
            "classes in both"
        )

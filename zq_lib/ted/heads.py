"""Tasks, and the heads that solve them behind a filter. Heads serve the first stage alone (section 1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.activations import ACT2FN

from zq_lib.ted.layers import Batch, blocks, pool, width

TASKS = ("classification", "multi_label", "regression", "span", "token", "language")
PER_TOKEN = ("span", "token", "language")
IGNORED = -100  # a label that counts nowhere


def task_of(model: nn.Module) -> str:
    """The task that a transformers model's head is for, one of TASKS.

    Raises ValueError for a model without such a head.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith("ForSequenceClassification"):
        known = {"regression": "regression", "multi_label_classification": "multi_label"}
        return known.get(config.problem_type, "regression" if config.num_labels == 1 else "classification")
    for ending, task in (
        ("ForQuestionAnswering", "span"), ("ForTokenClassification", "token"), ("ForCausalLM", "language"),
        ("LMHeadModel", "language"),
    ):  # fmt: skip
        if name.endswith(ending):
            return task
    raise ValueError(
        f"model={name} does not say its task; use a model with a head, such as ...ForSequenceClassification or "
        f"...ForCausalLM, or give task, one of {', '.join(TASKS)}"
    )


def pool_of(model: nn.Module, task: str, pool: str) -> str:
    """What the head of a model reads where `pool` is "auto": a token's state, the first or last token's, or the mean.

    Raises ValueError for a setting that does not fit the task.
    """
    if pool == "auto":
        if task in PER_TOKEN:
            return "token"
        if hasattr(model, "score"):  # what transformers' decoders call a classifier, which reads the last token
            return "last"
        return "mean" if getattr(model.config, "classifier_pooling", "cls") == "mean" else "first"
    if (pool == "token") != (task in PER_TOKEN):
        fits = "token" if task in PER_TOKEN else "first, mean or last"
        raise ValueError(f"pool={pool!r} does not fit the task {task!r}; use {fits}, or auto")
    return pool


class PooledHead(nn.Module):
    """The pooler's recipe at width d_f, then one linear layer: a row's filtered states to [B, classes].

    For the last token there is no pooler, as in the models that read it.
    """

    def __init__(self, dim: int, classes: int, pool: str, act: str, dropout: float) -> None:
        super().__init__()
        self.pool = pool
        self.dense = nn.Sequential() if pool == "last" else nn.Sequential(nn.Linear(dim, dim), ACT2FN[act])
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(dim, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, d_f] -> [B, classes]"""
        return self.out(self.dropout(self.dense(pooled)))


class TokenHead(nn.Module):
    """A linear layer for every token: [..., d_f] -> [..., classes]; two classes are start and end of a span."""

    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(dim, classes)

    def forward(self, filtered: Tensor) -> Tensor:
        """[..., d_f] -> [..., classes]"""
        return self.out(self.dropout(filtered))


class LanguageHead(nn.Module):
    """The model's own final norm and unembedding, frozen, so that a filter before it is a tuned lens (section 1.2).

    Filtered states of another width than the model's pass through a linear layer first, which trains.
    """

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.bridge = nn.Identity() if dim == width(model) else nn.Linear(dim, width(model), bias=False)
        self._frozen = (final_norm(model), model.get_output_embeddings())  # a tuple: no part of this module
        self._cap = getattr(model.config, "final_logit_softcapping", None)

    def forward(self, filtered: Tensor) -> Tensor:
        """[..., d_f] -> [..., V]"""
        x = self.bridge(filtered)
        for module in self._frozen:
            x = x.to(next(module.parameters()).dtype)
            x = functional_call(module, {n: p.detach() for n, p in module.named_parameters()}, (x,))
        return x if self._cap is None else torch.tanh(x / self._cap) * self._cap


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between a decoder's last block and its unembedding. Raises ValueError for a model without one."""
    stack = blocks(model)
    for parent in model.modules():
        if any(child is stack for child in parent.children()):
            for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
                if isinstance(found := getattr(parent, name, None), nn.Module):
                    return found
    raise ValueError(
        f"model={type(model).__name__} has no final norm that is known; the first stage of a language model needs a "
        "decoder such as Llama, Qwen2, GPT-2, OPT, GPT-NeoX or Gemma"
    )


def make_head(model: nn.Module, task: str, dim: int, pool: str, dropout: float) -> nn.Module:
    """A head for states filtered to width `dim`, with the model's activation and as many outputs as the task has."""
    if task == "language":
        return LanguageHead(model, dim)
    if task in PER_TOKEN:
        return TokenHead(dim, 2 if task == "span" else model.config.num_labels, dropout)
    config = model.config
    act = getattr(config, "pooler_hidden_act", None) or getattr(config, "classifier_activation", None) or "tanh"
    return PooledHead(dim, 1 if task == "regression" else config.num_labels, pool, act, dropout)


def without_padding(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, S, 2] of a span, -inf where `mask` [B, S] has no token."""
    return logits.masked_fill(~mask[..., None], -torch.inf)


def rows_with_labels(task: str, labels: Tensor | None, mask: Tensor) -> Tensor:
    """The positions whose output counts, [B, S] bool: position i of a language model counts if label i + 1 does.

    Without labels every token does.
    """
    if labels is None or task == "span":
        return mask
    wanted = mask & (labels != IGNORED)
    if task == "language":
        wanted = mask & F.pad(wanted[:, 1:], (0, 1))
    return wanted


def head_loss(task: str, logits: Tensor, batch: Batch) -> Tensor:
    """The task's loss, a scalar, for a head's `logits` [B, classes] or [B, S, classes] and the batch's labels.

    An answer that was cut off with the text counts nowhere, as in transformers.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if task == "span":
        wanted = [batch[key].clamp(0, logits.shape[1]) for key in ("start_positions", "end_positions")]
        ends = [F.cross_entropy(logits[..., i], y, ignore_index=logits.shape[1]) for i, y in enumerate(wanted)]
        return (ends[0] + ends[1]) / 2
    labels = batch["labels"]
    if task == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def head_accuracy(task: str, logits: Tensor, batch: Batch) -> tuple[int, int]:
    """Right answers, and all of those that `head_loss` takes. A span needs both ends right; a regression has none."""
    if task == "regression":
        return 0, len(logits)
    if task == "span":
        right = (logits.argmax(1) == torch.stack([batch["start_positions"], batch["end_positions"]], 1)).all(1)
        return int(right.sum()), len(right)
    labels = batch["labels"]
    if task == "multi_label":
        right = (logits > 0) == labels.bool()
        return int(right.sum()), right.numel()
    counts = labels != IGNORED
    return int((logits.argmax(-1) == labels)[counts].sum()), int(counts.sum())


def read(task: str, head: nn.Module, filter_: nn.Module, hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """head(pool(filter(H))), [B, classes] or [B, S, classes]. Padding is no answer to where a span begins."""
    if how == "token":
        logits = head(filter_(hidden))
        return without_padding(logits, mask) if task == "span" else logits
    if how == "mean":
        return head(pool(filter_(hidden), mask, how))
    return head(filter_(pool(hidden, mask, how)))  # a filter sees one token at a time, so one is enough

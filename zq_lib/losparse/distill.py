"""The second stage: a compressed student learns from the dense model what it says and what it thinks on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DistillationLoss(nn.Module):
    """alpha_out T^2 KL(teacher || student) + alpha_layer sum_l MSE(h_l^student, h_l^teacher) (section 4.4).

    To be added to the task's loss, while rows are dropped or afterwards. Any number of layers: the states
    are transformers' `hidden_states`, the embeddings' output first, of equal width C because LoSparse does not change
    it.

    alpha_out, alpha_layer   weights of the two terms; one with weight 0 is not computed.
    temperature              T of the softmax in the first.
    layer_map                "fixed": layer l learns from layer l. "nearest": each of the teacher's layers is matched to
                             the student's layer that is nearest to it at the moment, through a learned map [C, C] that
                             starts as the identity; give `width` C, and this module's parameters to the optimiser.
    layers                   which of the teacher's states count, by index; None is all.

    >>> loss = output.loss + distil(output, teacher_output, batch["attention_mask"])
    """

    def __init__(
        self,
        alpha_out: float = 0.0,
        alpha_layer: float = 15.0,
        temperature: float = 2.0,
        layer_map: str = "fixed",
        layers: Sequence[int] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if layer_map not in ("fixed", "nearest"):
            raise ValueError(f"layer_map={layer_map!r} is not known; choose one of fixed, nearest")
        if min(alpha_out, alpha_layer) < 0 or alpha_out + alpha_layer == 0:
            raise ValueError(
                f"alpha_out={alpha_out} and alpha_layer={alpha_layer} must be at least 0 and not both 0; the paper "
                "has 0 and 15"
            )
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0; the usual one is 2")
        if layer_map == "nearest" and alpha_layer and width is None:
            raise ValueError("layer_map='nearest' learns a map between states; give their width, config.hidden_size")
        self.alpha_out, self.alpha_layer, self.temperature = alpha_out, alpha_layer, temperature
        self.layer_map, self.layers = layer_map, layers
        self.map: nn.Linear | None = None
        if layer_map == "nearest" and alpha_layer:
            self.map = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.map.weight)

    def forward(self, student: object, teacher: object, mask: Tensor | None = None) -> Tensor:
        """The loss for two outputs with `logits` [B, classes] or [B, T, V] and, for the layers, `hidden_states`.

        `mask` [B, T] is 1 for tokens and 0 for padding, which counts nowhere. The teacher gets no gradient. Raises
        ValueError for outputs without states, or with states that do not fit.
        """
        total = student.logits.new_zeros(())
        if self.alpha_out:
            total = total + self.alpha_out * self._divergence(student.logits, teacher.logits.detach(), mask)
        if self.alpha_layer:
            total = total + self.alpha_layer * self._layers(_states(student), _states(teacher), mask)
        return total

    def _divergence(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        t, s = (F.log_softmax(z.float() / self.temperature, -1) for z in (teacher, student))
        rows = (t.exp() * (t - s)).sum(-1)  # [B] or [B, T]
        return _mean(rows, mask if rows.dim() == 2 else None) * self.temperature**2

    def _layers(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        chosen = range(len(teacher)) if self.layers is None else self.layers
        if (self.layer_map == "fixed" and len(student) != len(teacher)) or max(chosen) >= len(teacher):
            raise ValueError(
                f"the teacher has {len(teacher)} states and the student {len(student)}; layers={self.layers!r} with "
                f"layer_map={self.layer_map!r} does not fit them, use layer_map='nearest' or other layers"
            )
        if student[0].shape != teacher[0].shape:
            raise ValueError(
                f"the student's states have shape {tuple(student[0].shape)} and the teacher's {tuple(teacher[0].shape)}"
                "; give both the same batch, and a teacher of the same width"
            )
        if self.layer_map == "fixed":
            return sum(_error(student[i], teacher[i], mask) for i in chosen)
        mapped = [self.map(h) for h in student]
        return sum(torch.stack([_error(h, teacher[i], mask) for h in mapped]).min() for i in chosen)


def _error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference of two states [B, T, C] over the tokens that count."""
    return _mean((student - teacher.detach()).float().square().mean(-1), mask)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    weight = mask.to(rows.dtype)
    return (rows * weight).sum() / weight.sum().clamp_min(1)


def _states(output: object) -> Sequence[Tensor]:
    states = getattr(output, "hidden_states", None)
    if not states:
        raise ValueError("the output has no hidden_states; call the model with output_hidden_states=True")
    return states

"""Which pairs are suspected, how strongly, and what the report must not be read as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zq_lib.core.distributed import processes
from zq_lib.r3m.config import check_lam
from zq_lib.r3m.loss import outlier_offset
from zq_lib.r3m.losses import cutoff


class Suspect(NamedTuple):
    """A flagged pair: its index, margin and offset, and `doubt`, the probability 1 - sigma(margin) that a Bradley-Terry
    annotator with the model's rewards would have labelled it the other way."""

    index: int
    margin: float
    offset: float
    doubt: float


class Detection(NamedTuple):
    """The flags against the truth. `auroc` is that of the order alone, whatever the threshold; nan if all or none of
    the labels are wrong."""

    precision: float
    recall: float
    f1: float
    auroc: float


@dataclass(frozen=True)
class OutlierReport:
    """The flagged pairs among `pairs`, the strongest offset first, at `lam` and its cut-off.

    `accuracy` is the share of pairs that the model ranks as they are labelled. Rewards of R3M are scaled up, so `doubt`
    is an order rather than a calibrated probability.
    """

    lam: float
    cutoff: float
    pairs: int
    accuracy: float
    suspects: tuple[Suspect, ...]
    margins: tuple[float, ...]
    indices: tuple[int, ...]

    @property
    def flagged(self) -> int:
        """How many pairs have a positive offset."""
        return len(self.suspects)

    @property
    def share(self) -> float:
        """Their share."""
        return self.flagged / self.pairs

    @property
    def note(self) -> str:
        """What the share means when it means something else than it seems to; '' otherwise."""
        if not self.flagged:
            return (
                f"0 flagged: no margin lies below {self.cutoff:.3g}, so at lam={self.lam:g} the loss is cross-entropy "
                "on these pairs; a smaller lam flags more"
            )
        if self.share > 0.5:
            return (
                f"{self.share:.0%} flagged: the model ranks few pairs clearly, as at its beginning, or half of the "
                "labels contradict the rest; no loss can tell which half lies"
            )
        return ""

    def against(self, is_outlier: Tensor) -> Detection:
        """Precision, recall, F1 and AUROC of the flags, for the truth [n] by pair index."""
        if is_outlier.dim() != 1 or len(is_outlier) <= max(self.indices):
            raise ValueError(
                f"is_outlier has shape {tuple(is_outlier.shape)} but the report has a pair with index "
                f"{max(self.indices)}; give one truth for each pair of the data set"
            )
        truth = is_outlier.bool().cpu()[torch.tensor(self.indices)]
        margin = torch.tensor(self.margins, dtype=torch.float64)
        flagged = margin < self.cutoff
        hits, wrong, right = int((flagged & truth).sum()), int(truth.sum()), int((~truth).sum())
        precision = hits / int(flagged.sum()) if flagged.any() else 0.0
        recall = hits / wrong if wrong else 0.0
        f1 = 2 * hits / (int(flagged.sum()) + wrong) if hits else 0.0
        return Detection(precision, recall, f1, _auroc(-margin, truth) if wrong and right else float("nan"))

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self) | {"suspects": [s._asdict() for s in self.suspects]})


def outlier_report(
    margins: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor] | None = None, *, lam: float
) -> OutlierReport:
    """Build a report from the margins [n] of labelled pairs, or those of batch after batch.

    `indices` name the pairs in the data set; without them they are 0 ... n - 1. In several processes each gives its own
    margins with indices, and all get the report on all; a pair that appears twice, as samplers pad with, counts once.

    Raises ValueError for no pairs, for margins that are not finite and for indices that do not fit.

    >>> outlier_report(torch.tensor([2.0, -3.0, 0.5]), lam=0.5).suspects[0].index
    1
    """
    check_lam(lam)
    margin = _joined(margins).detach().double().cpu()
    if indices is None:
        if processes() > 1:
            raise ValueError("indices is missing; processes need them to tell their pairs from each other's")
        index = torch.arange(len(margin))
    else:
        index = _joined(indices).cpu()
    if margin.shape != index.shape or margin.dim() != 1:
        raise ValueError(
            f"margins have shape {tuple(margin.shape)} and indices {tuple(index.shape)}; give one index for each pair"
        )
    if processes() > 1:
        found: list = [None] * processes()
        dist.all_gather_object(found, (margin, index))
        margin, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not len(margin):
        raise ValueError("margins is empty, and an empty report says nothing; give the margins of at least one pair")
    if not bool(margin.isfinite().all()):
        raise ValueError(f"the margin of pair {int(index[~margin.isfinite()][0])} is not finite; its rewards overflow")
    seen: dict[int, float] = dict(zip(index.tolist(), margin.tolist(), strict=True))
    index, margin = torch.tensor(list(seen)), torch.tensor(list(seen.values()), dtype=torch.float64)
    offset, doubt = outlier_offset(margin, lam), torch.sigmoid(-margin)
    order = [i for i in margin.argsort(stable=True).tolist() if offset[i] > 0]
    suspects = tuple(Suspect(int(index[i]), float(margin[i]), float(offset[i]), float(doubt[i])) for i in order)
    return OutlierReport(
        lam, cutoff(lam), len(margin), float((margin > 0).double().mean()), suspects, tuple(margin.tolist()),
        tuple(index.tolist()),
    )  # fmt: skip


def _joined(values: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.cat(list(values)) if len(values) else torch.empty(0)


def _auroc(score: Tensor, truth: Tensor) -> float:
    """The probability that a wrong label scores above a right one, ties counting half."""
    right, _ = score[~truth].sort()
    wrong = score[truth].contiguous()
    below = torch.searchsorted(right, wrong) + torch.searchsorted(right, wrong, right=True)
    return float(below.double().mean() / 2 / len(right))

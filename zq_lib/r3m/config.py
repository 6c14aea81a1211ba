"""R3M's settings. Each one checks itself and says what would do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from zq_lib.r3m.losses import LOSSES, Rule

BACKENDS = ("auto", "torch", "triton")
AUTO = "auto"


class PaperTask(NamedTuple):
    """The grids of one experiment of the paper (appendices B and C). It does not say which point of them won."""

    batch: tuple[int, ...]
    epochs: tuple[int, ...]
    learning_rate: tuple[float, ...]
    beta: tuple[float, ...]
    lam: tuple[float, ...]


_ROBOT = PaperTask((8, 16, 64), (1, 3, 5), (1e-2, 5e-3, 1e-3), (), tuple(k / 10 for k in range(1, 10)))
PAPER_TASKS: dict[str, PaperTask] = {
    "halfcheetah": _ROBOT,
    "ant": _ROBOT,
    "hopper": _ROBOT._replace(learning_rate=(1e-2,)),
    "summarization": PaperTask((32,), (1,), (5e-6, 5e-5, 1e-4, 5e-4), (0.01, 0.1, 0.3, 0.5), (0.65, 0.75, 0.85)),
    "dialogue": PaperTask((32,), (1,), (5e-6, 5e-5, 1e-4), (0.01, 0.1, 0.3), (0.75, 0.8, 0.85)),
}


@dataclass(frozen=True)
class R3MConfig:
    """Which loss a preference has, and with which numbers (section 3).

    lam             the price of one unit of offset in the loss of a pair (3.3), in (0, 1]. The smaller, the less one
                    pair can pull: its slope is never above lam. 1 is plain Bradley-Terry. "auto" chooses it: by
                    `outlier_budget` while training, or before with `select_lambda`. The lambda of (3.2) is lam / n.
    outlier_budget  the share of labels that are believed to be wrong; with lam="auto" the cut-off follows that quantile
                    of the margins.
    momentum        of that quantile's moving average.
    loss            "r3m", or a peer: "cross_entropy" (of a policy "dpo"), "label_smoothing" ("cdpo"), "rdpo", "ipo",
                    "hinge", "ropo".
    beta            DPO's scale of the implicit reward. Offsets live in its units: another beta flags other pairs.
    average         DPO with log-probabilities per token, as IPO's authors use them, instead of their sum.
    epsilon         share of wrong labels that label smoothing (cDPO) and rDPO are told, below 0.5.
    tau             IPO's strength.
    alpha           ROPO's weight of its bounded term, at least 1.
    gamma           discount of the steps of a segment; 1 for short ones.
    backend         "auto", "torch" or "triton".
    """

    lam: float | str = 0.5
    outlier_budget: float | None = None
    momentum: float = 0.9
    loss: str = "r3m"
    beta: float = 0.1
    average: bool = False
    epsilon: float = 0.1
    tau: float = 0.1
    alpha: float = 14.0
    gamma: float = 1.0
    backend: str = AUTO

    def __post_init__(self) -> None:
        for name, allowed in (("loss", tuple(LOSSES)), ("backend", BACKENDS), ("average", (True, False))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(map(str, allowed))}"
                )
        self._check_lam()
        for name in ("beta", "tau"):
            if not _number(value := getattr(self, name)) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a number above 0; the usual one is 0.1")
        if not _number(self.alpha) or self.alpha < 1:
            raise ValueError(f"alpha={self.alpha!r} must be a number of at least 1; a usual one is 14")
        if not _number(self.epsilon) or not 0 <= self.epsilon < 0.5:
            raise ValueError(
                f"epsilon={self.epsilon!r} must be at least 0 and below 0.5; with half of the labels wrong they say "
                "nothing"
            )
        if not _number(self.gamma) or not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must be above 0 and at most 1; use 1 for short segments")
        if not _number(self.momentum) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r} must be at least 0 and below 1; the usual one is 0.9")

    def _check_lam(self) -> None:
        if self.lam != AUTO:
            check_lam(self.lam)
            if self.outlier_budget is not None:
                raise ValueError(
                    f"lam={self.lam!r} and outlier_budget={self.outlier_budget!r} both set the cut-off; leave one out, "
                    "or set lam='auto'"
                )
        elif self.outlier_budget is not None and (
            not _number(self.outlier_budget) or not 0 < self.outlier_budget < 0.5
        ):
            raise ValueError(
                f"outlier_budget={self.outlier_budget!r} must lie between 0 and 0.5: the share of wrong labels; with "
                "half of them wrong they say nothing"
            )

    def rule(self, beta: float = 1.0) -> Rule:
        """The loss as the kernels and the chunked path take it. Raises ValueError while `lam` is still to be chosen."""
        if self.lam == AUTO and self.outlier_budget is None and self.loss == "r3m":
            raise ValueError(
                "lam='auto' has to be chosen first: call select_lambda and set its lam, or give outlier_budget, the "
                "share of labels that you believe are wrong"
            )
        lam = 1.0 if self.lam == AUTO else float(self.lam)
        return Rule(self.loss, lam, self.epsilon, self.tau, self.alpha, beta)

    def to_json(self) -> str:
        """All settings as JSON; `from_json` reads them back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for a setting that does not exist."""
        found: dict[str, Any] = json.loads(text)
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ValueError(f"{unknown[0]!r} is no setting of R3MConfig; remove it")
        return cls(**found)

    @classmethod
    def quick(cls, lam: float = 0.3) -> Self:
        """The lab's setting: a cut-off that also bends for pairs ranked rightly by a small margin."""
        return cls(lam=lam)

    @classmethod
    def paper(cls, task: str = "halfcheetah") -> Self:
        """The middle of the paper's grids for a task of `PAPER_TASKS`; which point won is not published."""
        if task not in PAPER_TASKS:
            raise ValueError(f"task={task!r} has no published grid; choose one of {', '.join(PAPER_TASKS)}")
        row = PAPER_TASKS[task]
        return cls(lam=row.lam[len(row.lam) // 2], **({"beta": 0.1} if row.beta else {}))


def check_lam(lam: Any) -> None:
    """Raise ValueError unless `lam` lies in (0, 1]."""
    if not _number(lam) or not 0 < lam <= 1:
        raise ValueError(
            f"lam={lam!r} must be above 0 and at most 1; 1 is plain Bradley-Terry (cross-entropy), no pair is ever "
            "flagged, and 0.5 flags the pairs that the model ranks wrongly"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

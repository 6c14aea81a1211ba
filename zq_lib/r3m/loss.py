"""R3M's loss in closed form: a logistic loss whose slope is capped at lam, without any state per pair (section 3).

Inserting the best offset (3.4) into the loss (3.3) leaves a function of the margin alone, linear below the cut-off.
Descending it is the paper's alternation with one step per offset, exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zq_lib.core.distributed import average_over_processes
from zq_lib.r3m.config import R3MConfig
from zq_lib.r3m.losses import Rule, cutoff, value_and_slope

REDUCTIONS = ("mean", "sum", "none")


def outlier_offset(margin: Tensor, lam: float) -> Tensor:
    """delta* = max(log(1 / lam - 1) - margin, 0) (3.4), [B]; 0 from lam = 1 on. A positive one flags the pair.

    >>> outlier_offset(torch.tensor([-3.0, 2.0]), lam=0.25)
    tensor([4.0986, 0.0000])
    """
    _check_positive(lam)
    return (cutoff(lam) - margin).clamp(min=0) if lam < 1 else torch.zeros_like(margin)


def preference_loss(margin: Tensor, lam: float = 0.5, reduction: str = "mean", rule: Rule | None = None) -> Tensor:
    """L_lambda of margins [B], with the slope -min(lam, sigma(-margin)); "mean" or "sum" over pairs, or "none".

    Half precision is computed in fp32. From lam = 1 on this is -log sigma(margin) to the last bit. `rule` asks for one
    of the peers instead.

    Raises ValueError for lam <= 0, for no pairs, and for margins that are not finite, as overflowing rewards have.

    >>> preference_loss(torch.tensor([-1.0]), lam=0.2)
    tensor(0.7004)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}")
    if rule is None:
        _check_positive(lam)
        rule = Rule(lam=lam)
    check_margin(margin)
    margin = full(margin)
    value = _capped(margin, rule.lam) if rule.loss == "r3m" else _Peer.apply(margin, rule)
    return value.mean() if reduction == "mean" else value.sum() if reduction == "sum" else value


def full(values: Tensor) -> Tensor:
    """Half precision as fp32; anything else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _capped(margin: Tensor, lam: float) -> Tensor:
    """-log sigma(max(m, c)) + lam max(c - m, 0): each term has its slope on its own side of c and 0 on the other.

    Autograd's own operations take half the time of a function of ours, which a small reward model would feel.
    """
    if lam >= 1:
        return -F.logsigmoid(margin)
    c = cutoff(lam)
    return -torch.sub(F.logsigmoid(margin.clamp(min=c)), F.relu(c - margin), alpha=lam)


class _Peer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, margin: Tensor, rule: Rule) -> Tensor:
        value, slope = value_and_slope(margin, rule)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * outer, None


def check_margin(margin: Tensor) -> None:
    """Raise ValueError for margins that are not [B] with B >= 1, or not finite."""
    if margin.dim() != 1 or not len(margin):
        raise ValueError(f"the margins have shape {tuple(margin.shape)}; give one for each of at least one pair, [B]")
    if not math.isfinite(float(margin.detach().sum())) and not bool(margin.isfinite().all()):  # the sum may overflow
        pair = int((~margin.isfinite()).nonzero()[0])
        raise ValueError(
            f"the margin of pair {pair} is {float(margin.detach()[pair])}: its rewards overflow or hold NaN; lower the "
            "learning rate, clip gradients, or compute rewards in fp32"
        )


def _check_positive(lam: float) -> None:
    if not lam > 0:
        raise ValueError(f"lam={lam!r} must be above 0; 1 is plain Bradley-Terry, where no pair is flagged")


class PreferenceLoss(nn.Module):
    """The config's loss of margins, whose cut-off may follow a quantile of them."""

    def __init__(self, config: R3MConfig | None, scaled: bool) -> None:
        super().__init__()
        self.config = config or R3MConfig()
        self._rule = self.config.rule(self.config.beta if scaled else 1.0)
        self.budget = None if self.config.outlier_budget is None else OutlierBudget(
            self.config.outlier_budget, self.config.momentum
        )  # fmt: skip

    @property
    def lam(self) -> float:
        """The price of an offset at present; 1 before the first margins of an outlier budget."""
        return self._rule.lam if self.budget is None else self.budget.lam

    @property
    def rule(self) -> Rule:
        """The loss at present, with its numbers."""
        return self._rule if self.budget is None else self._rule._replace(lam=self.budget.lam)

    def of_margins(self, margin: Tensor) -> Tensor:
        """Mean loss of margins [B]. In train mode they move the cut-off of an outlier budget, for those after them."""
        value = preference_loss(margin, rule=self.rule)
        self.follow(margin)
        return value

    def follow(self, margin: Tensor) -> None:
        """Let the cut-off of an outlier budget, in train mode, follow margins [B] that were judged."""
        if self.budget is not None and self.training:
            self.budget.update(margin)


class RobustRewardLoss(PreferenceLoss):
    """The loss of rewards, or one of its peers, as a module. It has no parameters, and a state only with an outlier
    budget: one number.

    >>> loss = RobustRewardLoss(R3MConfig(lam=0.3))
    >>> loss(model(chosen), model(rejected)).backward()
    """

    def __init__(self, config: R3MConfig | None = None) -> None:
        super().__init__(config, scaled=False)

    def margin(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Reward of the chosen minus that of the rejected, [B], in fp32 at least."""
        if chosen.shape != rejected.shape or chosen.dim() != 1:
            raise ValueError(
                f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}; give one reward for "
                "each side of each pair, [B]"
            )
        return full(chosen) - full(rejected)

    def forward(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Mean loss over pairs, for rewards [B] of both sides."""
        return self.of_margins(self.margin(chosen, rejected))


class RobustDPOLoss(PreferenceLoss):
    """The loss of a policy's implicit rewards beta (log pi - log pi_ref), or one of its peers, as a module.

    >>> loss = RobustDPOLoss(R3MConfig(lam=0.75, beta=0.1))
    >>> loss(policy_logps, reference_logps).backward()
    """

    def __init__(self, config: R3MConfig | None = None) -> None:
        super().__init__(config, scaled=True)

    def margin(self, policy: Tensor, reference: Tensor) -> Tensor:
        """m = beta (h_w - h_l), [B], for log-probabilities [2B] of both models, the chosen first."""
        if policy.shape != reference.shape or policy.dim() != 1 or len(policy) % 2:
            raise ValueError(
                f"the policy's log-probabilities have shape {tuple(policy.shape)} and the reference's "
                f"{tuple(reference.shape)}; give [2B] of both, the chosen first"
            )
        chosen, rejected = (full(policy) - full(reference.detach())).chunk(2)
        return self.config.beta * (chosen - rejected)

    def forward(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Mean loss over pairs, for log-probabilities [2B] of both models; the reference gets no gradient."""
        return self.of_margins(self.margin(policy, reference))


class OutlierBudget(nn.Module):
    """A cut-off that follows the `share`-quantile of the margins, so that about that share of the pairs is flagged.

    lam = sigma(-quantile), with a moving average over batches and the mean over processes. Its one number is a buffer
    and goes into checkpoints. Unmeasured against the other ways to choose lam.
    """

    quantile: Tensor

    def __init__(self, share: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("quantile", torch.tensor(-math.inf))

    @property
    def lam(self) -> float:
        """sigma(-quantile), at least 1e-6; 1 before the first update."""
        return max(float(torch.sigmoid(-self.quantile)), 1e-6)

    def update(self, margin: Tensor) -> None:
        """Move the quantile towards that of the margins [B]."""
        found = average_over_processes(margin.detach().float().quantile(self.share))
        first = bool(self.quantile.isinf())
        self.quantile.copy_(found if first else self.momentum * self.quantile + (1 - self.momentum) * found)

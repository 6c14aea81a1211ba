"""What a training would do, before it does it: the budget over time, the parameters at the end, and what looks odd."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zq_lib.adalora.adapter import kind_of
from zq_lib.adalora.config import AdaLoraConfig
from zq_lib.adalora.schedule import Schedule
from zq_lib.adalora.targets import find_targets


@dataclass(frozen=True)
class Plan:
    """The dry run of a training.

    `layers` maps each layer to (N, K). `parameters` at the end depend on where the ranks will go: the least and the
    most that the budget allows. `warnings` are sentences; none of them stops a training.
    """

    layers: dict[str, tuple[int, int]]
    schedule: Schedule | None
    parameters_at_start: int
    parameters: tuple[int, int]
    warnings: tuple[str, ...]

    def budgets(self, points: int = 9) -> list[tuple[int, int]]:
        """(step, budget) at evenly spaced steps. Raises ValueError when the number of steps is not known."""
        if self.schedule is None:
            raise ValueError("the plan has no total_steps, so there is no schedule; give total_steps")
        last = self.schedule.total - 1
        steps = sorted({round(i * last / (points - 1)) for i in range(points)})
        return [(t, self.schedule.budget(t)) for t in steps]


def plan(model: nn.Module, config: AdaLoraConfig, total_steps: int | None = None) -> Plan:
    """Plan the training of `model` without touching it. Raises ValueError for targets that match nothing.

    >>> adalora.plan(model, AdaLoraConfig(total_steps=1000)).warnings
    ()
    """
    layers = {name: kind_of(m).size(m) for name, m in find_targets(model, config.targets).items()}
    costs = [n + k for n, k in layers.values()]
    total = config.total_steps if total_steps is None else total_steps
    in_parameters = config.budget_unit == "parameters"
    start = sum(c + 1 for c in costs) * config.init_rank
    if total is None:
        missing = "total_steps is missing: the schedule cannot run, unless AdaLoraCallback asks the Trainer for it"
        return Plan(layers, None, start, (0, start), (missing,))
    schedule = config.schedule(sum(costs) if in_parameters else len(costs), total)
    triplets = sorted(c + 1 for c in costs for _ in range(config.init_rank))
    if not schedule.prunes:
        ends = (start, start)
    elif in_parameters:
        ends = (0, schedule.target + config.init_rank * len(costs))
    else:
        ends = (sum(triplets[: schedule.target]), sum(triplets[-schedule.target :]) if schedule.target else 0)
    return Plan(layers, schedule, start, ends, tuple(_warnings(config, schedule)))


def _warnings(config: AdaLoraConfig, schedule: Schedule) -> list[str]:
    found = []
    if config.scale < 0.5:
        found.append(
            f"alpha / init_rank is {config.scale:.3g}: so small a scale learns little; compare methods at equal scale"
        )
    if not schedule.prunes:
        return [*found, "the final budget is not below the initial one, so no rank will be pruned"]
    if schedule.start < 1.5 * schedule.target:
        found.append("init_rank is less than 1.5 times the target, so ranks can hardly move; the paper uses 1.5")
    budget_phase = schedule.last - schedule.warmup
    if budget_phase < schedule.total / 4:
        found.append(
            f"the budget phase has {budget_phase} of {schedule.total} steps; about half of the training is advised"
        )
    if len(schedule.allocation_steps()) < 5:
        found.append(f"ranks are shared out only {len(schedule.allocation_steps())} times; shorten interval")
    if schedule.final < 0.1 * schedule.total:
        found.append(f"only {schedule.final} steps follow the last cut; the kept ranks need time to settle")
    return found

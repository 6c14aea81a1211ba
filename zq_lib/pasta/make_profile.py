"""Make the shipped head profiles of the embedded model: `python -m zq_lib.pasta.make_profile`.

Every head alone, exactly (the staircase), on the profiling split of each task; about ten minutes on one core. An
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zq_lib.core import models
from zq_lib.core.cache import root
from zq_lib.pasta import items
from zq_lib.pasta.profiling import Probe, score_heads

TASKS = {"conflict": items.conflict, "pick": items.pick}
SHIPPED = 10  # heads per profile


def probes(task: str) -> list[Probe]:
    """24 prompts of a task's profiling split. Pick has each prompt twice: the marked sentence alternates."""
    found = TASKS[task]("profile")
    if task == "pick":
        found = [found[2 * i + i % 2] for i in range(len(found) // 2)]
    return [Probe(i.prompt, i.target, i.competitor) for i in found]


def main(folder: Path = Path(__file__).parent / "data") -> None:
    """Write `profile_<task>.json` for every task into `folder`."""
    model, tokenizer = models.load("smollm2")

    def say(done: int, total: int) -> None:
        print(f"{task}: {done} of {total} prompts", file=sys.stderr, flush=True)

    for task in TASKS:
        scores = score_heads(
            model, tokenizer, probes(task), method="staircase", resume=root() / f"pasta_{task}.jsonl", progress=say
        )
        scores.profile(model, task, SHIPPED).save(folder / f"profile_{task}.json")


if __name__ == "__main__":
    main()

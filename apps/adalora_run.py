"""What the AdaLoRA page shows: one training as it happens, its rivals, and the adapter to take home. Library calls."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.adalora_settings import Settings, names
from zq_lib.adalora import RankTrace, lab, to_peft_adalora, to_peft_lora
from zq_lib.adalora.adaptation import Adaptation
from zq_lib.core.lab import Row
from zq_lib.ui.stored import rounded, write

STORED = Path(__file__).parent / "data" / "adalora.json"
KEPT = 32  # settings whose rivals are remembered
_RIVALS: dict[tuple[Any, ...], list[Row]] = {}


@dataclass
class Result:
    """Everything that the page says about one training; it grows while the training runs.

    `losses` are the task's and `penalties` gamma times the penalty, per step; `rows` are AdaLoRA and its rivals.
    """

    settings: Settings
    trace: RankTrace
    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def events(self) -> int:
        """Allocations so far."""
        return len(self.trace.keep)

    def ranks(self, event: int | None = None) -> dict[str, int]:
        """Rank of every matrix after the first `event` allocations, by default after all."""
        event = self.events if event is None else min(event, self.events)
        if event == 0:
            return dict.fromkeys(names(self.settings.problem), self.settings.init_rank)
        return dict(zip(self.trace.names, self.trace.keep[event - 1].sum(1).tolist(), strict=True))

    def step(self, event: int) -> int:
        """The step of the last of the first `event` allocations; before them, the last of the warm-up."""
        return self.trace.steps[min(event, self.events) - 1] if event and self.events else 0

    def row(self, method: str) -> Row | None:
        """What was measured of a method, if it was."""
        return next((r for r in self.rows if r["method"] == method), None)

    def to_data(self) -> dict[str, Any]:
        """JSON types only, floats to four digits."""
        trace = {
            **{name: rounded(getattr(self.trace, name)) for name in ("names", "steps", "budgets", "regrown")},
            **{name: rounded(getattr(self.trace, name)) for name in ("thresholds", "scores", "values")},
            "keep": [["".join("01"[int(on)] for on in matrix) for matrix in event] for event in self.trace.keep],
        }
        parts = {name: rounded(getattr(self, name)) for name in ("losses", "penalties", "rows")}
        return {"settings": rounded(asdict(self.settings)), "trace": trace, **parts}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Result:
        """What `to_data` gave."""
        found = data["trace"]
        trace = RankTrace(tuple(found["names"]), *(found[n] for n in ("steps", "budgets", "thresholds", "regrown")))
        for name in ("scores", "values"):
            setattr(trace, name, [np.array(event, np.float32) for event in found[name]])
        trace.keep = [np.array([[c == "1" for c in row] for row in event]) for event in found["keep"]]
        return cls(Settings(**data["settings"]), trace, data["losses"], data["penalties"], data["rows"])


@dataclass
class Moment:
    """How far a run is. `news` names what is new: "begun", "step", "cut" or "row"; `files` come with AdaLoRA's row."""

    said: str
    news: str
    done: float
    result: Result
    files: dict[str, bytes] = field(default_factory=dict)


@lru_cache(maxsize=4)
def problem(kind: str, plant: tuple[int, ...], seed: int, rate: float) -> lab.Problem:
    """A problem is built once; every run trains a copy of its model."""
    settings = Settings(problem=kind, plant=plant, seed=seed) if plant else Settings(problem=kind, seed=seed)
    made = lab.planted(seed, settings.size, settings.planted) if plant else lab.text(seed, settings.size)
    made.rate = rate
    return made


def watch(settings: Settings) -> Iterator[Moment]:
    """Train AdaLoRA and its rivals, and yield after every step; closing it ends the training."""
    s = settings
    result = Result(s, RankTrace(names(s.problem)))
    yield Moment("Building the problem", "begun", 0.02, result)
    own = problem(s.problem, s.plant if s.is_planted else (), s.seed, s.rate).copy()
    known = _RIVALS.get(s.rival)
    methods = (lab.ADALORA,) if known else (lab.ADALORA, lab.UNIFORM, lab.WIDE)
    total, seen = len(methods) * s.steps, 0
    for look in lab.watch(own, s.config, s.steps, s.seed, methods):
        files = {}
        if look.method == lab.ADALORA:
            result.trace = look.handle.trace
            if look.row is None:
                result.losses.append(look.loss)
                with torch.no_grad():
                    result.penalties.append(float(look.handle.penalty()))
            else:
                files = pack(look.handle, s)
        if look.row is not None:
            result.rows.append(look.row)
        news = "row" if look.row is not None else "cut" if result.events > seen else "step"
        seen = result.events
        at = methods.index(look.method) if look.method in methods else len(methods) - 1
        done = 0.05 + 0.95 * (at * s.steps + look.step + 1) / total
        yield Moment(f"{look.method}: step {look.step + 1} of {s.steps}", news, done, result, files)
    if known:
        result.rows += known
    else:
        while len(_RIVALS) >= KEPT:
            _RIVALS.pop(next(iter(_RIVALS)))
        _RIVALS[s.rival] = result.rows[1:]
    yield Moment("Done", "row", 1.0, result)


def train(settings: Settings) -> Result:
    """The result alone."""
    *_, last = watch(settings)
    return last.result


README = """This adapter was trained by zq_lib's AdaLoRA page. Its base model is `problem.model` of

    from zq_lib.adalora import lab
    problem = {problem}

and PEFT loads it with

    from peft import PeftModel
    model = PeftModel.from_pretrained(problem.model, "<this folder>")
"""


def pack(handle: Adaptation, settings: Settings) -> dict[str, bytes]:
    """The trained adapter in both PEFT formats, and the trace, as files by name. Nothing stays on disk."""
    s = settings
    made = f"lab.planted({s.seed}, lab.{s.size}, {s.planted})" if s.is_planted else f"lab.text({s.seed}, lab.{s.size})"
    writers: dict[str, Callable[[Adaptation, Path], Path]] = {"lora": to_peft_lora, "adalora": to_peft_adalora}
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in writers.items():
            target, packed = write(handle, Path(folder) / kind), io.BytesIO()
            (target / "README.md").write_text(README.format(problem=made), encoding="utf-8")
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(target.iterdir()):
                    archive.write(path, path.name)
            files[f"peft_{kind}.zip"] = packed.getvalue()
    return files | {"trace.npz": trace_file(handle.trace)}


def trace_file(trace: RankTrace) -> bytes:
    """The trace as the file that `RankTrace.load` reads."""
    with tempfile.TemporaryDirectory() as folder:
        trace.save(Path(folder) / "trace.npz")
        return (Path(folder) / "trace.npz").read_bytes()


@lru_cache(maxsize=1)
def stored() -> dict[str, Result]:
    """The examples' results: `python -m apps.adalora --write-first-view`."""
    return {name: Result.from_data(data) for name, data in json.loads(STORED.read_text(encoding="utf-8")).items()}


def store(results: dict[str, Result]) -> None:
    """Write them, one part per line."""
    write(STORED, {name: result.to_data() for name, result in results.items()})
    stored.cache_clear()

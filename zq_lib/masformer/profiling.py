"""Which layers need the whole text: measured, one layer local at a time (section 1.5 of the method's description).

The importance of a layer is how much the mean log probability of far answers drops when that layer alone is local.
Layers below it are not computed again: their outputs do not change.

>>> found = masformer.profile(model, passkey.selection(tokenizer))
>>> masformer.attach(model, found.plan(8))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel

from zq_lib.core.attach import attention_modules, decoder_blocks
from zq_lib.core.lab import Row
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.passkey import Probe, retrieve
from zq_lib.masformer.spans import Span, SpanPlan

Say = Callable[[str], None]


@dataclass(frozen=True)
class Importance:
    """What every layer is worth. `drop[m]` in nats per answer token; negative where the model gets better."""

    model: Mapping[str, Any]  # type and sizes of the model it was measured on
    drop: tuple[float, ...]
    full: float  # mean log probability of the answers with every layer full
    span: Span  # what the one local layer saw
    kind: str
    sinks: int
    tokens: tuple[int, ...]  # lengths of the probes

    def choose(self, count: int) -> tuple[int, ...]:
        """The `count` layers that cost most when they are local, in ascending order."""
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(self.drop):
            raise ValueError(f"count={count!r} layers cannot be chosen; use 0 to {len(self.drop)}")
        ranked = sorted(range(len(self.drop)), key=lambda layer: -self.drop[layer])
        return tuple(sorted(ranked[:count]))

    def plan(self, count: int, span: Span = 64, kind: str = "window", sinks: int = 4) -> SpanPlan:
        """The plan that keeps these layers full."""
        return SpanPlan.mixed(len(self.drop), full=self.choose(count), span=span, kind=kind, sinks=sinks)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless `model` has the type and sizes of the model that was measured."""
        here = _sizes(model)
        for name, value in self.model.items():
            if here.get(name) != value:
                raise ValueError(
                    f"the importance was measured on a model with {name}={value!r}, not {here.get(name)!r}; profile "
                    "this model, or use the one it was measured on"
                )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls._from(json.loads(Path(path).read_text("utf-8")))

    @classmethod
    def _from(cls, found: dict[str, Any]) -> Self:
        span = tuple(found["span"]) if isinstance(found["span"], list) else found["span"]
        return cls(**found | {"span": span, "drop": tuple(found["drop"]), "tokens": tuple(found["tokens"])})


@cache
def shipped() -> Importance:
    """The importance of the embedded model's layers, made by `python -m zq_lib.masformer.make_profile`."""
    text = files("zq_lib.masformer").joinpath("data/importance.json").read_text("utf-8")
    return Importance._from(json.loads(text))


def profile(
    model: PreTrainedModel, probes: Sequence[Probe], *, span: Span = 32, kind: str = "window", sinks: int = 0,
    say: Say = lambda _: None,
) -> Importance:  # fmt: skip
    """Measure every layer on `probes`, which should not be those that a plan is later judged on.

    Runs the model once per probe, and once more per layer from that layer up. A probe whose needle lies within `span`
    of its question says nothing; without sinks a layer's need for the first tokens counts as well.
    """
    modules = attention_modules(model)
    layers = max(modules) + 1
    stack = list(decoder_blocks(model, modules)[1].values())
    full, drops = 0.0, [0.0] * layers
    for i, probe in enumerate(probes):
        with _outputs(stack) as outputs:
            whole = retrieve(model, [probe]).mean_log_p
        full += whole / len(probes)
        for layer in range(layers):
            say(f"probe {i + 1} of {len(probes)}, layer {layer + 1} of {layers}")
            plan = SpanPlan.mixed(layers, full=set(range(layers)) - {layer}, span=span, kind=kind, sinks=sinks)
            with attach(model, plan), _known(stack[:layer], outputs):
                drops[layer] += (whole - retrieve(model, [probe]).mean_log_p) / len(probes)
    lengths = tuple(len(p.ids) for p in probes)
    return Importance(_sizes(model), tuple(drops), full, span, kind, sinks, lengths)


@dataclass(frozen=True)
class Search:
    """The cheapest plan found, and every plan that was tried."""

    plan: SpanPlan
    rows: tuple[Row, ...]


def search(
    model: PreTrainedModel, probes: Sequence[Probe], importance: Importance, *, loss: float = 0.1, span: Span = 64,
    kind: str = "window", sinks: int = 4, say: Say = lambda _: None,
) -> Search:  # fmt: skip
    """The fewest full layers, in the order of `importance`, that cost at most `loss` nats per answer token.

    Halves the interval of counts: it takes retrieval to grow with the count, and tries log2(L) plans. All layers full
    costs nothing, so a plan is always found.
    """
    if not loss >= 0:
        raise ValueError(f"loss={loss} must be at least 0 nats, for example 0.1")
    importance.check(model)
    whole, length = retrieve(model, probes), max(len(p.ids) for p in probes)
    low, high, rows = 0, len(importance.drop), []
    while low < high:
        count = (low + high) // 2
        plan = importance.plan(count, span, kind, sinks)
        say(f"{count} full layers")
        with attach(model, plan):
            found = retrieve(model, probes)
        lost = whole.mean_log_p - found.mean_log_p
        rows.append(
            {
                "full layers": count, "accuracy": found.accuracy, "loss": lost, "within": lost <= loss,
                "share of score entries": plan.cost(length).share,
            }
        )  # fmt: skip
        low, high = (low, count) if lost <= loss else (count + 1, high)
    return Search(importance.plan(high, span, kind, sinks), tuple(rows))


@contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Collect what every block returns."""
    found: dict[nn.Module, Any] = {}
    hooks = [block.register_forward_hook(lambda module, _, out: found.__setitem__(module, out)) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _known(blocks: Sequence[nn.Module], outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let these blocks return what is known instead of computing it."""
    for block in blocks:
        block.forward = lambda *args, _known=outputs[block], **kwargs: _known
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    text = model.config.get_text_config()
    return {
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "width": text.hidden_size,
        "vocabulary": text.vocab_size,
    }

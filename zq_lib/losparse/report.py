"""What a compression has done: layer by layer, and for the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zq_lib.losparse.layer import LowRankSparse

if TYPE_CHECKING:
    from zq_lib.losparse.compression import Compression


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer, N x K.

    `state` is "training" (S is stored whole, masked rows are zeros), "shrunk" or "dense" (merged). `rows` of its N rows
    of S are kept. `parameters` are those that count: of a layer in training, what it will have when it is cut; biases
    included. `flops` are multiply-adds for one token, alike.
    """

    name: str
    outputs: int
    inputs: int
    rank: int
    rows: int
    state: str
    dense_parameters: int
    parameters: int
    flops: int

    @property
    def density(self) -> float:
        """Share of its rows of S that are kept."""
        return self.rows / self.outputs


@dataclass(frozen=True)
class CompressionReport:
    """What a compression has done so far.

    `phase` is "warm-up", "pruning", "final", or "one shot" for a model cut without training; `share` is p(t) of the
    last mask. Papers count the replaced matrices alone (`ratio`); embeddings, head and norms are in `model_ratio`.
    `left_dense` maps layers that were left out to the reason.
    """

    step: int
    total_steps: int | None
    phase: str
    share: float
    layers: tuple[LayerReport, ...]
    left_dense: dict[str, str]
    model_parameters_at_start: int
    fixed: bool

    @property
    def dense_parameters(self) -> int:
        """Parameters of the layers that were replaced."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of what replaces them."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Share of the replaced layers' parameters that remains."""
        return self.parameters / self.dense_parameters

    @property
    def model_parameters(self) -> int:
        """Parameters of the whole model."""
        return self.model_parameters_at_start - self.dense_parameters + self.parameters

    @property
    def model_ratio(self) -> float:
        """Share of the whole model's parameters that remains."""
        return self.model_parameters / self.model_parameters_at_start

    @property
    def flops_ratio(self) -> float:
        """Share of the replaced layers' multiply-adds that remains."""
        return sum(x.flops for x in self.layers) / sum(x.outputs * x.inputs for x in self.layers)


def describe(handle: Compression) -> CompressionReport:
    """The report of `handle` as it is now."""
    done = handle.step - 1
    if not handle.step:
        phase = "one shot"
    elif handle.fixed or done >= handle.schedule.last:
        phase = "final"
    else:
        phase = "warm-up" if done <= handle.schedule.warmup else "pruning"
    return CompressionReport(
        step=handle.step,
        total_steps=handle.schedule.total if handle.step else None,
        phase=phase,
        share=handle.trace.shares[-1] if len(handle.trace) else 1.0,
        layers=tuple(_layer(handle, name, rows) for name, rows in zip(handle.layers, handle.kept(), strict=True)),
        left_dense=dict(handle.left_dense),
        model_parameters_at_start=handle.parameters_at_start,
        fixed=handle.fixed,
    )


def _layer(handle: Compression, name: str, rows: int) -> LayerReport:
    layer, outputs, inputs = handle.layers[name], handle.layers[name].out_features, handle.layers[name].in_features
    bias = 0 if layer.bias is None else outputs
    dense = not isinstance(handle.module(name), LowRankSparse)
    cost = outputs * inputs if dense else layer.rank * (outputs + inputs) + rows * inputs
    return LayerReport(
        name=name, outputs=outputs, inputs=inputs, rank=layer.rank, rows=rows,
        state="dense" if dense else "shrunk" if layer.shrunk else "training",
        dense_parameters=outputs * inputs + bias, parameters=cost + bias, flops=cost,
    )  # fmt: skip

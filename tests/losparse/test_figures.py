"""The pictures: each is drawn, and its description holds the numbers that were given."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core.figures import Figure, to_png
from zq_lib.losparse import figures
from zq_lib.losparse.schedule import Schedule
from zq_lib.losparse.trace import DensityTrace

METHODS = ("rows only", "LoSparse 5%", "low rank only")
DENSITIES = {f"encoder.layer.{b}.{k}": 0.1 * b + w for b in range(3) for k, w in (("query", 0.05), ("dense", 0.6))}


def drawn(fig: Figure, *said: str) -> None:
    png = to_png(fig)
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for text in said:
        assert text in fig.caption, fig.caption


def rows_of(column: str, *values: float) -> list[dict]:
    found = zip([r for r in (0.1, 0.5) for _ in METHODS], METHODS * 2, values, strict=True)
    return [{"ratio": ratio, "method": method, column: value} for ratio, method, value in found]


def test_the_parts_of_a_matrix_add_up_and_say_what_is_missed():
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    drawn(figures.parts(weight, 1, [0, 1, 2, 3]), "4 rows kept", "misses 0 % of")
    missed = float((weight - weight[[0, 0, 0, 0]] * 0)[1:].square().sum() / weight.square().sum())
    drawn(figures.parts(weight, 0, [0]), "rank 0", f"misses {figures.number(100 * missed)} % of")


def test_spectra_say_how_much_the_first_values_hold():
    drawn(figures.spectra({"flat": torch.ones(100), "steep": 0.5 ** torch.arange(40.0)}), "flat 5.00 % and 20.0 %",
          "steep 93.8 % and 100 %")  # fmt: skip


def test_error_curves_name_every_method_at_the_smallest_ratio():
    fig = figures.errors(rows_of("error", 0.824, 0.742, 0.697, 0.365, 0.346, 0.251))
    drawn(fig, "At 10 %", "rows only 0.824", "LoSparse 5% 0.742", "low rank only 0.697")


def test_perplexity_curves_stand_beside_the_dense_model():
    fig = figures.perplexities(rows_of("perplexity", 12391.0, 1855.0, 7.8e6, 164.6, 26.6, 1.0e7), dense=14.44)
    drawn(fig, "logarithmic", "rows only 12400", "low rank only 7.80e+06", "dense model has 14.4")


def test_the_schedule_says_where_its_phases_are():
    schedule = Schedule(total=100, warmup=20, final=30, interval=10, target=0.2)
    drawn(
        figures.share_curve(schedule, 0.05),
        "1 until step 20",
        "0.200 at step 71",
        f"{len(schedule.mask_steps())} ticks",
    )


def test_the_map_names_the_densest_and_the_emptiest_matrix():
    drawn(figures.density_map(DENSITIES), "3 blocks by 2 matrices", "80.0 %", "5.00 %")


def test_each_frame_of_the_animation_says_its_step():
    trace = DensityTrace(tuple(DENSITIES), outputs=(20,) * 6, inputs=(10,) * 6)
    trace.add(10, 0.8, [20, 20, 10, 10, 16, 20], 0)
    trace.add(20, 0.4, [1, 16, 5, 4, 6, 8], 2)
    for event in (1, -1):
        drawn(figures.density_frame(trace, event), "mask 2 of 2, at step 20, leaves 40.0 %", "80.0 %", "5.00 %")


def test_training_curves_give_the_last_value():
    rows = [{"method": m, "step": t, "loss": 2.0 - t * slope} for m, slope in (("LoSparse", 0.5), ("rows only", 0.25))
            for t in range(3)]  # fmt: skip
    drawn(figures.training(rows), "3 steps", "LoSparse 1.00; rows only 1.50")


@pytest.mark.parametrize(("column", "said"), [("nll", "lowest"), ("accuracy", "highest")])
def test_bars_give_values_and_intervals_and_the_best_is_named(column, said):
    rows = [
        {"method": m, column: v, "low": v - 0.02, "high": v + 0.02}
        for m, v in (("LoSparse", 1.33), ("rows only", 1.40))
    ]
    fig = figures.comparison(rows, column)
    drawn(fig, "with intervals", "LoSparse 1.33 (1.31 to 1.35)", "rows only 1.40")
    title = fig.figure.axes[0].get_title(loc="left")
    assert title.startswith(f"{'LoSparse' if said == 'lowest' else 'rows only'} has the {said}")
    assert "intervals" not in figures.comparison([{"method": "dense", column: 1.0}], column).caption


def test_speed_puts_parameters_beside_milliseconds():
    rows = [{"layer": "384 to 1536", "dense_ms": 6.0, "shrunk_ms": 1.5, "dense_parameters": 589824,
             "shrunk_parameters": 117900}]  # fmt: skip
    drawn(figures.speed(rows), "384 to 1536 6.00 to 1.50 ms and 0.590 to 0.118 million")


def test_every_method_of_a_figure_looks_different():
    lines = dict.fromkeys(
        ("dense", "rows only", "LoSparse 5%", "LoSparse 20%", "LoSparse 40%", "low rank only", "other")
    )
    assert len({look[0] for look in figures._looks(lines)}) == len(lines)

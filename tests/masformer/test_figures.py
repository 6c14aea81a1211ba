"""The pictures: each is drawn, and its description holds the numbers that were given."""

from __future__ import annotations

from zq_lib.core.figures import Figure, to_png
from zq_lib.masformer import SpanPlan, figures

PLAN = SpanPlan.mixed(4, full=(1,), span=8)
PLANS = [
    {"plan": "full", "full layers": 4, "sinks": 0, "accuracy": 1.0, "perplexity": 15.96},
    {"plan": "even", "full layers": 2, "sinks": 4, "accuracy": 0.153, "perplexity": 16.56},
    {"plan": "all local", "full layers": 0, "sinks": 0, "accuracy": 0.069, "perplexity": 59.8},
]


def drawn(fig: Figure, *said: str) -> None:
    png = to_png(fig)
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for text in said:
        assert text in fig.caption, fig.caption


def test_masks_count_their_entries():
    patterns = {"full": (None, "window", 0), "window 4": (4, "window", 0), "block 4 + 1 sink": (4, "block", 1)}
    drawn(figures.masks(patterns, 8), "full 36", "window 4 26", "block 4 + 1 sink 24", "8 queries")
    drawn(figures.masks({"full": (None, "window", 0)}, 4), "full 10")


def test_the_cone_says_how_many_tokens_reach_and_which_layers_are_full():
    drawn(figures.cone(PLAN, 64), "layers 1 are full", "64 of 64 tokens reach it", "the first is 0")
    drawn(figures.cone(SpanPlan((8,) * 3), 64, 40), "no layer is full", "22 of 41 tokens", "the first is 19")


def test_amdahl_gives_both_gains_at_both_ends():
    plan = SpanPlan.mixed(24, full=range(6), span=1)
    drawn(figures.amdahl(plan, (2048, 131072), 2048, 50257), "7.13 % of the FLOP", "1.06 for", "2.65 for the whole")


def test_times_leave_out_what_was_not_measured_and_say_the_last_point():
    rows = [
        {"attention": name, "tokens": tokens, "both_ms": "" if name == "full, masked" else base * tokens}
        for name, base in (("full", 0.05), ("full, masked", 0.1), ("window", 0.01))
        for tokens in (2048, 8192)
    ]
    fig = figures.times(rows, "both_ms")
    drawn(fig, "full 410 ms at 8192", "window 81.9 ms at 8192")
    assert "masked" not in fig.caption


def test_importance_names_the_layers_that_stay_full():
    rows = [{"layer": i, "drop": drop, "in 8": drop > 0.3} for i, drop in enumerate((0.0, 1.86, -0.1, 0.49))]
    drawn(figures.importance(rows), "Layer 1 costs most, 1.86 nats", "layers 1, 3 stay full")


def test_plans_put_retrieval_beside_perplexity():
    drawn(figures.plans(PLANS), "full 1.00 and 16.0", "even, 2 0.153 and 16.6", "all local, no sinks 0.0690 and 59.8")


def test_recall_names_accuracy_and_steps():
    rows = [{"layers": "F L", "accuracy": 0.9995, "step": 100}, {"layers": "L L", "accuracy": 0.12, "step": 300}]
    drawn(figures.recall(rows), "F L 1.00 after 100 steps", "L L 0.120 after 300 steps")


def test_key_value_bytes_are_those_of_the_plans():
    found = {"full": SpanPlan((None,) * 4), "one full": PLAN}
    drawn(figures.kv_bytes(found, (128, 1024), 2, 64, 4), "At 1024 tokens: full 4.19 MB; one full 1.07 MB")


def test_labels_of_close_lines_are_moved_apart():
    levels = figures._levels([10.0, 9.9, 100.0])
    assert levels[1] == 9.9 and levels[0] > 9.9 * 1.2 and levels[2] == 100.0

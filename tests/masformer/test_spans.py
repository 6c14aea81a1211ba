"""Plans: exact counts against the mask itself, placements, influence cones, round trips and refusals."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from zq_lib.masformer import SpanPlan, placement, receptive_field
from zq_lib.masformer.reference import visible
from zq_lib.masformer.spans import entries


@pytest.mark.parametrize("kind", ["window", "block", "two_block"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 31])
def test_score_entries_are_those_of_the_mask(kind, length):
    for span in (None, 1, 2, 3, 4, 8, 31, 40):
        for sinks in (0, 1, 4, 9, 50):
            counted = int(visible(length, length, span, kind, sinks).sum())
            assert entries(length, span, kind, sinks) == counted, (span, sinks)


@pytest.mark.parametrize(
    ("length", "full", "span", "window", "block"),
    [(8192, 3, 256, 0.821, 0.848), (8192, 4, 1024, 0.638, 0.729), (8192, 6, 512, 0.659, 0.703),
     (8192, 8, 2048, 0.375, 0.500), (32768, 6, 1024, 0.704, 0.727)],
)  # fmt: skip
def test_a_quarter_of_24_layers_full_saves_what_the_formula_promises(length, full, span, window, block):
    for kind, saved in (("window", window), ("block", block)):
        plan = SpanPlan.mixed(24, full=range(full), span=span, kind=kind)
        assert 1 - plan.cost(length).share == pytest.approx(saved, abs=6e-4)


@pytest.mark.parametrize(
    ("length", "share", "gain"), [(2048, 0.071, 1.06), (8192, 0.235, 1.21), (32768, 0.55, 1.70), (131072, 0.83, 2.65)]
)
def test_saving_three_quarters_of_attention_is_worth_what_its_share_of_the_model_allows(length, share, gain):
    speedup = SpanPlan.mixed(24, full=range(6), span=1).speedup(length, 2048, 50257)
    assert speedup.attention_share == pytest.approx(share, abs=2e-3)
    assert speedup.attention == pytest.approx(4, rel=5e-3)
    assert speedup.end_to_end == pytest.approx(gain, rel=5e-3)


def test_heads_with_different_spans_are_averaged_and_the_widest_decides_what_a_cache_keeps():
    plan = SpanPlan(((4, None), (2, 8), None), sinks=1)
    assert plan.full == (2,) and plan.spans(1) == (2, 8)
    assert plan.cost(10).layers[0] == (entries(10, 4, sinks=1) + 55) / 2
    assert [plan.reach(layer) for layer in range(3)] == [None, 8, None]
    assert [plan.kept(layer, 100) for layer in range(3)] == [100, 8, 100]


def test_key_value_bytes_of_8_full_layers_in_30_stay_below_a_third():
    plan = SpanPlan.mixed(30, full=placement("even", 30, 8), span=64, sinks=4)
    share = plan.kv_bytes(1024, 3, 64, 4) / SpanPlan((None,) * 30).kv_bytes(1024, 3, 64, 4)
    assert share == pytest.approx((8 + 22 * 67 / 1024) / 30) and share <= 0.33
    assert plan.kv_bytes(10, 3, 64, 4) == 30 * 10 * 3 * 64 * 2 * 4


def test_flop_are_four_per_entry_head_and_channel():
    assert SpanPlan((None, 1)).flops(4, heads=3, width=8) == 4 * 3 * 8 * (10 + 4)


@pytest.mark.parametrize(
    ("name", "layers", "count", "wanted"),
    [("bottom", 8, 3, (0, 1, 2)), ("top", 8, 3, (5, 6, 7)), ("middle", 8, 2, (3, 4)), ("even", 8, 2, (2, 6)),
     ("even", 30, 8, (1, 5, 9, 13, 16, 20, 24, 28)), ("alternate:3", 8, 0, (2, 5)), ("top", 4, 0, ()),
     ("even", 4, 0, ()), ("even", 4, 4, (0, 1, 2, 3))],
)  # fmt: skip
def test_placements_spread_the_full_layers_as_named(name, layers, count, wanted):
    assert placement(name, layers, count) == wanted


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [("lowest", 2, "placement 'lowest' is not known"), ("even", 9, "count=9 full layers .* use 0 to 8"),
     ("even", True, "count=True"), ("alternate:0", 2, "not known"), ("alternate", 2, "not known")],
)  # fmt: skip
def test_placements_that_do_not_exist_are_refused(name, count, words):
    with pytest.raises(ValueError, match=words):
        placement(name, 8, count)


@pytest.mark.parametrize("kind", ["window", "block", "two_block"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_the_influence_cone_is_the_product_of_the_masks(kind, sinks):
    plan = SpanPlan((3, None, (2, 5), 4), kind, sinks)
    length = 19
    for token in (7, 18):
        reached = np.eye(length, dtype=bool)[token]
        cone = receptive_field(plan, length, token)
        assert (cone[-1] == reached).all()
        for layer in (3, 2, 1, 0):
            masks = visible(length, length, plan.layers[layer], kind, sinks)[0].any(0).numpy()
            reached = reached @ masks
            assert (cone[layer] == reached).all(), layer


def test_local_layers_alone_reach_one_window_less_one_further_with_each():
    cone = receptive_field(SpanPlan((8,) * 4), 100)
    assert cone.sum(1).tolist() == [29, 22, 15, 8, 1]
    assert receptive_field(SpanPlan((8,) * 4, "block"), 100).sum(1).tolist() == [4, 4, 4, 4, 1]
    assert receptive_field(SpanPlan((8, None, 8, 8)), 100)[1].all()


def test_a_plan_survives_json():
    plan = SpanPlan((None, 8, (4, None)), "two_block", 3)
    assert SpanPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="'sinks' is missing"):
        SpanPlan.from_dict({"layers": [8], "kind": "window"})
    with pytest.raises(ValueError, match="'window' is no part"):
        SpanPlan.from_dict({**plan.to_dict(), "window": 8})


def test_layer_types_say_what_they_can_and_refuse_the_rest():
    assert SpanPlan((None, 8)).to_layer_types() == {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
    }
    for plan in (SpanPlan((None, 8), sinks=4), SpanPlan((4, 8)), SpanPlan((8,), "block"), SpanPlan(((8, 4),))):
        with pytest.raises(ValueError, match="cannot be written as layer_types"):
            plan.to_layer_types()


def test_the_description_joins_equal_neighbours_and_adds_up():
    plan = SpanPlan((8, 8, None, (4, None)), sinks=2)
    rows = plan.describe(64)
    assert [row["layers"] for row in rows] == ["0 to 1", "2", "3"]
    assert [row["sees"] for row in rows] == ["window 8 and 2 sinks", "everything", "window 4/all and 2 sinks"]
    assert sum(row["score entries"] for row in rows) == plan.cost(64).total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(((),), "layers=() is no plan"), (((0,),), "layers[0]=0 must be None (full) or a whole number of at least 1"),
     (((-3,),), "layers[0]=-3"), (((2.5,),), "layers[0]=2.5"), (((True,),), "layers[0]=True"),
     ((((4, 0),),), "layers[0][1]=0"), ((((),),), "has no head"), (((4,), "ring"), "kind='ring' is not known"),
     (((4,), "window", -1), "sinks=-1"), (((4,), "window", True), "sinks=True")],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused_with_its_place(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SpanPlan(*arguments)


@pytest.mark.parametrize("layer", [-1, 4, True, "0"])
def test_a_full_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(ValueError, match=f"full names layer {layer!r}, but the model has layers 0 to 3"):
        SpanPlan.mixed(4, full=(layer,), span=8)


def test_texts_without_tokens_and_tokens_outside_the_text_are_refused():
    with pytest.raises(ValueError, match="length=0"):
        SpanPlan((4,)).cost(0)
    with pytest.raises(ValueError, match="token=5 is outside the text; use 0 to 4"):
        receptive_field(SpanPlan((4,)), 5, 5)

"""The configuration: presets, plans, and what each wrong value hears."""

from __future__ import annotations

import re

import pytest

from zq_lib.masformer import MASFormerConfig, SpanPlan


def test_the_quick_preset_is_eight_of_thirty_layers_and_the_papers_is_blocks_above_the_bottom():
    assert MASFormerConfig.quick().plan(30) == SpanPlan.mixed(
        30, full=(1, 5, 9, 13, 16, 20, 24, 28), span=64, sinks=4
    )  # fmt: skip
    assert MASFormerConfig.paper().plan(24) == SpanPlan((None,) * 6 + (1024,) * 18, "block", 0)


def test_layers_can_be_listed_or_counted_and_heads_can_differ():
    assert MASFormerConfig(full=[2, 0]).plan(3).full == (0, 2)
    assert MASFormerConfig(full="alternate:2").plan(5).full == (1, 3)
    assert MASFormerConfig(full=(), window=[4, 8]).plan(1).layers == ((4, 8),)


@pytest.mark.parametrize(
    ("named", "words"),
    [(dict(full="lowest"), "placement 'lowest' is not known"), (dict(full=3), "full=3 must be one of"),
     (dict(count=-1), "count=-1"), (dict(count=2.0), "count=2.0"), (dict(window=0), "window=0"),
     (dict(window=None), "window=None would leave no local layer"), (dict(window=(4, -1)), "window[1]=-1"),
     (dict(kind="ring"), "kind='ring' is not known; choose one of window, block, two_block"),
     (dict(sinks=-4), "sinks=-4"), (dict(backend="cuda"), "backend='cuda' is not known")],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_do(named, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        MASFormerConfig(**named)


def test_layers_that_the_model_does_not_have_are_refused_when_the_model_is_known():
    with pytest.raises(ValueError, match="full names layer 30, but the model has layers 0 to 29"):
        MASFormerConfig(full=(30,)).plan(30)
    with pytest.raises(ValueError, match="count=8 full layers are not possible in a model of 4"):
        MASFormerConfig().plan(4)

"""Settings check themselves, and any way of naming heads comes out the same."""

from __future__ import annotations

import dataclasses
import math

import pytest

from zq_lib.pasta import PastaConfig
from zq_lib.pasta.config import FLOOR, MODES, PROTECT, SCOPES, head_map


def test_the_presets_hold_the_papers_values() -> None:
    quick, paper = PastaConfig.quick(), PastaConfig.paper({3: [1]})
    assert quick == PastaConfig() and quick.heads == "profile"
    assert paper == PastaConfig(0.01, {3: [1]}, mode="exclude", protect="none", scope="all")


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PastaConfig().alpha = 2


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, 1e-3, 1e-30])
def test_every_alpha_above_zero_up_to_one_is_accepted_and_its_logarithm_is_finite(alpha: float) -> None:
    assert PastaConfig(alpha=alpha).log_alpha == pytest.approx(math.log(max(alpha, FLOOR)))


@pytest.mark.parametrize("alpha", [0, 0.0, -1, 1.0001, 2, math.nan, math.inf, -math.inf, "0.1", None, [0.1], True])
def test_any_other_alpha_is_refused_and_named(alpha: object) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1; the paper uses 0.01") as caught:
        PastaConfig(alpha=alpha)
    assert f"alpha={alpha!r}" in str(caught.value)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, True, "half", None])
def test_a_share_outside_zero_and_one_is_refused(share: object) -> None:
    with pytest.raises(ValueError, match="must lie strictly between 0 and 1, for example 0.9") as caught:
        PastaConfig(share=share)
    assert f"share={share!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "allowed"), [("mode", MODES), ("protect", PROTECT), ("scope", SCOPES)])
def test_a_word_that_is_not_known_is_refused_with_those_that_are(name: str, allowed: tuple[str, ...]) -> None:
    for word in allowed:
        assert getattr(PastaConfig(**{name: word}), name) == word
    for word in ("", "ALL", None):
        with pytest.raises(ValueError, match="is not known; choose one of " + ", ".join(allowed)) as caught:
            PastaConfig(**{name: word})
        assert f"{name}={word!r}" in str(caught.value)


def test_heads_given_as_an_unknown_word_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads='best' is not known; give \{layer: \[heads\]\}, 'all' or 'profile'"):
        PastaConfig(heads="best")


@pytest.mark.parametrize(
    "heads",
    [
        {1: [2, 0], 0: [3]},
        {"1": ["2", "0"], "0": ["3"]},
        {1: (0, 2, 2), 0: {3}},
        [(1, 2), (0, 3), (1, 0), (1, 2)],
        iter([(1, 2), (0, 3), (1, 0)]),
    ],
)
def test_every_way_of_naming_heads_gives_the_same_sorted_map(heads: object) -> None:
    found = head_map(heads, 2, 4)
    assert found == {0: (3,), 1: (0, 2)} and list(found) == [0, 1]


def test_all_heads_and_no_heads() -> None:
    assert head_map("all", 2, 3) == {0: (0, 1, 2), 1: (0, 1, 2)}
    assert head_map({}, 2, 3) == head_map([], 2, 3) == {}
    assert head_map({1: []}, 2, 3) == {}


@pytest.mark.parametrize("pair", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_head_that_does_not_exist_is_named_with_the_models_range(pair: tuple[int, int]) -> None:
    message = f"layer {pair[0]}, head {pair[1]}, but this model has layers 0-1 with heads 0-2 each"
    with pytest.raises(ValueError, match=message):
        head_map([pair], 2, 3)


@pytest.mark.parametrize(
    "heads", [5, None, {0: 5}, {0: ["a"]}, {"x": [0]}, [(0,)], [0, 1], [(0, 1, 2)], {0: [0.7]}, "abc"]
)
def test_heads_of_no_known_form_are_refused_with_the_forms_that_are(heads: object) -> None:
    with pytest.raises(ValueError, match=r"cannot be read; give \{layer: \[heads\]\}, \[\(layer, head\)\] or 'all'"):
        head_map(heads, 2, 3)

"""Head profiles: saved and loaded without loss, tied to their model, combined as the paper does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import tiny

from zq_lib import pasta
from zq_lib.pasta import HeadProfile, intersection, union
from zq_lib.pasta.profiles import Fingerprint, as_map


def _scored(scores: list[list[float]], k: int = 2, **more: object) -> HeadProfile:
    return HeadProfile({0: [0]}, scores=scores, **more).top(k)


def _full(model: torch.nn.Module) -> HeadProfile:
    scores = [[0.1, -2.0, 0.25, 1e-7], [3.0, 0.0, 1.0, -0.5], [0.5, 0.5, 0.5, 12345.678]]
    return HeadProfile(
        {2: [3], 1: [2, 0]}, "conflict", "staircase", 0.01, 24, 7, "tiny", Fingerprint.of(model), scores
    )  # fmt: skip


def test_a_profile_comes_back_from_its_file_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny("llama")
    _full(model).save(tmp_path / "a.json")
    loaded = HeadProfile.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    again = HeadProfile.load(tmp_path / "b.json")
    assert again == loaded
    original = _full(model)
    assert loaded.pairs == [(1, 0), (1, 2), (2, 3)] and loaded.heads == {1: [0, 2], 2: [3]}
    for name in ("task", "method", "alpha", "items", "seed", "model", "fingerprint"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert torch.allclose(torch.tensor(loaded.scores), torch.tensor(original.scores), rtol=1e-4)


def test_a_file_has_one_line_per_layer_of_scores_and_the_official_heads_inside(tmp_path: Path) -> None:
    _full(tiny("llama")).save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["heads"] == {"1": [0, 2], "2": [3]}
    assert "[3.0, 0.0, 1.0, -0.5]" in text and text.endswith("}\n")


def test_the_official_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"0": [1, 3], "2": [0]}')
    profile = HeadProfile.load(str(path))
    assert profile.heads == {0: [1, 3], 2: [0]} and len(profile) == 3 and profile.fingerprint is None
    model = tiny("llama")
    with pasta.attach(model, profile=profile) as steering:
        assert steering.heads == {0: (1, 3), 2: (0,)}
    with pytest.raises(ValueError, match="profile 'without a task' has no scores; only its head set is known"):
        profile.top(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", r"heads.json' is not JSON \(.*\); give a head profile"),
        ("", "heads.json' is not JSON"),
        ("[1, 2]", r"heads.json' is not a head profile; .*\{\"layer\": \[heads\], ...\} or a file .*HeadProfile.save"),
        ('"text"', "is not a head profile"),
        ('{"first": [1]}', "is not a head profile"),
        ('{"0": 3}', "is not a head profile"),
        ('{"0": ["x"]}', "is not a head profile"),
        ('{"format": "zq_lib head profile 1"}', "is not a head profile"),
        ('{"format": "zq_lib head profile 1", "heads": {"0": [1]}, "fingerprint": null, "colour": 3}', "is not a head"),
        ('{"format": "zq_lib head profile 1", "heads": {"0": [1]}, "fingerprint": {"probe": []}}', "is not a head"),
        ('{"format": "zq_lib head profile 9", "heads": {"0": [1]}}', "is not a head profile"),
    ],
)
def test_a_broken_file_is_named_with_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadProfile.load(path)


def test_a_missing_file_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HeadProfile.load(tmp_path / "none.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_model_in_another_dtype_matches(dtype: torch.dtype) -> None:
    model = tiny("llama")
    profile = _full(model)
    profile.check(copy.deepcopy(model).to(dtype))


def test_another_checkpoint_of_the_same_shape_does_not_match() -> None:
    model = tiny("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="profile 'conflict' was made for tiny"):
        _full(model).check(other)


def test_a_probe_of_another_length_does_not_match() -> None:
    model = tiny("llama")
    mine = Fingerprint.of(model)
    assert not mine.matches(replace(mine, probe=mine.probe[:3])) and mine.matches(replace(mine, probe=()))


@pytest.mark.parametrize("other", [("qwen2", {}), ("llama", {"num_hidden_layers": 2})])
def test_a_profile_for_another_model_is_refused_and_leaves_the_model(other: tuple) -> None:
    model = tiny(other[0], **other[1])
    message = (
        r"profile 'conflict' was made for tiny \(3 layers x 4 heads\), not for this "
        rf"{other[0]} \(2 x 4\); profile this model with pasta.profile_heads, or give heads="
    )
    with pytest.raises(ValueError, match=message):
        pasta.attach(model, profile=_full(tiny("llama")))
    assert model.config._attn_implementation == "sdpa" and not model.base_model._forward_pre_hooks


def test_an_official_file_with_heads_that_do_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 31, head 2, but this model has layers 0-2 with heads 0-3"):
        HeadProfile({31: [2]}).check(tiny("llama"))


def test_heads_are_ranked_by_score_and_ties_by_layer_and_head() -> None:
    profile = _scored([[0.5, 1.0], [1.0, 0.5]])
    assert profile.ranked() == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert profile.pairs == [(0, 1), (1, 0)]
    assert profile.top(3).pairs == [(0, 0), (0, 1), (1, 0)] and profile.top(3).scores == profile.scores


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_heads_than_there_are_cannot_be_taken(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} heads cannot be taken from 4; choose 1 to 4"):
        _scored([[0.5, 1.0], [1.0, 0.5]]).top(k)


def test_intersection_and_union_of_the_top_heads_of_each_task() -> None:
    a = _scored([[4.0, 3.0], [2.0, 1.0]], task="a", items=5)
    b = _scored([[1.0, 3.0], [4.0, 2.0]], task="b")
    assert intersection([a, b], 2).pairs == [(0, 1)]
    assert intersection([a, b], 3).pairs == [(0, 1), (1, 0)]
    assert union([a, b], 2).pairs == [(0, 0), (0, 1), (1, 0)]
    assert union([a, b], 2).task == "union of top 2: a, b"
    assert intersection([a], 2).pairs == a.top(2).pairs
    assert a.scores and not union([a, b], 2).scores


def test_an_empty_intersection_and_no_profiles_are_refused() -> None:
    a, b = _scored([[4.0, 3.0, 2.0, 1.0]]), _scored([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="k=2: no head is in every task's top 2; raise k or take the union"):
        intersection([a, b], 2)
    for combine in (intersection, union):
        with pytest.raises(
            ValueError, match=rf"profiles=\[\] leaves nothing for the {combine.__name__}; give at least"
        ):
            combine([], 2)


def test_pairs_as_a_map() -> None:
    assert as_map([(2, 1), (0, 3), (2, 0)]) == {0: [3], 2: [0, 1]}


def test_an_unknown_shipped_profile_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="task='json' has no shipped profile; choose 'conflict' or 'pick'"):
        pasta.shipped_profile("json")


def test_the_shipped_profile_is_refused_by_another_model() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="was made for"):
        pasta.attach(model)
    assert model.config._attn_implementation == "sdpa"

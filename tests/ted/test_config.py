"""Settings check themselves, survive JSON, and have the authors' values."""

from __future__ import annotations

import pytest

from zq_lib.ted.config import PAPER_TASKS, TedConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "even"}, r"layers='even' is not known; choose one of uniform, interval, or give pairs"),
        ({"layers": ()}, r"layers=\(\) must hold pairs"),
        ({"layers": ((1, 2, 3),)}, "must hold pairs"),
        ({"layers": ((1.5, 2),)}, "must hold pairs"),
        ({"layers": ((0, 2),)}, "counts from 1, the first block; 0 would be the embeddings"),
        ({"layers": ((1, 2),), "pairs": 2}, "pairs=2 but layers holds 1"),
        ({"pairs": 0}, "pairs=0 must be a whole number of at least 1, or None"),
        ({"filter_dim": 2.5}, "filter_dim=2.5 must be a whole number"),
        ({"sample": -3}, "sample=-3 must be a whole number"),
        ({"filter": "conv"}, "filter='conv' is not known; choose one of linear, mlp"),
        ({"pool": "max"}, "pool='max' is not known"),
        ({"positions": "some"}, "positions='some' is not known"),
        ({"kd": "cosine"}, "kd='cosine' is not known; choose one of kl, reverse_kl, jsd, mse"),
        ({"scale": "std"}, "scale='std' is not known"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"kd_weight": -1}, "kd_weight=-1 must be a number of at least 0"),
        ({"layer_weight": float("nan")}, "layer_weight=nan must be a number"),
        ({"task_weight": 0, "kd_weight": 0, "layer_weight": 0}, "are all 0, which trains nothing"),
        ({"temperature": 0}, "temperature=0 must be above 0; the usual one is 2"),
        ({"beta": 1}, "beta=1 must lie between 0 and 1"),
        ({"dropout": 1}, "dropout=1 must be at least 0 and below 1"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TedConfig(**settings)


def test_the_config_survives_json_and_an_unknown_setting_does_not() -> None:
    for config in (TedConfig(layers=((1, 2), (3, 4)), filter_dim=8, kd="jsd"), TedConfig.quick(), TedConfig.paper()):
        assert TedConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="'width' is no setting of TedConfig"):
        TedConfig.from_json('{"width": 3}')


def test_the_presets_have_the_published_weights() -> None:
    assert TedConfig.paper("MNLI").layer_weight == 7500 and TedConfig.paper("MNLI").scale == "none"
    for task, row in PAPER_TASKS.items():
        config = TedConfig.paper(task)
        assert (config.kd_weight, config.layer_weight) == (row.kd_weight, row.layer_weight)
        assert config.temperature == 2 and config.filter == "linear" and config.layers == "interval"
    with pytest.raises(ValueError, match="task='WNLI' has no published setting"):
        TedConfig.paper("WNLI")

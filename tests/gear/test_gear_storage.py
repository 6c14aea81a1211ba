"""A compressed prefix on disk comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from gear_cases import FULL, assert_same, held, ids, left_padded, tiny
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from zq_lib.gear import GearCache, GearConfig, attend_packed, storage

PLAN = [FULL, FULL.but(bits=(3, 8), clip=(False, True), outliers=(0.0, 0.25)), FULL.but(scheme="kcvt", factor_bits=8)]


def filled(model: PreTrainedModel, gear: object = FULL, rows: int = 2) -> GearCache:
    """A cache after a prompt and some tokens."""
    cache = GearCache(model.config, gear)
    with torch.no_grad():
        for part in ids(rows, 45).split([40, 1, 1, 3], 1):
            model(part, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, bytes]:
    model, path = tiny("llama"), tmp_path_factory.mktemp("once") / "prefix"
    filled(model).save(path)
    return model, path.read_bytes()


@pytest.fixture
def saved(once: tuple[PreTrainedModel, bytes], tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model and the file of a cache of it, free to be broken."""
    path = tmp_path / "prefix.safetensors"
    path.write_bytes(once[1])
    return once[0], path


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma3"])
def test_a_loaded_cache_holds_the_same_bits_and_goes_on_alike(arch: str, tmp_path: Path) -> None:
    """Hybrid models too: their sliding layers are saved as they are."""
    model = tiny(arch)
    cache = filled(model, PLAN if arch == "llama" else FULL)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = GearCache.load(tmp_path / "prefix.safetensors", model.config)
    assert_same(loaded.layers, cache.layers)
    assert loaded.gear == cache.gear and loaded.nbytes() == cache.nbytes() and loaded.report() == cache.report()
    for name, x in held(loaded.gear_layers()).items():
        assert x.untyped_storage().nbytes() == x.nbytes, name
    with torch.no_grad():
        for part in ids(2, 24, seed=3).split([8, 1, 1, 14], 1):
            assert torch.equal(model(part, past_key_values=cache).logits, model(part, past_key_values=loaded).logits)
    assert_same(loaded.layers, cache.layers)


@pytest.mark.parametrize("packed", [False, True])
def test_generation_from_a_loaded_prefix_gives_the_same_tokens(saved, packed: bool) -> None:  # noqa: ANN001
    model, path = saved
    text = torch.cat([ids(2, 45), ids(2, 4, seed=3)], 1)
    found = []
    for cache in (filled(model), GearCache.load(path, model.config)):
        if packed:
            with attend_packed(model):
                found.append(model.generate(text, past_key_values=cache, do_sample=False, max_new_tokens=12))
        else:
            found.append(model.generate(text, past_key_values=cache, do_sample=False, max_new_tokens=12))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama").to(dtype)
    cache = filled(model, FULL.but(rank_decode=1, factor_bits=8, meta_dtype="float32"), rows=1)
    storage.save(cache, tmp_path / "prefix")
    loaded = storage.load(tmp_path / "prefix", model.config)
    assert_same(loaded.layers, cache.layers)
    with torch.no_grad():
        more = ids(1, 1, seed=3)
        assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=loaded).logits)


def test_padding_crops_and_recording_survive(tmp_path: Path) -> None:
    model, (x, mask) = tiny("llama"), left_padded(3, 40)
    cache = GearCache(model.config, FULL)
    cache.activate_past_recording()
    with torch.no_grad(), attend_packed(model):
        model(x, attention_mask=mask, past_key_values=cache)
        cache.crop(-9)
        cache.save(tmp_path / "prefix")
        loaded = GearCache.load(tmp_path / "prefix", model.config)
        assert_same(loaded.layers, cache.layers)
        assert loaded.is_croppable and loaded.get_seq_length() == 31
        for part in ids(3, 20, seed=4).split([2, 18], 1):
            a, b = (model(part, past_key_values=c).logits for c in (cache, loaded))
            assert torch.equal(a, b)
    assert_same(loaded.layers, cache.layers)


def test_sliding_layers_go_on_after_a_crop_too(tmp_path: Path) -> None:
    model = tiny("gemma3")
    cache = GearCache(model.config, FULL)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids(1, 30), past_key_values=cache)
        cache.save(tmp_path / "prefix")
        loaded = GearCache.load(tmp_path / "prefix", model.config)
        for c in (cache, loaded):
            c.crop(-4)
        more = ids(1, 3, seed=3)
        assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=loaded).logits)


def test_a_prefix_shorter_than_the_buffer_is_saved_exactly(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = GearCache(model.config, GearConfig())
    with torch.no_grad():
        model(ids(1, 5), past_key_values=cache)
    cache.save(tmp_path / "prefix")
    assert_same(GearCache.load(tmp_path / "prefix", model.config).layers, cache.layers)


def test_the_file_is_ordinary_safetensors_and_not_much_larger_than_the_cache(saved) -> None:  # noqa: ANN001
    model, path = saved
    cache = filled(model)
    with safe_open(path, "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == cache.nbytes()  # noqa: SIM118
        about = json.loads(file.metadata()["zq_gear"])
    assert about["format"] == storage.FORMAT
    assert about["model"] == {
        "model_type": "llama", "layers": 3, "heads": 4, "key_value_heads": 2, "width": 32, "head_width": 8,
        "vocabulary": 128,
    }  # fmt: skip
    assert about["layers"][0]["config"]["bits"] == 2
    assert b"pickle" not in path.read_bytes() and not path.read_bytes().startswith(b"PK")


def test_an_empty_cache_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the cache is empty; run the model with it first"):
        GearCache(tiny("llama").config).save(tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


def test_a_layer_of_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    from transformers.cache_utils import DynamicLayer

    cache = filled(tiny("llama"))
    cache.layers[1] = DynamicLayer()
    with pytest.raises(ValueError, match="layer 1 is a DynamicLayer, which cannot be saved"):
        cache.save(tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    model, path = saved
    before = path.read_bytes()

    def half(tensors: dict, where: Path, metadata: dict) -> None:
        Path(where).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        filled(model, FULL.but(bits=4)).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_process_killed_before_the_rename_leaves_the_old_file(saved, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    model, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        filled(model, FULL.but(bits=4)).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_saving_over_a_file_replaces_it_while_an_open_cache_stays_whole(saved) -> None:  # noqa: ANN001
    model, path = saved
    loaded = GearCache.load(path, model.config)
    filled(model, FULL.but(bits=4)).save(path)
    assert_same(loaded.layers, filled(model).layers)
    assert GearCache.load(path, model.config).gear[0].bits == 4
    path.unlink()
    assert_same(loaded.layers, filled(model).layers)


def test_a_missing_file_is_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GearCache.load(tmp_path / "nothing", tiny("llama").config)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved, share: float) -> None:  # noqa: ANN001
    model, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="is truncated or no safetensors file .*; save the cache again") as caught:
        GearCache.load(path, model.config)
    assert "\n" not in str(caught.value)


def test_a_file_with_something_behind_it_is_refused(saved) -> None:  # noqa: ANN001
    model, path = saved
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        GearCache.load(path, model.config)


def test_one_flipped_byte_anywhere_is_refused(saved) -> None:  # noqa: ANN001
    """In the header, the description, the digest and the tensors: every time one clear sentence, never a cache."""
    model, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(0, 8), *torch.randint(8, header, (70,), generator=generator).tolist()]
    places += [header, len(whole) - 1, *torch.randint(header, len(whole), (40,), generator=generator).tolist()]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="path=.*(truncated|was changed|holds no GEAR cache|has format)") as caught:
            GearCache.load(path, model.config)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    GearCache.load(path, model.config)


def rewritten(path: Path, about: dict | None = None, digest: bool = False, **tensors: torch.Tensor) -> None:
    """The file with another description or other tensors, and, if asked, with a digest that fits."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        found = {name: file.get_tensor(name).clone() for name in file.keys()} | tensors  # noqa: SIM118
    if about is not None:
        header["zq_gear"] = json.dumps(json.loads(header["zq_gear"]) | about, sort_keys=True)
    if digest:
        header["zq_sha256"] = storage._digest(header["zq_gear"], found)
    save_file(found, path, header)


def test_an_edited_description_and_an_edited_tensor_are_refused(saved) -> None:  # noqa: ANN001
    model, path = saved
    whole = path.read_bytes()
    rewritten(path, {"model": {"model_type": "llama"}})
    with pytest.raises(ValueError, match="was changed after it was saved: its SHA-256 does not match"):
        GearCache.load(path, model.config)
    path.write_bytes(whole)
    rewritten(path, **{"0.exact_keys": torch.zeros(2, 2, 5, 8)})
    with pytest.raises(ValueError, match="was changed after it was saved"):
        GearCache.load(path, model.config)
    path.write_bytes(whole)
    rewritten(path)
    assert_same(GearCache.load(path, model.config).layers, filled(model).layers)


def test_an_unknown_format_is_named(saved) -> None:  # noqa: ANN001
    model, path = saved
    rewritten(path, {"format": 99}, digest=True)
    with pytest.raises(ValueError, match="has format 99, but this version of zq_lib reads format 1; save the cache"):
        GearCache.load(path, model.config)


def test_settings_that_this_version_does_not_know_are_refused(saved) -> None:  # noqa: ANN001
    model, path = saved
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["zq_gear"])["layers"]
    layers[1]["config"]["codebook"] = "nf4"
    rewritten(path, {"layers": layers}, digest=True)
    with pytest.raises(ValueError, match="path=.*settings.*codebook.*the version that wrote it"):
        GearCache.load(path, model.config)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny("qwen2"), "model_type='llama', not 'qwen2'"),
        (lambda: tiny("gpt2"), "model_type='llama', not 'gpt2'"),
        (lambda: tiny("llama", num_hidden_layers=2), "layers=3, not 2"),
        (lambda: tiny("llama", num_attention_heads=8, head_dim=4), "heads=4, not 8"),
        (lambda: tiny("llama", num_key_value_heads=4), "key_value_heads=2, not 4"),
        (lambda: tiny("llama", hidden_size=64, head_dim=8), "width=32, not 64"),
        (lambda: tiny("llama", head_dim=16), "head_width=8, not 16"),
        (lambda: tiny("llama", vocab_size=130), "vocabulary=128, not 130"),
    ],
)
def test_another_model_is_refused_with_what_differs(saved, other, message: str) -> None:  # noqa: ANN001
    _, path = saved
    with pytest.raises(ValueError, match=f"was saved for a model with {message}; load it with the config"):
        GearCache.load(path, other().config)


def test_a_hybrid_of_another_window_or_another_order_is_refused(tmp_path: Path) -> None:
    filled(tiny("gemma3")).save(tmp_path / "prefix")
    for other in (
        tiny("gemma3", sliding_window=16),
        tiny("gemma3", layer_types=["full_attention", "sliding_attention"] * 2),
    ):
        with pytest.raises(ValueError, match="holds a DynamicSlidingWindowLayer.* for layer 0, where this model has"):
            GearCache.load(tmp_path / "prefix", other.config)


def test_other_files_are_refused(tmp_path: Path) -> None:
    config, path = tiny("llama").config, tmp_path / "file"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no GEAR cache; give a file that GearCache.save wrote"):
        GearCache.load(path, config)
    torch.save({"x": torch.zeros(3)}, path)  # a pickle in a zip file is not even looked into
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        GearCache.load(path, config)
    save_file({"x": torch.zeros(3)}, path, {"zq_gear": "[]", "zq_sha256": ""})
    with pytest.raises(ValueError, match="was changed after it was saved"):
        GearCache.load(path, config)

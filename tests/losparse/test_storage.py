"""On disk: as small as it is, dense for everybody, or a sparse base with a plain LoRA."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from zq_lib import losparse
from zq_lib.core import models
from zq_lib.losparse import LoSparseConfig, LowRankSparse, attach
from zq_lib.losparse.storage import FACTS, WEIGHTS

CONFIG = LoSparseConfig(low_rank=0.1, remaining=0.2, auto_dense=False)
IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))


def _compressed(model, config=CONFIG):
    """Cut without training, by scores that differ from layer to layer."""
    handle = attach(model.eval(), config)
    source = torch.Generator().manual_seed(1)
    handle.shrink({n: torch.rand(m.out_features, generator=source) for n, m in handle.layers.items()})
    handle.finish()
    return model


def _out(model, ids=IDS):
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "opt"])
def test_a_saved_model_comes_back_with_identical_outputs(arch: str, tmp_path) -> None:
    model = _compressed(models.tiny(arch))
    losparse.save_compressed(model, tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    assert losparse.load_compressed(fresh, tmp_path) is fresh
    assert torch.equal(_out(fresh), _out(model))
    assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == (
        model.lm_head.weight is model.get_input_embeddings().weight
    )


def test_the_file_is_as_small_as_the_model(tmp_path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=384, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1536,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config)
    dense = sum(p.numel() for p in model.parameters())
    _compressed(model, LoSparseConfig(low_rank=0.05, remaining=0.15))
    losparse.save_compressed(model, tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters < 0.3 * dense
    assert (tmp_path / WEIGHTS).stat().st_size <= 1.02 * parameters * 4
    fresh = BertModel(config).eval()
    losparse.load_compressed(fresh, tmp_path)
    assert torch.equal(_out(fresh), _out(model)) and sum(p.numel() for p in fresh.parameters()) == parameters


def test_a_dense_copy_is_read_by_transformers_alone(tmp_path) -> None:
    model = _compressed(models.tiny("gpt2"))
    losparse.save_dense(model, tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_out(back), _out(model), rtol=1e-5, atol=1e-6)
    assert any(isinstance(m, LowRankSparse) for m in model.modules()), "the model itself stays as it is"
    merged = losparse.merge(copy.deepcopy(model))
    assert all(torch.equal(merged.state_dict()[k], t) for k, t in back.state_dict().items())


def test_a_model_that_is_not_of_transformers_is_saved_too(toy, tmp_path) -> None:
    fresh = copy.deepcopy(toy)
    _compressed(toy)
    losparse.save_compressed(toy, tmp_path)
    losparse.load_compressed(fresh, tmp_path)
    ids = torch.randint(20, (2, 5))
    assert torch.equal(fresh(ids), toy(ids))
    losparse.save_dense(toy, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_peft_runs_the_sparse_base_with_the_lora(arch: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = _compressed(models.tiny(arch))
    losparse.to_peft_lora(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, LowRankSparse))
    rows = base.get_submodule(name).weight if layer.kind == "Linear" else base.get_submodule(name).weight.T
    assert rows.any(1).nonzero()[:, 0].tolist() == layer.rows.tolist(), "only the kept rows are not zero"
    reloaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(_out(reloaded), _out(model), rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"] and settings["rank_pattern"] == settings["alpha_pattern"]


def test_rows_alone_have_no_lora(tmp_path) -> None:
    model = _compressed(models.tiny("llama"), LoSparseConfig(low_rank=0, remaining=0.3))
    with pytest.raises(ValueError, match="every layer has rank 0.*use save_dense"):
        losparse.to_peft_lora(model, tmp_path)
    losparse.save_compressed(model, tmp_path)
    fresh = models.tiny("llama").eval()
    assert torch.equal(_out(losparse.load_compressed(fresh, tmp_path)), _out(model))


def test_saving_before_the_cut_and_without_layers_is_refused(toy, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no LoSparse layer"):
        losparse.save_compressed(toy, tmp_path)
    attach(toy, CONFIG)
    with pytest.raises(RuntimeError, match="'blocks.0.up' still holds all its rows; call handle.finish"):
        losparse.save_compressed(toy, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_model_is_refused_and_the_model_left_alone(toy, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no compressed model; it needs losparse_model.json"):
        losparse.load_compressed(toy, tmp_path)
    losparse.save_compressed(_compressed(models.tiny("llama")), tmp_path)
    names = list(toy.state_dict())
    with pytest.raises(ValueError, match="which in this model has none of that name"):
        losparse.load_compressed(toy, tmp_path)
    with pytest.raises(ValueError, match=r"is \d+ x \d+ in the file and \d+ x \d+ in this model"):
        wide = models.tiny("llama", hidden_size=64)
        losparse.load_compressed(wide, tmp_path)
    assert list(toy.state_dict()) == names
    already = _compressed(models.tiny("llama"))
    with pytest.raises(ValueError, match="is a LowRankSparse"):
        losparse.load_compressed(already, tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path) -> None:
    model = _compressed(models.tiny("llama"))
    losparse.save_compressed(model, tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["layers"].popitem()
    (tmp_path / FACTS).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.* in the file and .* in this model"):
        losparse.load_compressed(models.tiny("llama"), tmp_path)

"""Exports reloaded by PEFT itself, imports of everything that PEFT and the original code write."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from zq_lib import adalora
from zq_lib.adalora import AdaLoraConfig, attach

peft = pytest.importorskip("peft")
CONFIG = AdaLoraConfig(init_rank=6, target_rank=2, total_steps=20, warmup=2, final=5, interval=2)


def _bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, num_labels=3,
        initializer_range=0.2, max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


class Mixed(nn.Module):
    """A convolution and an embedding as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 9)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(36, 5)

    def forward(self, input_ids):
        x = self.conv(self.embed(input_ids)[:, None])  # [B, 4, T, 9]
        return self.fc(x.transpose(1, 2).flatten(2))


IDS = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(3))


def _out(model, ids=IDS):
    with torch.no_grad():
        out = model(input_ids=ids)
    return getattr(out, "logits", out)


def _trained(model, config=CONFIG, steps: int = 20, **settings):
    torch.manual_seed(1)
    handle = attach(model, config, **settings)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-2)
    source = torch.Generator().manual_seed(4)
    for _ in range(steps):
        ids = torch.randint(50, (4, 7), generator=source)
        out = model(input_ids=ids)
        (getattr(out, "logits", out) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle


MODELS = {
    "bert": (_bert, {"train_also": ("classifier",)}),
    "gpt2": (_gpt2, {}),
    "mixed": (Mixed, {"targets": ("embed", "conv", "fc")}),
}


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_plain_lora_reloaded_by_peft_computes_the_same(kind: str, cut: bool, tmp_path) -> None:
    make, settings = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    fresh = copy.deepcopy(model)
    handle = _trained(model, shrink=cut, **settings)
    adalora.to_peft_lora(handle, tmp_path)
    reloaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    want = _out(model)
    assert (_out(reloaded) - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
    assert not torch.allclose(_out(make()), want)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_peft_adalora_reloaded_by_peft_computes_the_same(kind: str, tmp_path) -> None:
    make, settings = MODELS[kind]
    model = make()
    fresh = copy.deepcopy(model)
    handle = _trained(model, **settings)
    assert 0 in handle.ranks().values(), "the case with an empty layer must be there"
    adalora.to_peft_adalora(handle, tmp_path)
    reloaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    want = _out(model)
    assert (_out(reloaded) - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_our_own_export_comes_back_through_our_own_import(kind: str, tmp_path) -> None:
    make, settings = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    fresh = copy.deepcopy(model)
    handle = _trained(model, **settings)
    want = _out(model)
    adalora.to_peft_lora(handle, tmp_path / "lora")
    formats = ["lora"]
    if kind != "mixed":
        adalora.to_peft_adalora(handle, tmp_path / "ada")
        formats.append("ada")
    for name in formats:
        target = copy.deepcopy(fresh)
        back = adalora.from_peft(target, tmp_path / name)
        assert (_out(target) - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
        assert {k: v for k, v in back.ranks().items() if v} == {k: v for k, v in handle.ranks().items() if v}
        adalora.to_peft_lora(back, tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").exists()
        back.detach()
        unchanged = _out(fresh)
        assert torch.equal(_out(target), unchanged) or settings.get("train_also")


@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora"])
def test_what_peft_saves_is_read(kind: str, tmp_path) -> None:
    model = _bert()
    ours = copy.deepcopy(model)
    if kind == "adalora":
        config = peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, lora_alpha=16, target_modules=["query", "dense"]
        )
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["query", "value"], use_rslora=kind == "rslora",
            alpha_pattern={"query": 3} if kind == "lora" else {}, rank_pattern={"layer.0.attention.self.query": 2},
        )  # fmt: skip
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    theirs.save_pretrained(str(tmp_path))
    adalora.from_peft(ours, tmp_path)
    want = _out(theirs)
    assert (_out(ours) - want).abs().max() <= 2e-6 * float(want.abs().max())


def test_an_imported_adapter_trains_on_with_its_ranks(tmp_path) -> None:
    model = _bert()
    fresh = copy.deepcopy(model)
    handle = _trained(model)
    adalora.to_peft_lora(handle, tmp_path)
    back = adalora.from_peft(fresh, tmp_path)
    before, ranks = _out(fresh), back.ranks()
    optimizer = torch.optim.AdamW(back.parameters(), lr=1e-2)
    for _ in range(3):
        fresh(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert back.ranks() == ranks and not torch.equal(_out(fresh), before) and back.report().phase == "no pruning"


def test_a_state_of_the_original_code_is_read() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    model = nn.Sequential(layer)
    a, e, b = torch.randn(4, 6), torch.randn(4, 1), torch.randn(5, 4)
    state = {"0.weight": layer.weight, "0.lora_A": a, "0.lora_E": e, "0.lora_B": b, "0.ranknum": torch.tensor(4.0)}
    x = torch.randn(2, 6)
    want = layer(x) + (x @ (a * e).T @ b.T) * 16 / (4 + 1e-5)
    adalora.from_loralib(model, state, alpha=16)
    torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match="no key that ends in '.lora_E'"):
        adalora.from_loralib(nn.Sequential(nn.Linear(2, 2)), {"0.weight": a}, alpha=16)


def test_an_export_before_the_ranks_are_final_is_refused(tmp_path) -> None:
    handle = _trained(_bert(), steps=8)
    for export in (adalora.to_peft_lora, adalora.to_peft_adalora):
        with pytest.raises(RuntimeError, match="step 8 is before the ranks are final"):
            export(handle, tmp_path)
    assert not list(tmp_path.iterdir())
    handle.finish()
    adalora.to_peft_lora(handle, tmp_path)


def test_what_a_format_cannot_hold_is_refused(tmp_path) -> None:
    handle = _trained(Mixed(), targets=("embed", "fc"))
    with pytest.raises(ValueError, match="'embed' is an embedding.*use to_peft_lora"):
        adalora.to_peft_adalora(handle, tmp_path)
    nothing = _trained(Mixed(), targets="fc", budget=5, budget_unit="parameters", steps=16)
    with pytest.raises(ValueError, match="every layer has rank 0"):
        adalora.to_peft_lora(nothing, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True, which is no low-rank update"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_adapters_of_other_kinds_are_refused(change: dict, message: str, tmp_path) -> None:
    adalora.to_peft_lora(_trained(_bert()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        adalora.from_peft(_bert(), tmp_path)


def test_an_adapter_of_another_model_is_refused_and_the_model_left_alone(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no PEFT adapter"):
        adalora.from_peft(_bert(), tmp_path)
    adalora.to_peft_lora(_trained(_bert()), tmp_path)
    with pytest.raises(ValueError, match="matches no module"):
        adalora.from_peft(_gpt2(), tmp_path)
    wide = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36)
    )
    names = list(wide.state_dict())
    with pytest.raises(ValueError, match="in this model and .* in the adapter"):
        adalora.from_peft(wide, tmp_path)
    assert list(wide.state_dict()) == names

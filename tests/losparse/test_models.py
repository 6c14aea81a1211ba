"""Models of transformers: every architecture trains, shrinks, generates, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from zq_lib.core import models
from zq_lib.losparse import LoSparseConfig, LowRankSparse, attach, merge

CONFIG = LoSparseConfig(low_rank=0.1, remaining=0.2, total_steps=12, warmup=1, final=4, interval=2)
IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))


def _train(model, steps: int = 12, labels=IDS):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma"])
def test_every_architecture_trains_shrinks_generates_and_merges(arch: str) -> None:
    model = models.tiny(arch)
    handle = attach(model, CONFIG)
    before = model(IDS).logits
    _train(model)
    report = handle.finish()
    assert report.fixed and {layer.state for layer in report.layers} <= {"shrunk", "dense"}
    assert sum(layer.rows * layer.inputs for layer in report.layers) == pytest.approx(
        0.2 * sum(layer.outputs * layer.inputs for layer in report.layers), rel=0.05
    )
    assert sum(p.numel() for p in model.parameters()) == report.model_parameters
    model.eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    with torch.no_grad():
        apart = model(input_ids=IDS, attention_mask=mask).logits
        assert not torch.equal(before, apart)
        said = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        merge(model)
        merged = model(input_ids=IDS, attention_mask=mask).logits
        again = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
    assert torch.equal(again, said)
    assert (apart - merged)[mask.bool()].abs().max() <= 1e-5 * apart.abs().max()


def test_an_encoder_keeps_its_pooler_and_classifier_dense() -> None:
    model = _bert()
    handle = attach(model, CONFIG)
    _train(model, labels=torch.tensor([0, 1, 2]))
    assert len(handle.layers) == 12 and all(".layer." in name for name in handle.layers)
    assert isinstance(model.bert.pooler.dense, nn.Linear) and isinstance(model.classifier, nn.Linear)
    assert handle.finish().ratio < 0.4 < handle.report().model_ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains_to_its_budget(dtype: torch.dtype) -> None:
    model = models.tiny("llama").to(dtype)
    handle = attach(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # Adam's own numbers do not fit into fp16
    for _ in range(12):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.shrunk and all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_autocast_runs_before_and_after_the_cut() -> None:
    model = models.tiny("llama")
    handle = attach(model, CONFIG)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in handle.factors())
        if not handle.shrunk:
            handle.shrink({n: m.sparse.grad.abs().mean(1) for n, m in handle.layers.items()})
    handle.merge()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for on in (False, True):
        model = models.tiny("llama").train()
        handle = attach(model, CONFIG)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in handle.factors()])
        handle.merge()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_weight_that_another_layer_shares_is_skipped_with_a_word_and_refused_by_name() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])})
    model.blocks[2].weight = model.blocks[0].weight
    handle = attach(model, CONFIG)
    assert list(handle.layers) == ["blocks.1"]
    assert handle.left_dense == {
        "blocks.0": "it shares its weight with 'blocks.2'", "blocks.2": "it shares its weight with 'blocks.0'",
    }  # fmt: skip
    handle.merge()
    with pytest.raises(ValueError, match="targets names 'blocks.0', which shares its weight with 'blocks.2'; untie"):
        attach(model, CONFIG, targets=("blocks.*",))
    tied = models.tiny("gpt2")
    with pytest.raises(ValueError, match="'lm_head', which shares its weight with 'transformer.wte'"):
        attach(tied, CONFIG, targets=("lm_head", "c_fc"))


def test_a_layer_that_is_used_twice_is_replaced_at_both_places() -> None:
    one = nn.Linear(8, 8)
    model = nn.Sequential(one, nn.Tanh(), one)
    x = torch.randn(3, 8)
    want = model(x)
    handle = attach(model, CONFIG)
    assert model[0] is model[2] and isinstance(model[0], LowRankSparse) and len(handle.layers) == 1
    torch.testing.assert_close(model(x), want)
    handle.merge()
    assert model[0] is model[2] and isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("fc_7",)}, r"targets has 'fc_7', which matches no module.*for example .*c_fc"),
        ({"targets": ("wte",)}, "'wte', but 'transformer.wte' is a Embedding, and only Linear and Conv1D"),
        ({"skip": ("fc_7",)}, "skip has 'fc_7', which matches none of the 8 layers"),
        ({"skip": ("c_*",)}, "no layer is left to compress: .* stays dense because skip names it"),
        ({"exact": True, "min_rows": {"fc_7": 3}}, "min_rows has 'fc_7', which matches none of the 8 compressed"),
        ({"exact": True, "min_rows": 60}, r"min_rows=60 needs \d+ entries of S and remaining=0.2 leaves \d+; raise"),
        ({"init": "activation"}, "init='activation' needs factors that have seen inputs; use compress_once"),
    ],
)
def test_names_that_mean_nothing_are_refused_and_the_model_left_alone(settings: dict, message: str) -> None:
    model = models.tiny("gpt2")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, CONFIG, **settings)
    assert list(model.state_dict()) == names


def test_skipped_layers_stay_dense_and_are_reported() -> None:
    model = models.tiny("gpt2")
    handle = attach(model, CONFIG, skip=("attn.*",))
    assert len(handle.layers) == 4 and set(handle.left_dense.values()) == {"skip names it"}
    handle.merge()


def test_factors_that_do_not_fit_are_refused() -> None:
    model = models.tiny("gpt2")
    handle = attach(model, CONFIG)
    factors = {n: (m.left.detach(), m.right.detach()) for n, m in handle.layers.items()}
    handle.merge()
    name = next(iter(factors))
    with pytest.raises(ValueError, match=f"factors has none for layer '{name}'"):
        attach(model, CONFIG, factors={n: f for n, f in factors.items() if n != name})
    with pytest.raises(ValueError, match=f"factors of '{name}' have shapes"):
        attach(model, CONFIG, factors=factors | {name: (torch.zeros(3, 1), torch.zeros(1, 3))})
    attach(model, CONFIG, factors=factors, init="activation").merge()


def test_a_compressed_or_quantised_model_is_refused() -> None:
    model = models.tiny("gpt2")
    handle = attach(model, CONFIG)
    with pytest.raises(ValueError, match="holds LoSparse layers already; call merge"):
        attach(model, CONFIG)
    handle.merge()
    attach(model, CONFIG).merge()
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {nn.Linear})
    with pytest.raises(ValueError, match="'0' is a quantised Linear; compress the model before it is quantised"):
        attach(packed, CONFIG)

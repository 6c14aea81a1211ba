"""Language models as policies: the road over hidden states gives what the model's own logits give."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from zq_lib.core import models
from zq_lib.core.backend import launches
from zq_lib.r3m import (
    PreferenceCollator,
    R3MConfig,
    ReferenceCache,
    RobustDPOLoss,
    head_of,
    labels_of,
    policy_logps,
    preference_terms,
)
from zq_lib.r3m import reference as ref
from zq_lib.r3m.data import EXAMPLE

SIZES = dict(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def _expected(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return ref.sequence_logps(logits, labels_of(batch))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma", "gemma3"])
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(arch: str, token_rows) -> None:
    model, batch = models.tiny(arch).double(), PreferenceCollator(0)(token_rows(4))
    given = torch.linspace(-20, -10, 8, dtype=torch.float64)
    assert head_of(model) is not None
    with launches() as seen:
        found = policy_logps(model, batch)
    assert [s.kernel for s in seen] == ["r3m.head_logps"]
    torch.testing.assert_close(found, _expected(model, batch), rtol=1e-9, atol=1e-9)
    hooks = len(model.get_decoder()._forward_hooks)
    grads = []
    for loss in (
        preference_terms(model, batch, given, RobustDPOLoss(R3MConfig(lam=0.4, beta=0.3))).loss,
        ref.dpo_loss(_expected(model, batch), given, 0.3, 0.4),
    ):
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert len(model.get_decoder()._forward_hooks) == hooks == 0


@pytest.mark.parametrize("kind", ["softcap", "granite", "cohere"])
def test_caps_are_supported_and_scaled_logits_take_the_models_own(kind: str, token_rows) -> None:
    torch.manual_seed(0)
    model = {
        "softcap": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, final_logit_softcapping=2.0, initializer_range=0.3, query_pre_attn_scalar=8)
        ),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0, initializer_range=0.3)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3, initializer_range=0.3)),
    }[kind]().eval()
    batch = PreferenceCollator(0)(token_rows(3))
    with launches() as seen:
        found = policy_logps(model, batch)
    assert [s.kernel for s in seen] == ["r3m.head_logps" if kind == "softcap" else "r3m.row_logps"]
    torch.testing.assert_close(found, _expected(model, batch), rtol=1e-5, atol=1e-4)
    terms = preference_terms(model, batch, found.detach(), RobustDPOLoss(R3MConfig(lam=0.4)))
    assert float(terms.margin.abs().max()) == pytest.approx(0, abs=1e-4), "a policy that is its own reference"
    terms.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_train_by_either_road(targets: list[str], token_rows) -> None:
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama", tie_word_embeddings=False), LoraConfig(r=2, target_modules=targets))
    batch = PreferenceCollator(0)(token_rows(4))
    given = policy_logps(model, batch).detach()
    assert (head_of(model) is None) == ("lm_head" in targets)
    loss, optimizer = RobustDPOLoss(R3MConfig(lam=0.4, beta=0.3)), torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.02
    )  # fmt: skip
    margins = []
    for _ in range(15):
        terms = preference_terms(model, batch, given, loss)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        margins.append(float(terms.margin.mean()))
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.1
    torch.testing.assert_close(terms.logps, terms.logps.detach())


def test_the_cache_gives_each_row_what_the_model_gives_it_and_survives_the_disk(token_rows, tmp_path) -> None:
    model, rows = models.tiny("llama"), token_rows(7)
    cache = ReferenceCache.of(model.train(), rows, size=3)
    assert model.training and not cache.logps.requires_grad
    batch = PreferenceCollator(0)(cache.join(rows))
    torch.testing.assert_close(batch["reference"], _expected(model.eval(), batch).detach(), rtol=1e-5, atol=1e-4)
    again = ReferenceCache.load(cache.save(tmp_path / "cache"))
    assert torch.equal(again.logps, cache.logps) and again.rows == cache.rows and not again.average
    averaged = ReferenceCache.of(model, rows, average=True)
    counts = torch.tensor([[len(r["chosen_ids"]), len(r["rejected_ids"])] for r in rows])
    torch.testing.assert_close(averaged.logps * counts, cache.logps, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the cache belongs to other rows, or to other tokens"):
        again.join(token_rows(7, seed=1))
    with pytest.raises(FileNotFoundError, match="holds no reference cache; it needs r3m_reference.json"):
        ReferenceCache.load(tmp_path)
    with pytest.raises(ValueError, match="rows is empty"):
        ReferenceCache.of(model, [])


def test_a_reference_that_overflows_is_named(token_rows) -> None:
    model = models.tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.inf
    with pytest.raises(ValueError, match="the reference gives row 0 a log-probability that is not finite"):
        ReferenceCache.of(model, token_rows(2))


def test_a_policy_that_overflows_is_named(token_rows) -> None:
    batch = PreferenceCollator(0)(token_rows(2))
    with pytest.raises(ValueError, match="the margin of pair 1 is -inf: its rewards overflow"):
        given = torch.zeros(4)
        given[1] = torch.inf
        preference_terms(models.tiny("llama"), batch, given, RobustDPOLoss(R3MConfig(lam=0.4)))
    assert batch[EXAMPLE].tolist() == [0, 1]

"""The embedded model: steered, it equals the paper's form in double precision, and it does what the paper says."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from oracle import paper_form, row
from transformers import DynamicCache

from zq_lib import pasta
from zq_lib.core.numerics import relative_rms

HEADS = {23: [4, 7, 5, 2, 0], 24: [5, 7], 18: [6], 19: [1, 0]}  # the ten best heads on knowledge conflicts
CONFLICT = (
    "Previously, the capital of France was Paris. *Currently, the capital of France is Rome.* The capital of France is"
)
OTHER = "*Previously, cats could fly.* Currently, cats can only walk and climb. Today, cats can"


@pytest.fixture(scope="module")
def runs(smollm2) -> SimpleNamespace:
    """Logits of the prompt and of four decode steps, steered and not, here and in the paper's form in float64."""
    model, tokenizer = smollm2
    prompt = pasta.encode(tokenizer, CONFLICT)
    later = tokenizer(" a city, and", return_tensors="pt").input_ids[0, :4]

    def steps(net: torch.nn.Module) -> list[torch.Tensor]:
        cache, found = DynamicCache(config=net.config), []
        with torch.no_grad():
            for ids in (prompt.input_ids, *later.view(4, 1, 1)):
                found.append(net(ids, past_key_values=cache).logits)
        return found

    found = SimpleNamespace(prompt=prompt, ids=torch.cat([prompt.input_ids, later[None]], 1), plain=steps(model))
    with pasta.attach(model, heads=HEADS) as steering, steering.steer(prompt):
        found.steered = steps(model)
    with paper_form(model, prompt, {}, 0.01) as double:
        found.plain64 = steps(double)
    with paper_form(model, prompt, HEADS, 0.01) as double:
        found.steered64 = steps(double)
    return found


def test_prefill_and_decode_steps_equal_the_papers_form_in_double_precision(runs: SimpleNamespace) -> None:
    """Within 1e-6, or within one and a half times the rounding of the unsteered model where that is larger."""
    rounding = [relative_rms(a, b) for a, b in zip(runs.plain, runs.plain64, strict=True)]
    error = [relative_rms(a, b) for a, b in zip(runs.steered, runs.steered64, strict=True)]
    effect = [relative_rms(a, b) for a, b in zip(runs.steered64, runs.plain64, strict=True)]
    assert max(error) < max(1e-6, 1.5 * max(rounding)), (error, rounding)
    assert min(effect) > 1e-2


def test_a_decode_step_equals_one_forward_over_everything(smollm2, runs: SimpleNamespace) -> None:
    model, _ = smollm2
    with pasta.attach(model, heads=HEADS) as steering, steering.steer(runs.prompt), torch.no_grad():
        whole = model(runs.ids).logits
    assert torch.allclose(torch.cat(runs.steered, 1), whole, atol=1e-4)


def test_a_conflict_flips_its_answer_and_flips_back_without_steering(smollm2, runs: SimpleNamespace) -> None:
    model, tokenizer = smollm2
    old, new = (tokenizer(word).input_ids[0] for word in (" Paris", " Rome"))
    plain, steered = (float(x[0][0, -1, new] - x[0][0, -1, old]) for x in (runs.plain, runs.steered))
    assert plain < 0 < steered
    with torch.no_grad():
        assert torch.equal(model(runs.prompt.input_ids).logits, runs.plain[0])  # detached without trace


def test_the_log_odds_of_the_marked_share_rise_by_minus_log_alpha(smollm2) -> None:
    """In the first steered layer every other input is the same, so the shift is exact there, in all of its heads."""
    model, tokenizer = smollm2
    prompt = pasta.encode(tokenizer, CONFLICT)
    for alpha, shift in ((0.01, 4.605170), (0.5, 0.693147)):
        with pasta.attach(model, heads={11: range(9)}, alpha=alpha) as steering:
            with steering.steer(prompt, record=True), torch.no_grad():
                model(prompt.input_ids)
            report = steering.report()
        moved = report.after[11].double().logit() - report.before[11].double().logit()
        assert torch.allclose(moved, torch.full_like(moved, shift), atol=2e-3)
        assert torch.equal(report.after[10], report.before[10])


def test_a_padded_batch_and_its_beams_equal_the_single_prompts(smollm2) -> None:
    model, tokenizer = smollm2
    batch = pasta.encode(tokenizer, [CONFLICT, OTHER])
    assert batch.attention_mask.min() == 0
    options = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2}
    with pasta.attach(model, heads=HEADS) as steering:
        together = steering.generate(batch, **options)[:, batch.input_ids.shape[1] :]
        for b in range(2):
            alone = row(batch, b)
            tokens = steering.generate(alone, **options)[:, alone.input_ids.shape[1] :]
            assert torch.equal(together[2 * b : 2 * b + 2, : tokens.shape[1]], tokens)
            with steering.steer(alone), torch.no_grad():
                single = model(**alone.inputs).logits[0, -1]
            with steering.steer(batch), torch.no_grad():
                padded = model(**batch.inputs, position_ids=batch.position_ids).logits[b, -1]
            assert torch.allclose(single, padded, atol=1e-4)


def test_an_unmarked_prompt_is_unsteered_bit_for_bit(smollm2, runs: SimpleNamespace) -> None:
    model, tokenizer = smollm2
    unmarked = pasta.encode(tokenizer, CONFLICT.replace("*", ""))
    assert torch.equal(unmarked.input_ids, runs.prompt.input_ids)
    for prompt, settings in ((unmarked, {}), (runs.prompt, {"alpha": 1.0})):
        with pasta.attach(model, heads=HEADS, **settings) as steering, steering.steer(prompt), torch.no_grad():
            assert torch.equal(model(prompt.input_ids).logits, runs.plain[0])


def test_the_shipped_profiles_belong_to_this_model_and_hold_its_best_heads(smollm2) -> None:
    model, _ = smollm2
    for task in ("conflict", "pick"):
        profile = pasta.shipped_profile(task)
        profile.check(model)
        assert {f.name for f in fields(profile)} >= {"scores", "fingerprint"}
        assert torch.tensor(profile.scores).shape == (30, 9)
        assert {(23, 4), (23, 7), (23, 5)} <= set(profile.top(10).pairs)
    with pasta.attach(model) as steering:
        assert steering.heads

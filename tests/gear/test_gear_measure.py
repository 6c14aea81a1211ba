"""The measuring protocol: what is scored, against what, and what it costs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from zq_lib.core.models import tiny
from zq_lib.gear import GearCache, GearConfig, measure
from zq_lib.gear.measure import Score

SMALL = GearConfig.plain(2, group=8, buffer=8)
LENGTHS = {"prompt": 40, "steps": 24}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(0))


def score(kl: list[float]) -> Score:
    return Score(torch.tensor(kl), torch.ones(len(kl), dtype=torch.bool), 2.0, 0)


def test_a_cache_that_compresses_nothing_scores_zero(llama, ids) -> None:
    found = measure.teacher_forced(llama, ids, GearConfig.plain(2, buffer=128), chunk=8, **LENGTHS)
    assert found.kl.abs().max() < 1e-5 and found.agree.all() and found.bits == 16 and len(found.kl) == 24


def test_the_score_is_that_of_a_model_that_runs_the_prompt_itself(llama, ids) -> None:
    """The protocol takes the prompt's keys from the full-precision run; that changes nothing."""
    found = measure.teacher_forced(llama, ids, SMALL, chunk=8, **LENGTHS)
    cache, logits = GearCache(llama.config, SMALL), []
    with torch.no_grad():
        llama(ids[:, :40], past_key_values=cache)
        for start in range(40, 64, 8):
            logits.append(llama(ids[:, start : start + 8], past_key_values=cache).logits[0])
        full = llama(ids[:, :64]).logits[0, 40:].log_softmax(-1)
    got = torch.cat(logits).log_softmax(-1)
    assert torch.allclose(found.kl, (full.exp() * (full - got)).sum(-1), atol=1e-5)
    assert found.kl.mean() > 1e-3 and found.bytes == cache.nbytes()


def test_more_bits_are_closer_to_full_precision(llama, ids) -> None:
    expected = measure.full_precision(llama, ids, **LENGTHS)
    two, four, eight = (
        measure.teacher_forced(llama, ids, SMALL.but(bits=b), chunk=8, expected=expected, **LENGTHS) for b in (2, 4, 8)
    )
    assert two.kl.mean() > 4 * four.kl.mean() > 16 * eight.kl.mean()
    assert two.bits == 2 + 32 / 8 and four.bits == 4 + 32 / 8


def test_bits_count_everything_stored_for_the_prompt(llama) -> None:
    cache = GearCache(llama.config, GearConfig(group=8, buffer=8, rank=1, outliers=0.25, sinks=0))
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    parts = cache.nbytes_by_component()
    assert parts["low rank"] and parts["outliers"] and parts["exact"] == 0
    assert measure.compressed_bits(cache) == 8 * cache.nbytes() / (3 * 2 * 2 * 8 * 8)


def test_wrong_lengths_are_refused(llama, ids) -> None:
    with pytest.raises(ValueError, match="give at least 100, or fewer steps"):
        measure.full_precision(llama, ids, prompt=40, steps=60)
    expected = measure.full_precision(llama, ids, prompt=40, steps=16)
    with pytest.raises(ValueError, match="expected is of prompt=40, steps=16, not 40 and 24"):
        measure.teacher_forced(llama, ids, SMALL, expected=expected, **LENGTHS)
    with pytest.raises(ValueError, match="a has 2 positions and b 3"):
        measure.paired(score([1.0, 2.0]), score([1.0, 2.0, 3.0]))


def test_differences_are_paired_by_position() -> None:
    difference, error = measure.paired(score([1.1, 2.1, 5.1]), score([1.0, 2.0, 5.0]))
    assert difference == pytest.approx(0.1) and error == pytest.approx(0.0, abs=1e-6)
    row = score([1.0, 3.0]).row(setting="x")
    assert row["setting"] == "x" and row["kl"] == 2.0 and row["kl_se"] == pytest.approx(1.0) and row["n"] == 2


def test_keys_and_values_are_those_of_a_full_precision_run(llama, ids) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    found = measure.keys_values(llama, ids)
    assert len(found) == 3
    assert all(torch.equal(k, layer.keys) for (k, _), layer in zip(found, cache.layers, strict=True))
    assert measure.relative_error(torch.ones(4), torch.zeros(4)) == 1.0


def test_the_texts_are_four_and_long_enough(smollm2) -> None:
    found = measure.texts(smollm2[1])
    assert tuple(found) == measure.TEXTS and all(ids.shape == (1, 1024) for ids in found.values())
    with pytest.raises(ValueError, match="tokens=5000 is more than the text 'reasoning' has; use at most 1"):
        measure.texts(smollm2[1], 5000)


def test_the_worked_answers_are_right() -> None:
    """Every calculation in the text that stands as `a op b = c`."""
    import re

    text, checked = measure.reasoning(), 0
    for a, op, b, c in re.findall(r"(?<![\d.+*/-] )(?<![\d.])([\d.]+) ([*/+-]) ([\d.]+) = ([\d.]*\d)", text):
        wanted = {"*": float(a) * float(b), "/": float(a) / float(b), "+": float(a) + float(b)}.get(op)
        wanted = float(a) - float(b) if wanted is None else wanted
        assert wanted == pytest.approx(float(c)), (a, op, b, c)
        checked += 1
    assert text.count("Question:") == text.count("The answer is") == 8 and checked >= 30


def test_at_8_bits_64_greedy_tokens_are_those_of_the_full_cache(smollm2) -> None:
    model, tokenizer = smollm2
    pair = measure.generate_pair(model, tokenizer, measure.reasoning()[:900], GearConfig.plain(8), 64)
    assert pair.divergence is None and len(pair.full) == 64 and pair.full == pair.compressed
    assert pair.cache.report()["bits_per_element"] < 16


def test_a_divergence_is_where_the_first_tokens_differ(smollm2) -> None:
    model, tokenizer = smollm2
    pair = measure.generate_pair(model, tokenizer, measure.reasoning()[:900], GearConfig.plain(2), 12)
    at = pair.divergence
    assert at is not None and pair.full[:at] == pair.compressed[:at] and pair.full[at] != pair.compressed[at]

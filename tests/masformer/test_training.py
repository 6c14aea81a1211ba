"""Continual training, its batches, and the tiny decoder with its recall task."""

from __future__ import annotations

import math

import pytest
import torch

from zq_lib.core.models import tiny
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.reference import masked_attention, visible
from zq_lib.masformer.spans import SpanPlan
from zq_lib.masformer.tiny import (
    FILLERS,
    KEYS,
    LENGTH,
    VALUES,
    VOCABULARY,
    TinyDecoder,
    angles,
    recall_batch,
    rotate,
    train_recall,
)  # fmt: skip
from zq_lib.masformer.training import TrainingConfig, batches, next_token_loss, perplexity, train


def texts(count: int = 6) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (n,), generator=source) for n in range(20, 20 + count)]


def test_training_lowers_the_loss_and_gives_the_model_back_in_eval_mode() -> None:
    model = tiny("llama")
    row = texts(1)[0].repeat(3)[None, :48]
    with attach(model, full=(1,), window=7) as conversion:
        before = float(next_token_loss(model, row).detach())
        rows = list(train(model, (row for _ in range(100)), TrainingConfig(steps=12, rate=3e-3)))
        assert float(next_token_loss(model, row).detach()) < 0.8 * before
        assert conversion.report().local_calls > 0 and conversion.report().masked_calls == 0
    assert [r["step"] for r in rows] == list(range(1, 13)) and rows[-1]["tokens"] == 12 * 48
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_only_the_attention_moves_when_asked() -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with attach(model, full=(1,), window=7):
        list(train(model, batches(texts(), length=32), TrainingConfig(steps=2, trainable="attention")))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "self_attn" in name}


def test_leaving_the_loop_early_cleans_up() -> None:
    model = tiny("llama")
    loop = train(model, batches(texts(), length=32), TrainingConfig(steps=5, trainable="attention"))
    next(loop)
    loop.close()
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    found = []
    rows = list(next(batches(texts(), length=32, batch=4)))
    for source, accumulate in (([torch.stack(rows)], 1), ([r[None] for r in rows], 4)):
        model = tiny("llama")
        list(train(model, source, TrainingConfig(steps=1, accumulate=accumulate, clip=1e9)))
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; use a smaller rate than 0.0001"):
        next(train(model, batches(texts(), length=32)))


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    config = TrainingConfig(steps=20, rate=1e-3, warmup=0.2)
    rates = [config.rate_at(step) for step in range(1, 21)]
    assert rates[3] == max(rates) == 1e-3 and rates[0] == 2.5e-4 and rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps=0 must be"),
        ({"rate": 3.0}, "rate=3.0 must lie"),
        ({"warmup": 2}, "warmup=2 is a part"),
        ({"trainable": "mlp"}, "trainable='mlp' is not known; choose one of all, attention"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_rows_repeat_with_the_seed_and_processes_share_them_out() -> None:
    def take(count, **given):  # noqa: ANN001, ANN202
        source = batches(texts(), length=30, end=1, **given)
        return [next(source) for _ in range(count)]

    whole = torch.cat(take(6))
    assert torch.equal(whole, torch.cat(take(3, batch=2)))
    assert not torch.equal(whole, torch.cat(take(6, seed=1)))
    parts = [torch.cat(take(3, rank=rank, ranks=2)) for rank in (0, 1)]
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])
    assert (whole == 1).any(), "texts are joined by the end token"


def test_a_quoting_row_ends_with_its_beginning() -> None:
    row = next(batches(texts(), length=30, quote=8))[0]
    assert torch.equal(row[-8:], row[:8]) and len(row) == 30
    with pytest.raises(ValueError, match="quote=15 tokens do not fit twice into length=30; give 0 to 14"):
        next(batches(texts(), length=30, quote=15))


def test_perplexity_counts_every_token_after_the_context_once() -> None:
    model, (a, b) = tiny("llama"), texts(2)
    with torch.no_grad():
        losses = [
            -model(ids[None]).logits[0].log_softmax(-1)[i - 1, ids[i]] for ids in (a, b) for i in range(5, len(ids))
        ]
    assert perplexity(model, [a, b], skip=5) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)


def test_the_tiny_decoder_follows_its_plan() -> None:
    plan = SpanPlan((None, 6, (3, 9, 9, 2)), "window", 2)
    torch.manual_seed(0)
    model = TinyDecoder(plan)
    ids, _ = recall_batch(3, torch.Generator().manual_seed(0))
    x, (cos, sin) = model.embed(ids), angles(LENGTH, 16)
    for block, span in zip(model.blocks, plan.layers, strict=True):
        q, k, v = block.qkv(block.norms[0](x)).view(3, LENGTH, 3, 4, 16).permute(2, 0, 3, 1, 4)
        mask = visible(LENGTH, LENGTH, span, "window", 2)
        y = masked_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)[0]
        x = x + block.out(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norms[1](x))
    torch.testing.assert_close(model(ids), model.head(model.norm(x)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="width=20 must be a multiple of twice heads=4, for example"):
        TinyDecoder(plan, width=20)


def test_every_question_is_answered_by_a_fact_beyond_the_window() -> None:
    ids, wanted = recall_batch(50, torch.Generator().manual_seed(0))
    assert ids.shape == (50, LENGTH) and ids.max() < VOCABULARY
    facts, asked = ids[:, :KEYS], ids[:, -KEYS:] - KEYS * VALUES
    for row in range(50):
        said = {int(f) // VALUES: int(f) % VALUES for f in facts[row]}
        assert [said[int(k)] for k in asked[row]] == wanted[row].tolist() and len(said) == KEYS
    assert FILLERS + 1 > 8


def test_recall_training_repeats_with_the_seed_and_stops_when_it_is_solved() -> None:
    plan = SpanPlan.mixed(2, full=(1,), span=8)
    rows = list(train_recall(plan, steps=5, check=2))
    assert [r["step"] for r in rows] == [2, 4, 5] and rows == list(train_recall(plan, steps=5, check=2))
    assert rows != list(train_recall(plan, steps=5, check=2, seed=1))
    assert [r["step"] for r in train_recall(plan, steps=5, check=2, enough=0.0)] == [2]


SCRIPT = """
import json, os, sys
import torch
from accelerate import Accelerator
from zq_lib.core.models import tiny
from zq_lib.masformer.conversion import attach
from zq_lib.masformer.training import TrainingConfig, batches, train

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
accelerator, model = Accelerator(cpu=True), tiny("llama")
source = torch.Generator().manual_seed(0)
texts = [torch.randint(3, 128, (n,), generator=source) for n in range(20, 26)]
with attach(model, full=(1,), window=7) as conversion:
    stream = batches(texts, length=32, rank=rank, ranks=2)
    rows = list(train(model, stream, TrainingConfig(steps=3, rate=1e-3, clip=1e9), accelerator=accelerator))
    local = conversion.report().local_calls
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump({"loss": [r["loss"] for r in rows], "weights": weights.tolist(), "local": local}, file)
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_the_same_model_as_one_with_both_batches(two_processes) -> None:
    one, two = two_processes(SCRIPT)
    assert one["weights"] == two["weights"] and one["loss"] != two["loss"] and one["local"] == 6
    model = tiny("llama")
    with attach(model, full=(1,), window=7):
        rows = list(train(model, batches(texts(), length=32, batch=2), TrainingConfig(steps=3, rate=1e-3, clip=1e9)))
    alone = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(torch.tensor(one["weights"]), alone, rtol=0, atol=2e-4)
    assert [(a + b) / 2 for a, b in zip(one["loss"], two["loss"], strict=True)] == pytest.approx(
        [r["loss"] for r in rows], abs=1e-3
    )

"""Beside what others bring: mixed precision, gradient checkpointing, compilation, generation, gradient accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zq_lib.adalora import AdaLoraConfig, attach
from zq_lib.core import models

CONFIG = AdaLoraConfig(init_rank=4, target_rank=2, total_steps=12, warmup=1, final=4, interval=2)
IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))


def _train(model, handle, steps: int = 12):
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_that_mixed_precision_skips_moves_neither_schedule_nor_scores(toy, batches) -> None:
    handle = attach(toy, CONFIG)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids, labels = batches[0]
    for overflow in (False, True, False):
        loss = nn.functional.cross_entropy(toy(ids), labels)
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert handle.step == 2
    assert handle.importance.sensitivity.isfinite().all() and handle.importance.sensitivity.any()


def test_scores_do_not_depend_on_the_loss_scale(toy, batches) -> None:
    found = []
    for scale in (1.0, 4096.0):
        model = copy.deepcopy(toy)
        torch.manual_seed(0)
        handle = attach(model, CONFIG)
        optimizer = torch.optim.SGD(handle.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for ids, labels in batches[:3]:
            scaler.scale(nn.functional.cross_entropy(model(ids), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(handle.importance.scores())
        handle.detach()
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma"])
def test_every_architecture_trains_to_its_budget_generates_and_merges(arch: str) -> None:
    model = models.tiny(arch)
    handle = attach(model, CONFIG)
    _train(model, handle)
    assert handle.report().active == 2 * len(handle.adapters)
    model.eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    with torch.no_grad():
        apart = model(input_ids=IDS, attention_mask=mask).logits
        said = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        handle.merge()
        merged = model(input_ids=IDS, attention_mask=mask).logits
        assert torch.equal(
            model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2), said
        )
    assert (apart - merged)[mask.bool()].abs().max() <= 1e-5 * apart.abs().max()
    handle.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains_to_its_budget(dtype: torch.dtype) -> None:
    model = models.tiny("llama").to(dtype)
    handle = attach(model, CONFIG, alpha=1.0)
    _train(model, handle)
    assert handle.report().active == 2 * len(handle.adapters)
    assert all(p.isfinite().all() for p in handle.parameters())


def test_autocast_runs_the_adapter_in_its_type() -> None:
    model = models.tiny("llama")
    handle = attach(model, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(a.values.grad.dtype == torch.float32 and a.values.grad.any() for a in handle.adapters)
    handle.detach()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for on in (False, True):
        model = models.tiny("llama").train()
        torch.manual_seed(0)
        handle = attach(model, CONFIG)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([a.values.grad.clone() for a in handle.adapters])
        handle.detach()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_compiled_model_follows_the_schedule_and_the_removal(toy, batches, train) -> None:
    handle = attach(toy, CONFIG, interval=4)
    compiled = torch.compile(toy, backend="eager")
    train(compiled, torch.optim.AdamW(handle.parameters(), lr=1e-2), batches[:12])
    assert handle.shrunk and handle.report().active == 2 * len(handle.adapters)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batches[0][0]), toy(batches[0][0]))
    handle.detach()


def test_accumulated_gradients_count_as_one_step_with_one_penalty(toy, batches) -> None:
    found = []
    for parts in (1, 4):
        model = copy.deepcopy(toy)
        torch.manual_seed(0)
        handle = attach(model, CONFIG)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for ids, labels in batches[:6]:
            for x, y in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.step == 6
        found.append([p.detach() for p in handle.parameters()])
        handle.detach()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

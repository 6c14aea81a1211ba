"""Layers are matched as the map says, and their states are taken from any model without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from zq_lib.ted import TedConfig, match, reference, see, watch
from zq_lib.ted.layers import blocks, mask_of, pool, width

from .conftest import DECODERS, ENCODERS


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
def test_states_are_the_blocks_outputs_and_no_trace_is_left(arch: str, side: str, make, batch_of) -> None:
    model, batch = make(arch), batch_of(side=side)
    before = model.state_dict()
    plain = {k: v for k, v in batch.items() if k != "example"}
    logits = model(**plain).logits
    seen = see(model, batch, (1, 3, 4))
    assert _hooks(model) == 0 and not hasattr(model, "_output_capturing_hooks_installed")
    assert torch.equal(seen.logits, logits) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    hidden = model(**plain, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for state, own in zip(seen.states[:2], (hidden[1], hidden[3]), strict=True):
        torch.testing.assert_close(state[real], own[real])
    last = seen.states[2]
    if arch in (*DECODERS, "modernbert"):
        assert not torch.allclose(last[real], hidden[4][real]), "the last entry is after the final norm"
    else:
        torch.testing.assert_close(last[real], hidden[4][real])


def test_hooks_are_gone_even_when_the_model_fails(make) -> None:
    model = make()
    with pytest.raises(ZeroDivisionError), watch(model, (1,)):
        _ = 1 / 0
    assert _hooks(model) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "config", "pairs"),
    [
        (3, 6, TedConfig(), ((1, 2, 3), (2, 4, 6))),
        (2, 5, TedConfig(), ((1, 2), (3, 5))),
        (4, 4, TedConfig(), ((1, 2, 3, 4), (1, 2, 3, 4))),
        (3, 6, TedConfig(layers="interval"), ((1, 2, 3), (2, 4, 6))),
        (4, 6, TedConfig(layers="interval"), ((2, 4), (3, 6))),
        (4, 6, TedConfig(pairs=1), ((4,), (6,))),
        (4, 6, TedConfig(layers=((1, 6), (4, 2))), ((1, 4), (6, 2))),
    ],
)
def test_layers_are_matched_as_the_map_says(student, teacher, config, pairs, make) -> None:
    found = match(make(depth=student, width=8), make(depth=teacher, width=16), config)
    assert (found.student, found.teacher) == pairs and found.filter_dim == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TedConfig(layers=((1, 7),)), "layer 7 of the teacher is out of range: it has 6 blocks, counted from 1; use 1"),
        (TedConfig(layers=((5, 1),)), "layer 5 of the student is out of range: it has 4 blocks"),
        (TedConfig(pairs=5), "pairs=5 is more than the 4 student and 6 teacher layers allow; use at most 4"),
        (TedConfig(layers="interval", pairs=3), "pairs=3 does not cut 4 student and 6 teacher .* use one of 1, 2, or"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(config: TedConfig, message: str, make) -> None:
    with pytest.raises(ValueError, match=message):
        match(make(depth=4), make(depth=6), config)


def test_a_model_without_one_stack_of_blocks_is_refused() -> None:
    sizes = {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 8, "d_kv": 4, "vocab_size": 20}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has 2 stacks of blocks"):
        blocks(T5ForConditionalGeneration(T5Config(**sizes)))
    with pytest.raises(ValueError, match="Linear has 0 stacks of blocks; TED needs one"):
        blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear does not say its width"):
        width(nn.Linear(2, 2))


@pytest.mark.parametrize("how", ["first", "mean", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_is_the_references_wherever_the_padding_is(how: str, side: str, batch_of) -> None:
    mask = batch_of(side=side)["attention_mask"]
    z = torch.randn(*mask.shape, 5)
    want = reference.pool(z, mask, how)
    z[mask == 0] = torch.nan
    torch.testing.assert_close(pool(z, mask.bool(), how), want)


def test_a_row_of_padding_alone_is_refused(batch_of) -> None:
    batch = batch_of()
    batch["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="row 2 of attention_mask is all padding; drop rows without a token"):
        mask_of(batch, (4, 9))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 9\) and the states \(4, 8\)"):
        mask_of(batch, (4, 8))

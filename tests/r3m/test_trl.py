"""The adapters for TRL's trainers: against a stand-in always, against TRL where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zq_lib.core import models
from zq_lib.r3m import PreferenceCollator, R3MConfig, ReferenceCache, robust_dpo, robust_reward
from zq_lib.r3m import reference as ref
from zq_lib.r3m.data import labels_of


class Plain:
    """What an adapter needs of a trainer: nothing but to be a class."""


def _trl_batch(token_rows, model) -> dict[str, torch.Tensor]:
    rows = token_rows(4)
    batch = PreferenceCollator(0)(ReferenceCache.of(model, rows).join(rows))
    chosen, rejected = (batch.pop("reference") + torch.arange(8.0)).chunk(2)
    return batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def test_the_adapter_gives_the_references_loss_on_a_batch_of_trls_layout(token_rows) -> None:
    model = models.tiny("llama", vocab_size=60)
    batch = _trl_batch(token_rows, model)
    loss = robust_dpo(Plain, R3MConfig(lam=0.4, beta=0.3))().compute_loss(model, batch)
    policy = ref.sequence_logps(
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, labels_of(batch)
    )
    given = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    torch.testing.assert_close(loss, ref.dpo_loss(policy, given, 0.3, 0.4), rtol=1e-5, atol=1e-6)
    del batch["ref_chosen_logps"]
    with pytest.raises(ValueError, match="no 'ref_chosen_logps'; set precompute_ref_log_probs=True in DPOConfig"):
        robust_dpo(Plain, R3MConfig())().compute_loss(model, batch)


def test_the_adapter_of_rewards_takes_the_chosen_first() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask):
            return self.scale * (input_ids * attention_mask).sum(1)

    ids = torch.tensor([[1], [2], [4], [0]])
    trainer = robust_reward(Plain, R3MConfig(lam=0.3))()
    loss, _ = trainer.compute_loss(Sum(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, True)
    assert float(loss) == pytest.approx(float(ref.profile_loss(torch.tensor([-3.0, 2.0]), 0.3).mean()))


def test_at_lam_1_trls_own_sigmoid_loss_is_reproduced(token_rows, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = models.tiny("llama", vocab_size=60)
    batch = _trl_batch(token_rows, model)
    args = trl.DPOConfig(str(tmp_path), beta=0.3, precompute_ref_log_probs=True, use_cpu=True, report_to=[], bf16=False)
    data = datasets.Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    trainer = trl.DPOTrainer(model, args=args, train_dataset=data)
    expected = trainer.compute_loss(model, batch)
    found = robust_dpo(Plain, R3MConfig(lam=1.0, beta=0.3))().compute_loss(model, batch)
    assert abs(float(found) - float(expected)) <= 1e-6

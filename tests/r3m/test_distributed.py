"""Two processes: parameters, cut-off and report are the same in both, with other data in each."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from accelerate import Accelerator
from zq_lib.core import models
from zq_lib.r3m import *

folder, how = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
accelerator = Accelerator(cpu=True)
source = torch.Generator().manual_seed(10 + rank)
losses = []
if how == "policy":
    from transformers import TrainingArguments
    everyone = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(3, 60, (4,), generator=everyone).tolist()
    rows = [{"prompt_ids": draw(), "chosen_ids": draw(), "rejected_ids": draw(), "example": i} for i in range(16)]
    args = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, gradient_accumulation_steps=2)
    trainer = RobustDPOTrainer(models.tiny("llama", vocab_size=60), args, config=R3MConfig(lam=0.4), train_dataset=rows)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    model, lam, report, losses = trainer.model, 0.4, trainer.report(), [rank]
else:
    chosen, rejected = torch.randn(2, 24, 5, 3, generator=source)
    torch.manual_seed(0)
    model = SegmentReward(3, (8,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    loss = RobustRewardLoss(R3MConfig(lam="auto", outlier_budget=0.2))
    batches = PairBatches(chosen, rejected, 8)
    steps = fit_reward(model, batches, optimizer, loss, epochs=2, accumulate=int(how), backward=accelerator.backward)
    losses = [step.loss for step in steps]
    margin, index = pair_margins(model, batches)
    lam, report = loss.lam, outlier_report(margin, index + 24 * rank, lam=loss.lam)
with open(f"{folder}/{rank}.json", "w") as file:
    found = [p.detach().flatten().tolist() for p in model.parameters()]
    json.dump({"model": found, "lam": lam, "report": report.to_json(), "pairs": report.pairs, "losses": losses}, file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("how", "steps", "pairs"), [("2", 4, 48), ("policy", 1, 16)])
def test_two_processes_train_the_same_model_and_make_one_report(
    how: str, steps: int, pairs: int, two_processes
) -> None:
    one, two = two_processes(SCRIPT, how)
    assert one["model"] == two["model"] and one["lam"] == two["lam"] and one["report"] == two["report"]
    assert one["pairs"] == pairs and one["losses"] != two["losses"] and len(one["losses"]) == steps

"""Two processes: filters and student are the same in both after each stage, with other data in each."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification
from zq_lib.ted import TedConfig, TedLoss, distil, fit, task_filters

folder, how = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)

def model(depth, width):
    torch.manual_seed(depth)
    return BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=width, num_hidden_layers=depth,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=32, num_labels=3))

teacher, student = model(4, 16).eval(), model(2, 8)
source = torch.Generator().manual_seed(10 + rank)
words = [torch.randint(40, (8, 6), generator=source) for _ in range(5)]
batches = [{"input_ids": ids, "labels": ids[:, 0] % 3} for ids in words]
torch.manual_seed(100 + rank)  # filters begin apart
config = TedConfig(filter_dim=6)
pair = task_filters(teacher, student, config)
for filters in pair:
    list(fit(filters, batches))
first = [p.detach().flatten()[:4].tolist() for f in pair for p in f.parameters()] + [f.variance.tolist() for f in pair]
ted = TedLoss(teacher, *pair, config)
if how == "trainer":
    from transformers import TrainingArguments
    from zq_lib.ted import TedTrainer
    rows = [{"input_ids": ids[i], "labels": int(ids[i, 0] % 3)} for ids in words for i in range(8)]
    args = TrainingArguments(output_dir=folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2)
    trainer = TedTrainer(student, args, ted=ted, train_dataset=rows)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    losses = [rank]
else:
    optimizer = torch.optim.AdamW([*student.parameters(), *ted.parameters()], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    steps = distil(wrapped, ted, batches, optimizer, epochs=2, accumulate=int(how), backward=accelerator.backward)
    losses = [float(s.terms.total) for s in steps]
second = [p.detach().flatten()[:4].tolist() for m in (student, ted) for p in m.parameters()]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"first": first, "second": second, "losses": losses}, file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("how", "steps"), [("2", 6), ("trainer", 1)])
def test_two_processes_train_the_same_filters_and_the_same_student(how: str, steps: int, two_processes) -> None:
    """With accelerate, two batches an update, and with the Trainer."""
    one, two = two_processes(SCRIPT, how)
    assert one["first"] == two["first"] and one["second"] == two["second"]
    assert one["losses"] != two["losses"], "each has data of its own"
    assert len(one["losses"]) == steps

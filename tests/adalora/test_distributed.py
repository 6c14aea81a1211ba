"""Two processes: every one keeps the same triplets, with accelerate's DDP and with gradients that differ."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from zq_lib.adalora import AdaLoraConfig, attach

folder, mode = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
config = AdaLoraConfig(init_rank=4, target_rank=2, total_steps=24, warmup=2, final=8, interval=2)
handle = attach(model, config, targets=("0", "2", "4"))
optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0)
source = torch.Generator().manual_seed(10 + rank)  # other data in every process
if mode == "accelerate":
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
else:
    dist.init_process_group("gloo")
    wrapped = model
for _ in range(24):
    x = torch.randn(8, 6, generator=source)
    loss = (wrapped(x) - x[:, :2] * x[:, 2:4]).square().mean()
    accelerator.backward(loss) if mode == "accelerate" else loss.backward()
    optimizer.step()
    optimizer.zero_grad()
trace = handle.trace
first = [p.detach().flatten()[:3].tolist() for p in handle.parameters()]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"keep": [k.tolist() for k in trace.keep], "scores": [s.tolist() for s in trace.scores],
               "active": int(handle.keep.sum()), "steps": handle.step, "shrunk": handle.shrunk,
               "nonzero": sum(int((a.values != 0).sum()) for a in handle.adapters), "first": first}, file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["accelerate", "bare"])
def test_two_processes_keep_the_same_triplets(mode: str, two_processes) -> None:
    one, two = two_processes(SCRIPT, mode)
    assert one["keep"] == two["keep"] and one["scores"] == two["scores"] and len(one["keep"]) >= 7
    assert one["active"] == two["active"] == one["nonzero"] == two["nonzero"] == 6 and one["steps"] == 24
    assert not one["shrunk"], "DDP's buckets keep the size of the parameters it was given"
    same = one["first"] == two["first"]
    assert same if mode == "accelerate" else not same, "bare processes train apart, and still keep the same triplets"

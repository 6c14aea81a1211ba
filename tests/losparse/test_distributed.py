"""Two processes: every one keeps the same rows, with accelerate's DDP and with gradients that differ."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from zq_lib.losparse import LoSparseConfig, attach

folder, mode = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
config = LoSparseConfig(low_rank=0.1, remaining=0.3, total_steps=24, warmup=2, final=8, interval=2)
handle = attach(model, config, targets=("0", "2"))
source = torch.Generator().manual_seed(10 + rank)  # other data in every process
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
if mode == "accelerate":
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
else:
    dist.init_process_group("gloo")
    wrapped = model
keeps, scores = [], []
for _ in range(24):
    x = torch.randn(8, 6, generator=source)
    loss = (wrapped(x) - x[:, :2] * x[:, 2:4]).square().mean()
    accelerator.backward(loss) if mode == "accelerate" else loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    keeps.append(handle.keep.tolist())
nonzero = [int(m.sparse.any(1).sum()) for m in handle.layers.values()]
shrunk, first = handle.shrunk, [p.detach().flatten()[:3].tolist() for p in model.parameters()]
before = model(x)
report = handle.finish()
same = bool(torch.allclose(model(x), before, atol=1e-6))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"keeps": keeps, "nonzero": nonzero, "rows": [x.rows for x in report.layers], "shrunk": shrunk,
               "cut": handle.shrunk, "first": first, "same": same, "steps": handle.step, "trace": handle.trace.rows},
              file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["accelerate", "bare"])
def test_two_processes_keep_the_same_rows(mode: str, two_processes) -> None:
    one, two = two_processes(SCRIPT, mode)
    assert one["keeps"] == two["keeps"] and one["trace"] == two["trace"] and len(one["trace"]) >= 7
    assert one["rows"] == two["rows"] == one["nonzero"] == two["nonzero"] and 0 < sum(one["rows"]) < 14
    assert not one["shrunk"], "DDP's buckets keep the size of the parameters it was given"
    assert one["cut"] and two["cut"] and one["same"] and two["same"] and one["steps"] == 24
    same = one["first"] == two["first"]
    assert same if mode == "accelerate" else not same, "bare processes train apart, and still keep the same rows"

"""Two processes: every one keeps the same triplets, with accelerate's DDP and with gradients that differ."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from zq_lib.adalora import AdaLoraConfig, attach

mode, folder = sys.argv[1], sys.argv[2]
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
def test_two_processes_keep_the_same_triplets(mode: str, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    runs = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "train.py"), mode, str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["keep"] == two["keep"] and one["scores"] == two["scores"] and len(one["keep"]) >= 7
    assert one["active"] == two["active"] == one["nonzero"] == two["nonzero"] == 6 and one["steps"] == 24
    assert not one["shrunk"], "DDP's buckets keep the size of the parameters it was given"
    same = one["first"] == two["first"]
    assert same if mode == "accelerate" else not same, "bare processes train apart, and still keep the same triplets"

"""What ``import taskgrad`` brings along."""

from __future__ import annotations

import subprocess
import sys

SLOW = (
    "triton",
    "torch.distributed.tensor",
    "torch._inductor",
    "torch._dynamo",
    "sympy",
    "transformers",
)  # 0.2 s and more


def modules(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_nothing_slow_is_imported_that_torch_does_not_import_itself():
    added = modules("import taskgrad") - modules("import torch")
    assert "taskgrad.ops.segment_sum" in added
    assert not [name for name in sorted(added) if any(name == slow or name.startswith(f"{slow}.") for slow in SLOW)]


def test_sharded_parameters_are_still_refused():
    code = """
import torch, taskgrad
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
import os
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = nn.Linear(2, 2)
mesh = init_device_mesh("cpu", (1,))
model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
try:
    taskgrad.track(model, ["a"], torch.optim.SGD(model.parameters(), 0.1))
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sharded parameters (DTensor" in done.stdout, done.stderr

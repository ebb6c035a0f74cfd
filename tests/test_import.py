"""What ``import taskgrad`` brings along: nothing, until it is asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["taskgrad", "taskgrad.sampling", "taskgrad.sampling.policies", "taskgrad.cli"])
def test_torch_is_not_imported_before_it_is_needed(name: str) -> None:
    assert "torch" not in modules(f"import {name}")


def test_policies_and_task_indices_work_where_there_is_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import taskgrad
from taskgrad.sampling import Ledger, TaskIndex, policies
TaskIndex.build(sys.argv[1], np.array([0, 0, 1]), tasks=["a", "b"])
print(len(TaskIndex.open(sys.argv[1])), taskgrad.policies is policies, policies.Uniform(), Ledger.__name__)
try:
    taskgrad.AdaptiveBatchSampler
except ImportError as error:
    print(type(error).__name__, error.name)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 True Uniform() Ledger"), done.stdout
    assert done.stdout.endswith("ModuleNotFoundError torch.utils\n")


def test_nothing_slow_is_imported_that_torch_does_not_import_itself() -> None:
    added = modules("from taskgrad import *") - modules("import torch")
    assert {"taskgrad.ops.segment_sum", "taskgrad.tracking.tracker", "taskgrad.sampling.sampler"} <= added
    assert not [name for name in sorted(added) if any(name == slow or name.startswith(f"{slow}.") for slow in SLOW)]


@pytest.mark.parametrize("package", ["taskgrad", "taskgrad.sampling"])
def test_type_checkers_are_told_of_the_names_that_there_are(package: str) -> None:
    """Every name comes from where the import for type checkers says, and all of ``__all__`` is there."""
    module = importlib.import_module(package)
    (block,) = [n for n in ast.parse(Path(module.__file__).read_text()).body if isinstance(n, ast.If)]
    told = [(node.module, alias.name) for node in block.body for alias in node.names]
    for home, name in told:
        value = getattr(module, name)
        assert value is getattr(importlib.import_module(f"{package}.{home}" if home else package), name)
        assert name in vars(module)  # from now on it is found as any other name
    assert {name for _, name in told} <= set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.slow
def test_all_is_what_a_star_imports() -> None:
    code = "from taskgrad import *; import taskgrad; print(sorted(set(taskgrad.__all__) - set(globals())))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["capture", "checkpoint", "ops", "report", "sampling"])
def test_modules_are_there_after_an_import_of_the_package_alone(name: str) -> None:
    code = f"import taskgrad; print(taskgrad.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"taskgrad.{name}\n"


@pytest.mark.parametrize("package", ["taskgrad", "taskgrad.sampling"])
def test_a_name_that_is_not_there(package: str) -> None:
    module = importlib.import_module(package)
    assert not hasattr(module, "no_such_name")
    with pytest.raises(AttributeError, match=rf"^module '{package}' has no attribute 'trak'$"):
        module.trak  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'trak'"):
        exec(f"from {package} import trak")


@pytest.mark.slow
def test_sharded_parameters_are_still_refused() -> None:
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

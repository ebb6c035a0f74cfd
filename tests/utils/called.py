"""Which of the package's ops run, also those that ops call."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """``ops``: the names of ``torch.ops.taskgrad`` that ran inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "taskgrad":
            self.ops.append(func._opname)
            with self:  # what an op calls is seen as well
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

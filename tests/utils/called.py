"""Which of torch's ops run, also those that the package's ops call."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """``ops``: the names of ``torch.ops.taskgrad`` that ran inside, in order; ``products``: the shapes of what ``mm``
    gave."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "taskgrad":
            self.ops.append(func._opname)
            with self:  # what it calls passes here too
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.products.append(tuple(out.shape))
        return out

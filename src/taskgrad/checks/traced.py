"""Whether what runs now is recorded rather than computed, or looked at by somebody else."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def traced() -> bool:
    """Whether ``torch.jit.trace``, ``torch.export``, ``make_fx``, a ``torch.func`` transform or any TorchDispatchMode
    (which counts, or makes tensors of no values) sees the calls that are made now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or bool(_get_current_dispatch_mode_stack())
    )

"""What every op asks of its arguments, and what malformed ones do where nobody may wait for their values.

The order is always: type, dtype and device -> shape -> contiguity -> empty -> values -> dispatch. A public function
asks for all but the values, the op for all of it when it runs: ``torch.ops.taskgrad`` is as safe as the functions, and
what is compiled as safe as what is not. The C++ kernels ask by themselves (``csrc/ops/segments.h``).

On a GPU values are not waited for. Kernels keep every offset and index inside of its tensor, so malformed ones read and
write nothing else; the public functions put NaN into the whole result then (``fault_on_gpu``, ``spoiled``), which is a
flag that cannot be overlooked and costs no synchronisation. ``torch.ops.taskgrad`` trusts its caller with that: its
result is undefined.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native

MOST = 1 << 40  # elements of an operand: a broadcast view may claim more than any loop ends on
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

torch.library.define("taskgrad::segments_hold", "(Tensor? order, Tensor offsets, SymInt entries) -> bool")


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: float64 stays, everything else is accumulated in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_operand(name: str, x: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise TypeError unless ``x`` is a dense tensor of one of ``dtypes``, on a CPU or CUDA device or on meta."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, got {x.dtype}: convert it first")
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        raise TypeError(f"{name} must be on a cpu or cuda device, got {x.device}: move it with .to() first")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}: use .to_dense()")
    if x.numel() > MOST:
        raise ValueError(f"{name} must have at most 2**40 elements, got the shape {list(x.shape)}")


def _apart(x: Tensor, operand: Tensor) -> bool:
    """Whether they are on different devices; quick where both are on the CPU, as this is asked for every argument."""
    return not (x.is_cpu and operand.is_cpu) and x.device != operand.device


def check_real(name: str, x: Tensor) -> None:
    """Raise TypeError if ``x`` has a shape and no values: only ``torch.ops.taskgrad`` goes by shapes alone."""
    if x.is_meta:
        raise TypeError(f"{name} must be on a cpu or cuda device, got {x.device}: move it with .to() first")


def check_like(name: str, x: Tensor, of: str, operand: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError unless ``x`` is dense, on the device of ``operand`` and of its dtype, or of ``dtype``."""
    wanted = operand.dtype if dtype is None else dtype
    check_operand(name, x, (wanted,))
    if _apart(x, operand):
        raise TypeError(f"{name} must be on {operand.device} as {of} is, got {x.device}: use {name}.to({of}.device)")


def check_map(name: str, side: Tensor | None, of: str, operand: Tensor) -> None:
    """The same for one side of a sketch, of any floating dtype; ``None`` is the identity."""
    if side is not None:
        check_operand(name, side)
        if _apart(side, operand):
            raise TypeError(f"{name} must be on {operand.device} as {of} is, got {side.device}: move it first")


def check_map_shape(name: str, side: Tensor | None, size: int) -> None:
    """Raise ValueError unless ``side`` is ``None`` or [size, r]."""
    if side is not None and (side.dim() != 2 or side.shape[0] != size):
        raise ValueError(f"{name} must have shape [{size}, r], got {list(side.shape)}")


def check_segments(order: Tensor | None, offsets: Tensor, of: str, operand: Tensor) -> None:
    """Raise TypeError unless ``order`` is int64 on the device of ``operand`` and ``offsets`` int64 or int32, there or
    on the CPU."""
    check_operand("offsets", offsets, (torch.int64, torch.int32))
    if not offsets.is_cpu and _apart(offsets, operand):
        raise TypeError(f"offsets must be on {operand.device} as {of} is, or on the cpu, got {offsets.device}")
    if order is not None:
        check_operand("order", order, (torch.int64,))
        if _apart(order, operand):
            raise TypeError(
                f"order must be on {operand.device} as {of} is, got {order.device}: use order.to({of}.device)"
            )


def check_segment_shapes(order: Tensor | None, offsets: Tensor, entries: int) -> None:
    """Raise ValueError unless ``order`` is [entries] and ``offsets`` [S + 1]."""
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must have shape [S + 1], got {list(offsets.shape)}")
    if order is not None and (order.dim() != 1 or order.shape[0] != entries):
        raise ValueError(f"order must have shape [{entries}], every entry once, got {list(order.shape)}")


def check_values(order: Tensor | None, offsets: Tensor, entries: int) -> None:
    """Raise ValueError unless ``offsets`` rise from 0 to ``entries`` and ``order`` holds every entry once, where they
    are on the CPU. Nothing is asked while a caller is traced: the op asks when it runs."""
    if not offsets.is_cpu or torch.compiler.is_compiling():
        return
    order = order if order is not None and order.is_cpu else None
    if not torch.ops.taskgrad.segments_hold(order, offsets, entries):
        raise ValueError(_what_is_wrong(order, offsets, entries))


def check_index(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless every value of an index on the CPU is in [0, size)."""
    if not index.is_cpu or index.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(index)
    if int(low) < 0 or int(high) >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {int(low)} to {int(high)}")


def within(index: Tensor, size: int) -> Tensor:
    """``index`` as it is on a CPU, where it was checked; on a GPU forced into [0, size): torch would abort the whole
    CUDA context over a value that is not."""
    return index if index.is_cpu else index.clamp(0, max(size - 1, 0))


def fault(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor:
    """Scalar bool: whether ``offsets`` or ``order`` are not what ``check_values`` wants. Nothing waits for it."""
    wrong = (offsets[0] != 0) | (offsets[-1] != entries) | (offsets[1:] < offsets[:-1]).any()
    if order is None:
        return wrong
    inside = torch.where((order >= 0) & (order < entries), order, entries)
    seen = torch.zeros(entries + 1, dtype=torch.bool, device=order.device).index_fill_(0, inside, True)
    return wrong.to(order.device, non_blocking=True) | ~seen[:entries].all()


def fault_on_gpu(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor | None:
    """``fault`` where any of it is on a GPU, else ``None``: then it was checked."""
    if offsets.is_cpu and (order is None or order.is_cpu):
        return None
    return fault(order, offsets, entries)


def spoiled(out: Tensor, wrong: Tensor | None) -> Tensor:
    """``out``, with NaN everywhere if ``wrong``."""
    return out if wrong is None else out.masked_fill_(wrong, float("nan"))


@functools.cache
def triton_is_missing() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:  # no wheel for this platform: the reference runs on its GPUs
        return True
    return False


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this CUDA device; None if they can."""
    if triton_is_missing():
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


@torch.library.register_fake("taskgrad::segments_hold")  # type: ignore[untyped-decorator]
def _fake(order: Tensor | None, offsets: Tensor, entries: int) -> bool:
    return True  # nobody knows yet; the op asks when it runs


@torch.library.impl("taskgrad::segments_hold", "CompositeExplicitAutograd")
def _without_kernel(order: Tensor | None, offsets: Tensor, entries: int) -> bool:
    """What the dispatcher finds until the native library is in."""
    check_operand("offsets", offsets, (torch.int64, torch.int32))
    if order is not None:
        check_operand("order", order, (torch.int64,))
    check_segment_shapes(order, offsets, entries)
    if offsets.is_cpu and (order is None or order.is_cpu) and _native.ready():
        return torch.ops.taskgrad.segments_hold(order, offsets, entries)  # type: ignore[no-any-return]
    return not bool(fault(order, offsets, entries))


def _what_is_wrong(order: Tensor | None, offsets: Tensor, entries: int) -> str:
    if bool(fault(None, offsets, entries)):
        some = offsets[:20].tolist()
        more = f" and {offsets.shape[0] - 20} more" if offsets.shape[0] > 20 else ""
        return f"offsets must rise from 0 to {entries}, the number of entries, got {some}{more}"
    assert order is not None
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= entries:
        return f"order must hold every number from 0 to {entries - 1} once, got values from {low} to {high}"
    twice = int(torch.bincount(order).argmax())
    return f"order must hold every number from 0 to {entries - 1} once, got {twice} more than once"


def _either(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

"""What every op asks of its arguments: one place for all of it.

The order is always: type, dtype and device -> shape -> contiguity -> empty -> values -> dispatch. A public function
asks for all but the values, the op for all of it when it runs (``_register``): ``torch.ops.taskgrad`` is as safe as the
functions, and what is compiled as safe as what is not. The C++ kernels ask by themselves (``csrc/ops/segments.h``).
Values on a GPU are not asked for, as nobody may wait for them: see ``segments``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 1 << 40  # elements of an operand: a broadcast view may claim more than any loop ends on
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_DATA = "{name} must be on a cpu or cuda device, got {device}: move it with .to() first"


def check_operand(name: str, x: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise TypeError unless ``x`` is a dense tensor of one of ``dtypes``, on a CPU or CUDA device or on meta."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, got {x.dtype}: convert it first")
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        raise TypeError(NO_DATA.format(name=name, device=x.device))
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}: use .to_dense()")
    if x.numel() > MOST:
        raise ValueError(f"{name} must have at most 2**40 elements, got the shape {list(x.shape)}")


def _apart(x: Tensor, operand: Tensor) -> bool:
    """Whether they are on different devices; quick where both are on the CPU, as this is asked for every argument."""
    return not (x.is_cpu and operand.is_cpu) and x.device != operand.device


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


def check_rows(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    """Raise unless ``dy`` [N, d_out], ``x`` [N, d_in] and ``offsets`` [S + 1] are rows of segments, but for values."""
    check_operand("dy", dy)
    check_like("x", x, "dy", dy)
    check_segments(None, offsets, "dy", dy)
    if dy.dim() != 2 or x.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(
            f"dy and x must have shapes [N, d_out] and [N, d_in], got {list(dy.shape)} and {list(x.shape)}: "
            "flatten their leading dimensions first"
        )
    check_segment_shapes(None, offsets, dy.shape[0])


def check_entries(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> None:
    """Raise unless ``dy`` [E, M, d_out], ``x`` [E, M, d_in] and the rest are as ``wgrad_sketch`` says, but values."""
    check_operand("dy", dy)
    check_like("x", x, "dy", dy)
    check_segments(order, offsets, "dy", dy)
    check_map("left", left, "dy", dy)
    check_map("right", right, "dy", dy)
    if dy.dim() != 3 or x.dim() != 3 or x.shape[:2] != dy.shape[:2]:
        raise ValueError(
            f"dy and x must have shapes [E, M, d_out] and [E, M, d_in], got {list(dy.shape)} and {list(x.shape)}"
        )
    check_segment_shapes(order, offsets, dy.shape[0])
    check_map_shape("left", left, dy.shape[2])
    check_map_shape("right", right, x.shape[2])


def check_index(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless every value of an index on the CPU is in [0, size)."""
    if not index.is_cpu or index.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(index)
    if int(low) < 0 or int(high) >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {int(low)} to {int(high)}")


def _what_is_wrong(order: Tensor | None, offsets: Tensor, entries: int) -> str:
    bounds = [0, *offsets.tolist(), entries]
    if bounds[1] != 0 or bounds[-2] != entries or bounds != sorted(bounds):
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

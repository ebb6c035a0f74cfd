"""How a function on tensors becomes ``torch.ops.taskgrad.<name>``: in one way, and its steps in one order.

    types -> shapes -> values -> native kernel -> reference

An op's file says what is its own: the schema, the check of types and shapes, what its values must be, the shapes of its
results, the reference in plain torch, the kernels for a GPU and what each of them takes. Called in two ways:

    torch.ops.taskgrad.<name>   from the backward pass and from compiled code: the order above
    the public function         an ``Op``: checks, also that there is data; detaches; flags what only a GPU has seen

On a CPU the native library (``_native``) puts kernels of its own before what is registered here, for good: from then on
nothing of this file runs in a call of ``torch.ops``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _check, _native

_LIBRARY = torch.library.Library("taskgrad", "FRAGMENT")


class Values(NamedTuple):
    """What is asked of an op's values, each a function of its arguments."""

    check: Callable[..., None]
    """Raises ValueError where they are on the CPU and wrong."""
    fault: Callable[..., Tensor | None]
    """Scalar bool on the GPU: whether they are wrong, and nothing waits for it. ``None`` where all are on the CPU."""


class Kernel(Protocol):
    """What may run in the reference's place on a GPU."""

    def takes(self, *args: Any) -> bool:
        """Whether it is there, on this device, and for such arguments."""

    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Triton:
    """The kernel in ``triton/<stem>.py``: imported here and nowhere else, when it is to run for the first time.

    ``fits``: whether it is for such arguments. ``launch``: what calls it, given the module and the arguments.
    """

    stem: str
    fits: Callable[..., bool]
    launch: Callable[..., Any]

    def takes(self, *args: Any) -> bool:
        return self.fits(*args) and triton_obstacle(args[0].device) is None

    def __call__(self, *args: Any) -> Any:
        return self.launch(_triton_module(self.stem), *args)


@dataclass(frozen=True)
class Cpp:
    """The kernel in ``csrc/cuda``, ``torch.ops.taskgrad_cuda.<name>`` where the library was built with CUDA."""

    name: str
    fits: Callable[..., bool]
    launch: Callable[..., Any]

    def takes(self, *args: Any) -> bool:
        return self.fits(*args) and _native.has_cuda(self.name)

    def __call__(self, *args: Any) -> Any:
        return self.launch(getattr(torch.ops.taskgrad_cuda, self.name), *args)


@functools.cache
def _triton_module(stem: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.triton.{stem}")


@functools.cache
def _triton_is_missing() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:  # no wheel for this platform: the reference runs on its GPUs
        return True
    return False


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this CUDA device; None if they can."""
    if _triton_is_missing():
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def tf32_allowed() -> bool:
    """Whether torch's own products on a GPU may round float32 to TF32: a kernel in the place of one may as well."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@dataclass(frozen=True)
class Op:
    """A registered op, as the public function calls it."""

    name: str
    overload: Any
    check: Callable[..., None]
    values: Values | None
    native: bool
    cuda: tuple[Kernel, ...]

    def __call__(self, *args: Any) -> Any:
        """The op's results for arguments that came from outside; the first is the tensor that others are compared to.

        Raises:
            TypeError, ValueError: of ``check``, of ``values``, or a tensor without data.
        """
        self.check(*args)
        first = next(_tensors(args))
        if first.is_meta:  # only torch.ops.taskgrad goes by shapes alone
            raise TypeError(_check.NO_DATA.format(name=self.first_argument(), device=first.device))
        if self.native and self.values is not None:
            self.values.check(*args)  # a native kernel raises RuntimeError
        out = self.overload(*_detached(args))
        if first.is_cpu or self.values is None:
            return out
        wrong = self.values.fault(*args)
        return spoiled(out, wrong) if isinstance(out, Tensor) else tuple(spoiled(part, wrong) for part in out)

    def first_argument(self) -> str:
        return str(self.overload._schema.arguments[0].name)

    def kernel(self, *args: Any) -> Kernel | None:
        """What runs on a GPU for arguments that hold: the first kernel that takes them; None: the reference."""
        for kernel in self.cuda:
            if kernel.takes(*args):
                return kernel
        return None


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in the lists among them."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _detached(args: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            out.append(a.detach() if a.requires_grad else a)
        else:
            out.append(_detached(a) if isinstance(a, (list, tuple)) else a)
    return out


OPS: dict[str, Op] = {}


def register(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    values: Values | None = None,
    cpu: Callable[..., Any] | None = None,
    native: bool = False,
    cuda: tuple[Kernel, ...] = (),
) -> Op:
    """Define ``taskgrad::<schema>``. All functions take the op's arguments.

    Args:
        schema: ``name(arguments) -> results``, as ``torch.library.define`` takes it.
        check: raises TypeError for types, then ValueError for shapes; looks at no values.
        fake: the results without their values, for arguments that were checked.
        reference: the results in plain torch, on any device.
        values: what is asked of the values.
        cpu: the CPU's way, where it is not the reference.
        native: whether ``csrc/ops`` has a kernel for the CPU.
        cuda: kernels for a GPU, the better first.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    overload = getattr(torch.ops.taskgrad, name).default
    op = OPS[name] = Op(name, overload, check, values, native, cuda)
    on_cpu = reference if cpu is None else cpu
    check_values = None if values is None else values.check

    def run(*args: Any) -> Any:
        """Where no kernel is registered: on a CPU, until the native library is in, and on what is neither."""
        check(*args)
        if native and _native.ready() and all(a.is_cpu for a in _tensors(args)):
            return overload(*args)
        if check_values is not None:
            check_values(*args)
        return on_cpu(*args)

    def run_on_cuda(*args: Any) -> Any:
        check(*args)
        if check_values is not None:
            check_values(*args)
        kernel = op.kernel(*args)
        if kernel is None:
            return reference(*args)
        with torch.cuda.device(args[0].device):
            return kernel(*args)

    def run_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if cuda or cpu is not None:
        _LIBRARY.impl(name, run_on_cuda, "CUDA")
    torch.library.register_fake(f"taskgrad::{name}", run_fake, lib=_LIBRARY)
    if native:
        _native.kernels.append(name)
    return op


def spoiled(out: Tensor, wrong: Tensor | None) -> Tensor:
    """``out``, with NaN everywhere if ``wrong``."""
    return out if wrong is None else out.masked_fill_(wrong, float("nan"))

"""Extra forward passes that leave no trace in training.

A forward may do more than compute: BatchNorm counts, a momentum encoder writes parameters through ``.data``, a model
counts its calls, fills a cache, draws random numbers, or takes its own ``forward`` off the instance (Lightning under
DistributedDataParallel). All of it happens once more in a pass that training did not ask for, so all of it is put back.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

# the nearest first: what writes into an OrderedDict as into a dict breaks it
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients; afterwards the model and the random states are as before (see ``Snapshot``)."""
    snapshot = Snapshot(model)
    try:
        with torch.no_grad():
            yield
    finally:
        snapshot.restore()


class Snapshot:
    """What a forward pass of ``model`` may change, to be put back as often as wanted.

    Covered: parameters and buffers (their values and their memory, however they were written or replaced), the modules'
    classes, training flags and every other attribute, with one level of lists, dicts, sets and deques (of subclasses,
    what they hold as such; UserDict and UserList too), and the tensors, NumPy arrays and random generators in all of
    these; torch's (CPU and the GPUs of the model's tensors), NumPy's and Python's random states; what
    ``torch.nn.utils.parametrize.cached`` keeps. Not covered: what is inside other objects that a module refers to
    (deeper containers, objects with ``__slots__``, a logger, quantized and sparse tensors, NumPy arrays of objects and
    those mapped from a file) and whatever lies outside of the modules (attributes of classes).

    It holds a copy of every tensor of the model, on the same device; where there is no room, in the host's memory.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [_Attributes(module) for module in model.modules()]
        values = [value for module in modules for value in module.values()]
        tensors = {id(v): v for v in values if isinstance(v, Tensor)}
        arrays = {id(v): v for v in values if isinstance(v, np.ndarray)}
        generators = {id(v): v for v in values if _is_generator(v)}
        self._back: list[Callable[[], None]] = [module.restore for module in modules]
        self._back += [_Content(t).restore for t in map(_local, tensors.values()) if _plain(t)]
        self._back += [_Array(a).restore for a in arrays.values() if _own(a)]
        self._back += [_setting(_set_state, g, _state_of(g)) for g in generators.values()]
        self._back.append(_Parametrized().restore)
        self._back.append(_setting(random.setstate, random.getstate()))
        self._back.append(_setting(np.random.set_state, np.random.get_state()))
        self._back.append(_setting(torch.set_rng_state, torch.get_rng_state()))
        for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
            self._back.append(_setting(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))

    def restore(self) -> None:
        """Put everything back; what cannot be does not keep the rest from it, and the first error is raised then."""
        errors = [error for put_back in self._back if (error := _error_of(put_back)) is not None]
        if errors:
            raise errors[0]


def _error_of(act: Callable[[], None]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


def _setting(function: Callable[..., object], *args: Any) -> Callable[[], None]:
    def put_back() -> None:
        function(*args)

    return put_back


class _Attributes:
    """The attributes of one module, and what the containers among them hold."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._attributes, self._saved = module.__dict__, dict(module.__dict__)
        self._wrappers = [(v, v.data) for v in self._saved.values() if isinstance(v, (UserDict, UserList))]
        held = (*self._saved.values(), *(data for _, data in self._wrappers))
        self._containers = [(c, _items(c)) for c in held if isinstance(c, _CONTAINERS)]

    def values(self) -> Iterator[Any]:
        yield from self._saved.values()
        for container, items in self._containers:
            yield from (v for _, v in items) if isinstance(container, dict) else items

    def restore(self) -> None:
        if type(self._module) is not self._class:
            object.__setattr__(self._module, "__class__", self._class)
        if not _same(_items(self._attributes), list(self._saved.items())):
            self._attributes.clear()
            self._attributes.update(self._saved)
        for wrapper, data in self._wrappers:
            wrapper.data = data
        for container, items in self._containers:
            if not _same(_items(container), items):
                _refill(container, items)


def _kind(container: Any) -> Any:
    """The builtin that holds what is in ``container``. A subclass may count, refuse or convert what it is given, so its
    own methods are not called."""
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))


def _items(container: Any) -> list[Any]:
    kind = _kind(container)
    return list(kind.items(container) if issubclass(kind, dict) else kind.__iter__(container))


def _refill(container: Any, items: list[Any]) -> None:
    kind = _kind(container)
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in items:
            kind.__setitem__(container, key, value)
    elif kind is set:
        kind.update(container, items)
    else:
        kind.extend(container, items)


def _same(now: list[Any], saved: list[Any]) -> bool:
    """Whether these are the same objects; of pairs, their halves."""
    if len(now) != len(saved):
        return False
    pairs = zip(now, saved, strict=True)
    return all(a is b or (type(a) is type(b) is tuple and _same_pair(a, b)) for a, b in pairs)


def _same_pair(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1]


class _Parametrized:
    """Parametrized weights that are kept while ``parametrize.cached()`` is on: without gradients, in these passes."""

    def __init__(self) -> None:
        self._cache, self._saved = parametrize._cache, dict(parametrize._cache)

    def restore(self) -> None:
        self._cache.clear()
        self._cache.update(self._saved)
        parametrize._cache = self._cache


class _Array:
    """What is in a NumPy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._plain = array.view(np.ndarray)
        self._copy = self._plain.copy()

    def restore(self) -> None:
        # compared first, by bytes: memory that was only read is not written
        if self._plain.tobytes() != self._copy.tobytes():
            np.copyto(self._plain, self._copy)


def _own(array: np.ndarray[Any, Any]) -> bool:
    """Whether the array can have been written, and lies in memory."""
    base: Any = array
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    return array.flags.writeable and not array.dtype.hasobject and base is None


class _Content:
    """The memory that a tensor stands for, and what is in it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._memory = tensor, tensor.data
        try:
            self._copy = self._memory.clone()
        except torch.OutOfMemoryError:
            self._copy = self._memory.cpu()

    def restore(self) -> None:
        if not self._tensor.is_set_to(self._memory):
            self._tensor.data = self._memory
        # compared first: memory that was only read (mapped from a file, shared) is not written
        if not torch.equal(self._memory, self._copy.to(self._memory.device)):
            self._memory.copy_(self._copy)


def _local(tensor: Tensor) -> Tensor:
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())  # not imported for this alone
    local: Tensor = tensor._local_tensor if isinstance(tensor, dtensor) else tensor
    return local


def _plain(tensor: Tensor) -> bool:
    """Whether the tensor's values lie in memory of its own, one stride per dimension."""
    made_of_others = hasattr(tensor, "__tensor_flatten__")  # a wrapper subclass
    return tensor.layout is torch.strided and not (
        made_of_others or tensor.is_nested or tensor.is_meta or tensor.is_quantized or is_lazy(tensor)
    )


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)

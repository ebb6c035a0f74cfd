"""Extra forward passes that leave no trace in training.

A forward may do more than compute: BatchNorm counts, a momentum encoder writes parameters through ``.data``, a model
counts its calls, fills a cache, draws random numbers, or takes its own ``forward`` off the instance (Lightning under
DistributedDataParallel). All of it happens once more in a pass that training did not ask for, so all of it is put back.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


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

    Covered: parameters and buffers (their values and their memory, however they were written or replaced), training
    flags and every other attribute of the modules, with one level of lists, dicts, sets and deques, and the tensors and
    random generators in all of these; torch's (CPU and the GPUs of the model's tensors), NumPy's and Python's random
    states. Not covered: what is inside other objects that a module refers to (deeper containers, a logger, quantized
    and sparse tensors) and whatever lies outside of the modules.

    It holds a copy of every tensor of the model, on the same device; where there is no room, in the host's memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Attributes(module) for module in model.modules()]
        values = [value for module in self._modules for value in module.values()]
        tensors = {id(v): v for v in values if isinstance(v, Tensor)}
        self._tensors = [_Content(t) for t in map(_local, tensors.values()) if _plain(t)]
        self._generators = [(v, _state_of(v)) for v in {id(v): v for v in values if _is_generator(v)}.values()]
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        devices = {t.device for t in tensors.values() if t.device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        for module in self._modules:
            module.restore()
        for tensor in self._tensors:
            tensor.restore()
        for generator, state in self._generators:
            _set_state(generator, state)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


class _Attributes:
    """The attributes of one module, and what the containers among them hold."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes, self._saved = module.__dict__, dict(module.__dict__)
        self._containers = [(c, _items(c)) for c in self._saved.values() if isinstance(c, (list, dict, set, deque))]

    def values(self) -> Iterator[Any]:
        yield from self._saved.values()
        for container, items in self._containers:
            yield from (v for _, v in items) if isinstance(container, dict) else items

    def restore(self) -> None:
        if not _same(_items(self._attributes), list(self._saved.items())):
            self._attributes.clear()
            self._attributes.update(self._saved)
        for container, items in self._containers:
            if _same(_items(container), items):
                continue
            container.clear()
            container.extend(items) if isinstance(container, (list, deque)) else container.update(items)


def _items(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _same(now: list[Any], saved: list[Any]) -> bool:
    """Whether these are the same objects; of pairs, their halves."""
    if len(now) != len(saved):
        return False
    pairs = zip(now, saved, strict=True)
    return all(a is b or (type(a) is tuple and len(a) == 2 and a[0] is b[0] and a[1] is b[1]) for a, b in pairs)


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
        made_of_others or tensor.is_nested or tensor.is_meta or is_lazy(tensor)
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

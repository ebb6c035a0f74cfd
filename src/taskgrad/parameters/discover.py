"""Which parameters of which modules can be split by task, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.parameter import is_lazy

from ..capture import Capture, find_capture
from ..capture.route import site_of

TAKEN = "tracked by another tracker; call remove() on that one first"
EXCLUDED = "left out by include"

Include = Callable[[str, nn.Module], bool]  # of a module's name and the module
Place = tuple[str, nn.Module, Capture]


def discover(model: nn.Module, include: Include | None) -> tuple[list[Place], dict[str, str]]:
    """Name, module and capture of every module of a known kind; and, by name, the parameters that cannot be split, and
    why. Raises ValueError for a lazy module without parameters yet."""
    names = {id(p): name for name, p in model.named_parameters()}
    places: list[Place] = []
    unfit: dict[str, str] = {}
    claimed: set[str] = set()
    strangers: dict[str, str] = {}
    for path, module in model.named_modules():
        place = path or "the model itself"
        capture = find_capture(module)
        reason = None if capture is None else _refusal(module, path, include) or capture.refuse(module)
        if capture is not None and reason is None:
            places.append((path, module, capture))
        for attr, param in module._parameters.items():
            if param is None:
                continue
            name = names[id(param)]
            if reason is not None:
                unfit.setdefault(name, f"{place}: {reason}")
            elif capture is not None and is_lazy(param):
                raise ValueError(
                    f"{place} is a lazy module without parameters yet: run the model once on a batch, then track()"
                )
            elif param.is_complex():
                unfit[name] = f"{place}: complex parameters are not split by task"
            elif capture is not None and attr in capture.params:
                claimed.add(name)
            else:
                rule = f"{place}: no rule for {type(module).__name__}.{attr}; taskgrad.register_capture adds one"
                strangers.setdefault(name, rule)
    # a parameter may also hang on a container that never uses it; comparing sums finds out if it does
    unfit.update({n: r for n, r in strangers.items() if n not in claimed and n not in unfit})
    return places, unfit


def refuse(unfit: dict[str, str]) -> None:
    """Raise for a model without a parameter to track: RuntimeError where another tracker has them, else ValueError."""
    if any(reason.endswith(TAKEN) for reason in unfit.values()):
        raise RuntimeError(
            "the model is tracked already: call remove() on the tracker that track() gave before, and then track()"
        )
    some = "; ".join(f"{name}: {reason}" for name, reason in list(unfit.items())[:5])
    raise ValueError(f"no trainable parameter of the model belongs to a layer kind that taskgrad knows: {some}")


def _refusal(module: nn.Module, path: str, include: Include | None) -> str | None:
    if include is not None and not include(path, module):
        return EXCLUDED
    if site_of(module) is not None:
        return TAKEN
    if replaced_forward(module):
        return "its forward was replaced on the instance, by a wrapper"
    return None


def replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a ``forward`` of somebody's own."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward

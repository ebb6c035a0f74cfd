"""How a call of a tracked module reaches its site: by the identity of the module that is called.

A function put on an instance would be carried along by ``copy.copy`` and by ``_replicate_for_data_parallel`` and then
run with the weights of the module it was made for; it would also be pickled. So the class's ``forward`` is replaced
while modules of the class are tracked, by a function that looks up the module it is called on: a tracked one goes to
its site, any other runs the class's own. Nothing is written to an instance.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .site import Site

Forward = Callable[..., Any]

_SITES: dict[int, weakref.ref[Site]] = {}  # by id(module); a site keeps its module alive, a dead reference says nothing
_ROUTES: dict[Forward, Forward] = {}  # what classes have while modules of them are tracked: what they had before


def site_of(module: nn.Module) -> Site | None:
    """The site of this very module, not of one that it was copied from."""
    found = _SITES.get(id(module))
    return None if found is None else found()


def forget_compiled() -> None:
    """What torch.compile has compiled may have passed a module by that is tracked now, or not tracked any more: it
    guards on no class's ``forward``, so it is to compile again."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        with contextlib.suppress(AttributeError):  # another thread has not finished its import: nothing was compiled
            dynamo.reset()


def class_forward(cls: type[nn.Module]) -> Forward:
    """The ``forward`` of a module class, as it is where nothing is tracked: a function of the module."""
    cls = _defining(cls)
    forward: Forward = cls.__dict__["forward"]
    return _ROUTES.get(forward, forward)


def connect(site: Site) -> None:
    """Calls of the site's module go through ``site.call`` from now on."""
    cls = _defining(type(site.module))
    if cls.__dict__["forward"] not in _ROUTES:
        plain = cls.__dict__["forward"]
        routed = _routed(plain)
        _ROUTES[routed] = plain
        setattr(cls, "forward", routed)  # noqa: B010
    site.route = cls.__dict__["forward"]
    # not by a callback of the reference: the garbage collector may run it while Dynamo goes through the dict
    for key in [key for key, found in _SITES.items() if found() is None]:
        del _SITES[key]
    _SITES[id(site.module)] = weakref.ref(site)


def disconnect(site: Site) -> None:
    """The site's module is called as before; its class too, where no other module of it is tracked."""
    if site_of(site.module) is not site:
        return
    del _SITES[id(site.module)]
    cls = _defining(type(site.module))
    tracked = [found() for found in list(_SITES.values())]
    if any(s is not None and s.route is site.route for s in tracked):
        return
    plain = _ROUTES.pop(site.route)
    if cls.__dict__["forward"] is site.route:  # else somebody has put another one over ours, which calls the plain one
        setattr(cls, "forward", plain)  # noqa: B010


def _defining(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that ``forward`` comes from."""
    return next(c for c in cls.__mro__ if "forward" in c.__dict__)


def _routed(plain: Forward) -> Forward:
    sites = _SITES
    me: list[Any] = []

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        found = sites.get(id(self))
        site = None if found is None else found()
        # a site of a later route: this one is called by what lies over it
        if site is None or site.route is not me[0]:
            return plain(self, *args, **kwargs)
        return site.call(*args, **kwargs)

    made: Any = forward
    # torch.jit.script of a module of the class compiles the source of what is wrapped, with the globals of what it got
    of_its_module: Any = plain
    routed = types.FunctionType(
        made.__code__, of_its_module.__globals__, made.__name__, made.__defaults__, made.__closure__
    )
    me.append(functools.wraps(plain)(routed))
    return me[0]  # type: ignore[no-any-return]

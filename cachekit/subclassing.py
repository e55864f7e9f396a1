"""Subclasses that intercept the calls of single instances, named like the class that they extend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: A function that makes, for a class, the method that takes the place of its `__call__`.
MakeCall = Callable[[Any], Callable[..., Any]]

_BASE = "_cachekit_base"
_DEFAULT = (object.__reduce__, object.__reduce_ex__)


def intercept_calls(instance: Any, make_call: MakeCall) -> None:
    """Give `instance` a subclass of its class whose `__call__` is made by `make_call`.

    The class itself never changes. The subclass has its name, and is pickled and copied by way of it, so `isinstance`,
    `save_pretrained` and deep copies see the class that they expect. An instance whose class already extends such a
    subclass keeps it. `make_call` is a function at the top of a module, because it is pickled by name.
    """
    if not is_intercepted(instance):
        base: Any = type(instance)
        instance.__class__ = _subclass(base, make_call)


def stop_intercepting(instance: Any) -> None:
    """Put back the instance's own class, unless another subclass was put over this one since."""
    base = vars(type(instance)).get(_BASE)
    if base is not None:
        instance.__class__ = base


def is_intercepted(instance: Any) -> bool:
    """Whether the instance's class is, or extends, one that intercepts its calls."""
    return hasattr(type(instance), _BASE)


@functools.cache
def _subclass(base: Any, make_call: MakeCall) -> type[Any]:
    def reduce(self: Any, protocol: Any) -> Any:
        return (_remake, (base, make_call), *base.__reduce_ex__(self, protocol)[2:])

    own: dict[str, Any] = {"__call__": functools.wraps(base.__call__)(make_call(base)), _BASE: base}
    if (base.__reduce__, base.__reduce_ex__) == _DEFAULT:  # any other decides itself how it is rebuilt
        own["__reduce_ex__"] = reduce  # which names the base, as the subclass can't be imported
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**own, **names})


def _remake(base: Any, make_call: MakeCall) -> Any:
    return object.__new__(_subclass(base, make_call))

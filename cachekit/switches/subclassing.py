"""Subclasses that intercept the calls of single instances, named like the class that they extend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Makes, for a class, the method that replaces its `__call__`.
MakeCall = Callable[[Any], Callable[..., Any]]

_BASE = "_cachekit_base"
_DEFAULT = (object.__reduce__, object.__reduce_ex__)


def intercept_calls(instance: Any, make_call: MakeCall) -> None:
    """Replace an instance's class by a subclass whose `__call__` is made by `make_call`.

    The original class never changes. The subclass has its name and is pickled and copied as it, so `isinstance`,
    `save_pretrained` and deep copies see the class that they expect. An instance that is intercepted already is left
    as it is. `make_call` must be a module-level function, because it is pickled by name.
    """
    if not is_intercepted(instance):
        base: Any = type(instance)
        instance.__class__ = _subclass(base, make_call)


def stop_intercepting(instance: Any) -> None:
    """Restore the instance's own class, unless another subclass has been put on top of this one since."""
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
    if (base.__reduce__, base.__reduce_ex__) == _DEFAULT:  # any other method rebuilds it as the class wants
        own["__reduce_ex__"] = reduce  # names the base, because the subclass can't be imported
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**own, **names})


def _remake(base: Any, make_call: MakeCall) -> Any:
    return object.__new__(_subclass(base, make_call))

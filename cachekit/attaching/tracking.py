"""Bound runs by a pipeline's calls, through a subclass of the pipeline instance's own class."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from cachekit.attaching.lookup import attachments_of

_BASE = "_cachekit_base"


_SUBCLASSES: dict[type[Any], type[Any]] = {}


def track(pipe: Any) -> None:
    """Give the pipeline instance a subclass of its own class whose call bounds the run.

    The subclass has the class's own name, so `isinstance`, `from_pipe`, `save_pretrained` and deep copies see
    the class they know; the class itself is never changed.
    """
    if _BASE not in vars(type(pipe)):
        pipe.__class__ = _subclass(type(pipe))


def untrack(pipe: Any) -> None:
    """Put the pipeline's own class back."""
    base = vars(type(pipe)).get(_BASE)
    if base is not None:
        pipe.__class__ = base


def _subclass(base: type[Any]) -> type[Any]:
    return _SUBCLASSES.get(base) or _SUBCLASSES.setdefault(base, _tracked(base))


def _remake(base: type[Any]) -> Any:
    return object.__new__(_subclass(base))


def _tracked(base: Any) -> type[Any]:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as runs:
            for attachment in attachments_of(self):
                runs.enter_context(attachment.run_of(self, args, kwargs))
            return base.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """Name the class by what it is made of: it cannot be imported."""
        return (_remake, (base,), *base.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own: dict[str, Any] = {"__call__": call, _BASE: base, **names}
    if (base.__reduce__, base.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):  # else it says what it is
        own["__reduce_ex__"] = reduce
    return type(base.__name__, (base,), own)

"""The attributes through which calls of a module instance can be intercepted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

#: The method behind each call of a module, which runs hooks and forward.
CALL = "_call_impl"
#: What torch calls in its place after `module.compile()`.
COMPILED_CALL = "_compiled_call_impl"
#: The method by which pipelines name a call after its branch.
NAMING = "cache_context"


def class_call(module: nn.Module) -> Callable[..., Any]:
    """Bind the class's own call to a module, hooks included."""
    return functools.partial(type(module)._call_impl, module)


def class_naming(module: Any, name: str | None, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
    """Make the class's own context manager for calls of this name."""
    context: contextlib.AbstractContextManager[Any] = type(module).cache_context(module, name, **kwargs)
    return context

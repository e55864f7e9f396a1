"""Facts about torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch._dynamo
from torch import nn
from torch._dynamo.decorators import skip

_F = TypeVar("_F", bound=Callable[..., Any])


#: What torch tells somebody who wants one graph of a call in which values decide.
BY_VALUES = "cachekit decides here by values"


#: Where torch keeps what `module.compile()` made.
_COMPILED = "_compiled_call_impl"


#: Returns what compiles the frames that this thread enters, None or False where nothing does.
active_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


def holds_compiled(module: nn.Module) -> bool:
    """Tell whether a module's call or forward leads into code that torch compiles."""
    held = vars(module)
    places = [held.get(name) for name in (_COMPILED, "forward")]
    beneath = [getattr(getattr(place, "__self__", None), "inner", place) for place in places]
    return any(hasattr(place, "get_compiler_config") for place in beneath)


def leads_to(function: Any, target: Any) -> bool:
    """Tell whether `function` is what torch has compiled of `target`."""
    return bool(getattr(function, "_torchdynamo_orig_callable", None) == target)


def uncompiled(reason: str) -> Callable[[_F], _F]:
    """Keep torch from compiling a function and whatever it calls; it tells the reason where it wants one graph."""

    def disabled(function: _F) -> _F:
        disable: Callable[[_F], Any] = torch._dynamo.disable
        wrapped = disable(function)
        wrapped._torchdynamo_disable_msg = reason  # older versions of torch take no reason
        return cast("_F", wrapped)

    return disabled


def is_refused(error: BaseException) -> bool:
    """Tell whether torch could not make one graph because values decide."""
    return isinstance(error, torch._dynamo.exc.Unsupported) and BY_VALUES in str(error)


def uncompiled_frame(reason: str) -> Callable[[_F], _F]:
    """Keep torch from compiling a function, but not what it calls."""

    def skipped(function: _F) -> _F:
        # Not `torch.compiler.disable`: torch takes off the wrapper that it makes, where somebody compiles a method.
        frame: Any = skip(function)
        frame._torchdynamo_disable_msg = reason
        return function

    return skipped


def without_compiler(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(module)` stands for, or the module itself."""
    inner: nn.Module | None = vars(module)["_modules"].get("_orig_mod")
    return module if inner is None else inner


@functools.cache
def graphs_before() -> int:
    """Return how many graphs torch keeps of one function without cachekit."""
    limit: int = getattr(torch._dynamo.config, graph_limit())
    return limit


@functools.cache
def graph_limit() -> str:
    """Return what torch calls that number: now, or before."""
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

"""Facts about torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch._dynamo
from torch import nn
from torch._dynamo.decorators import skip

from cachekit.upstream.calls import COMPILED_CALL

_F = TypeVar("_F", bound=Callable[..., Any])

#: The reason in torch's error where a call had to be one graph, but values within it decide.
BY_VALUES = "cachekit decides here by values"

#: Whether torch is tracing the code that asks, in order to compile it.
is_traced: Callable[[], bool] = torch.compiler.is_dynamo_compiling

#: What compiles the frames that this thread enters; None or False where nothing does.
active_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


def holds_compiled(module: nn.Module) -> bool:
    """Whether a module's call or forward is compiled by torch."""
    held = vars(module)
    if COMPILED_CALL not in held and "forward" not in held:
        return False
    places = [held.get(name) for name in (COMPILED_CALL, "forward")]
    beneath = [getattr(getattr(place, "__self__", None), "inner", place) for place in places]
    return any(hasattr(place, "get_compiler_config") for place in beneath)


def leads_to(function: Any, target: Any) -> bool:
    """Whether `function` is `target` as compiled by torch."""
    return bool(getattr(function, "_torchdynamo_orig_callable", None) == target)


def without_compiler(module: nn.Module) -> nn.Module:
    """Unwrap the module inside what `torch.compile(module)` returned; any other is returned unchanged.

    >>> layer = nn.Linear(2, 2)
    >>> without_compiler(torch.compile(layer)) is without_compiler(layer) is layer
    True
    """
    inner: nn.Module | None = vars(module)["_modules"].get("_orig_mod")
    return module if inner is None else inner


class Uncompiled(nn.Module):
    """Wraps a module as torch.compile does, under the same names of submodules, without compiling."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap `inner`."""
        super().__init__()
        self._orig_mod = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module."""
        return self._orig_mod(*args, **kwargs)


# -- what is not compiled ---------------------------------------------------------------------------------


def uncompiled(reason: str) -> Callable[[_F], _F]:
    """Keep torch from compiling a function and what it calls; where one graph is wanted, torch gives the reason."""

    def disabled(function: _F) -> _F:
        disable: Callable[[_F], Any] = torch._dynamo.disable
        wrapped = disable(function)
        wrapped._torchdynamo_disable_msg = reason  # older versions of torch take no reason
        return cast("_F", wrapped)

    return disabled


def uncompiled_frame(reason: str) -> Callable[[_F], _F]:
    """Keep torch from compiling a function, but not what it calls."""

    def skipped(function: _F) -> _F:
        # Not `torch.compiler.disable`: torch takes off the wrapper that it makes, where a method is compiled.
        frame: Any = skip(function)
        frame._torchdynamo_disable_msg = reason
        return function

    return skipped


def is_refused(error: BaseException) -> bool:
    """Whether torch raised `error` because values decide where it should have made one graph."""
    return isinstance(error, torch._dynamo.exc.Unsupported) and BY_VALUES in str(error)


# -- how many graphs are kept -----------------------------------------------------------------------------


def keep_graphs(modes: int) -> None:
    """Have torch keep at least `modes` times as many graphs of one function as it did at first."""
    wanted = _graphs_at_first() * modes
    if getattr(torch._dynamo.config, _graph_limit()) < wanted:
        setattr(torch._dynamo.config, _graph_limit(), wanted)


@functools.cache
def _graphs_at_first() -> int:
    limit: int = getattr(torch._dynamo.config, _graph_limit())
    return limit


@functools.cache
def _graph_limit() -> str:
    """Name of the limit in this version of torch."""
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

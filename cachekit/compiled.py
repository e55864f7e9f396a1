"""Let compiled code obey a plan: switches inside of it are told before a call what to do, and asked after it."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch._dynamo
from torch import nn
from torch._dynamo.decorators import skip

if TYPE_CHECKING:
    from .run import Call
    from .switch import Switch

_F = TypeVar("_F", bound=Callable[..., Any])
#: What torch tells somebody who wants one graph of a call in which values decide.
BY_VALUES = "cachekit decides here by values"
#: Where torch keeps what `module.compile()` made.
_COMPILED = "_compiled_call_impl"
#: Returns what compiles the frames that this thread enters, None or False where nothing does.
active_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
_ORDERS: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


class Prompter:
    """Tell the switches of one denoiser what to do in a call, where some of them may lie in compiled code.

    Compiled code can neither count nor look anything up: whatever it looked at, it would be compiled anew for. So
    each switch there reads one word of its own, and hands out or notes down tensors. As the switches belong to the
    denoiser, calls of several threads take turns.
    """

    def __init__(self, module: nn.Module, switches: Sequence[Switch]) -> None:
        """Serve the `switches` of `module`."""
        self._module = module
        # Whatever lies around a switch comes before it.
        self._switches = sorted(switches, key=lambda switch: switch.name.count("."))
        self._around = {
            switch.name: [other for other in switches if switch.name.startswith(other.name + ".")]
            for switch in switches
        }
        self._lock = threading.RLock()
        self._holds_compiled = False

    def look(self) -> None:
        """Notice what has been compiled in the module since the last time."""
        self._holds_compiled = any(map(holds_compiled, self._module.modules()))

    @contextlib.contextmanager
    def call(self, call: Call | None, enclosed: bool) -> Iterator[None]:
        """Tell the switches what to do in `call`, None being plain, and take what they noted.

        `enclosed` says that the whole call is being compiled.
        """
        if not self._holds_compiled and not enclosed:
            yield
            return
        with self._lock:
            try:
                self._tell(call)
                self._make_room()
                yield
                self._ask(call)
            finally:
                for switch in self._switches:
                    switch.forget()

    def _tell(self, call: Call | None) -> None:
        skipped = set()
        for switch in self._switches:
            if any(other.name in skipped for other in self._around[switch.name]) or switch.tell(call):
                skipped.add(switch.name)

    def _make_room(self) -> None:
        """Let torch keep as many graphs as before for each combination of orders that the module has ever seen.

        The graphs stay when the attachment is removed, and so does the room for them.
        """
        seen = _ORDERS.setdefault(self._module, {None})
        seen.add(tuple((switch.name, switch.order) for switch in self._switches))
        wanted = _graphs_before() * len(seen)
        if getattr(torch._dynamo.config, _limit()) < wanted:
            setattr(torch._dynamo.config, _limit(), wanted)

    def _ask(self, call: Call | None) -> None:
        if call is not None:
            for switch in self._switches:
                switch.report(call)


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
def _graphs_before() -> int:
    """Return how many graphs torch keeps of one function without cachekit."""
    limit: int = getattr(torch._dynamo.config, _limit())
    return limit


@functools.cache
def _limit() -> str:
    """Return what torch calls that number: now, or before."""
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

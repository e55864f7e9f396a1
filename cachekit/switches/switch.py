"""The wrapper around a module's calls that runs or skips them, by the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from cachekit.interface.moment import Action
from cachekit.switches.instructions import Instruction
from cachekit.switches.subclassing import intercept_calls, is_intercepted, stop_intercepting
from cachekit.upstream.compiling import BY_VALUES, is_traced, uncompiled
from cachekit.upstream.hooks import register_alike, splitting_hook

_SWITCH = "_cachekit_switch"
_COMPUTE = Action.COMPUTE  # looking it up on the enum in each call is slow


class CurrentCall(Protocol):
    """The denoiser's call that this thread is in the middle of, None where nothing is cached.

    A call has `duties`: what each module does in it, by name. Runs of several threads may have different ones.
    """

    call: Any


class Switch:
    """Wraps one module's calls, and runs or skips them by the plan of the present run.

    What the module does in a call is its `Duty` there; without one it runs.

    The switch lies outside of the module's hooks and of whatever wraps its forward: the module's instance holds it,
    and gets a subclass of its own class whose `__call__` goes through it. So wrappers on `forward` can be added and
    removed in any order, and a skipped module does not move its weights. A deep copy of the model copies its switches.

    In compiled code it follows an `instruction`, which lasts for one call of the denoiser.
    """

    def __init__(
        self,
        state: CurrentCall,
        module: nn.Module,
        name: str,
        *,
        runs_if_compiled: bool = False,
    ) -> None:
        """Wrap the calls of `module` from `install` on.

        With `runs_if_compiled` compiled code runs the module as if there were no switch.
        """
        self.state = state
        self.module = module
        self.name = name
        self.instruction: Instruction | None = None
        self._runs_if_compiled = runs_if_compiled
        #: What splits the module's input between processes, where something does, and the forward it wraps.
        self._splitter: Any = None
        self._inner: Callable[..., Any] | None = None

    # -- in place -----------------------------------------------------------------------------------------

    def install(self) -> None:
        """Wrap the module's calls."""
        # Processes that split a module's input keep a part of its output each: the switch goes inside that hook.
        self._splitter = splitting_hook(self.module)
        if self._splitter is not None:
            self._inner, self._splitter.forward = self._splitter.forward, self._call_split
            return
        vars(self.module)[_SWITCH] = self
        base = type(self.module)
        intercept_calls(self.module, _through_switch)
        register_alike(base, type(self.module))

    def uninstall(self) -> None:
        """Put back exactly what was there; a class put on top of ours since stays, without effect."""
        if self._splitter is not None:
            if self.in_place:
                self._splitter.forward = self._inner
        elif vars(self.module).get(_SWITCH) is self:
            del vars(self.module)[_SWITCH]
            stop_intercepting(self.module)

    def settle(self) -> None:
        """Move inside a hook that has begun to split the module's input, or back out where that has ended."""
        if splitting_hook(self.module) is not self._splitter:
            self.uninstall()
            self.install()

    @property
    def in_place(self) -> bool:
        """Whether the module's calls still go through this switch."""
        if self._splitter is not None:
            return bool(self._splitter.forward == self._call_split)
        return vars(self.module).get(_SWITCH) is self and is_intercepted(self.module)

    # -- calls --------------------------------------------------------------------------------------------

    def call(
        self, forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call of the module, `forward(module, ...)`, or skip it."""
        if is_traced() or self.instruction is not None:
            return self._call_compiled(forward, module, args, kwargs)
        call = self.state.call
        duty = None if call is None else call.duties.get(self.name)
        if duty is None:
            return forward(module, *args, **kwargs)
        if duty.always_asks:
            return duty.fulfil(call, forward, module, args, kwargs)
        actions = call.actions
        for index in duty.indices:
            if actions[index] is not _COMPUTE:
                return duty.fulfil(call, forward, module, args, kwargs)
        output = forward(module, *args, **kwargs)
        for index in duty.counted:
            call.counts[index][_COMPUTE] += 1
        return output

    def _call_compiled(
        self, forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.instruction is not None:
            return self.instruction.follow(forward, module, args, kwargs)
        if self._runs_if_compiled:
            return forward(module, *args, **kwargs)
        return _leave_compiled(self, forward, module, args, kwargs)

    def _call_split(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self._forward_split, self.module, args, kwargs)

    def _forward_split(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert self._inner is not None
        return self._inner(*args, **kwargs)


@uncompiled(BY_VALUES)
def _leave_compiled(
    switch: Switch, forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Leave the compiled code where values decide; the module then runs uncompiled."""
    return switch.call(forward, module, args, kwargs)


def _through_switch(base: Any) -> Callable[..., Any]:
    forward: Callable[..., Any] = base.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        switch = vars(self).get(_SWITCH)
        if switch is None:
            return forward(self, *args, **kwargs)
        return switch.call(forward, self, args, kwargs)

    return call

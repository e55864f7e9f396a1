"""Skip a module's calls where the plan says so; the module itself always does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from cachekit.switches.parts import RUN_IT, Entry, Part, Restoring, computes
from cachekit.tensors import shape_of, tree_map
from cachekit.upstream.compiling import BY_VALUES, uncompiled
from cachekit.upstream.hooks import pass_by, register_alike, splitting_hook

if TYPE_CHECKING:
    from cachekit.runs.call import Call


_SWITCH, _BASE = "_cachekit_switch", "_cachekit_switched"


#: Orders under which a module does not run.
_SKIPPING = ("reuse", "restore")


_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Calling(Protocol):
    """Hold what each thread is in the middle of: the call that parts are asked about, if any."""

    call: Any


class Switch:
    """Stand before one module's calls: outside of its hooks and of whatever wraps its forward.

    The module's instance holds the switch, and gets a subclass of its own class that asks it. Wrappers on `forward`
    come and go beneath, in any order, and a module that is skipped does not move its weights either. It is an object
    so that a deep copy of the model copies it too.

    Compiled code is shared by like modules, and compiled anew for whatever differs. So within it the switch looks up
    nothing: before a call it is told its `order`, and after the call it reports what it noted.
    """

    def __init__(self, state: Calling, module: nn.Module, name: str, is_told: bool = True) -> None:
        """Prepare for `module`; nothing is changed before `install`.

        In compiled code a module runs as written whose switch nobody tells what to do.
        """
        self.state = state
        self.is_told = is_told
        self.module = module
        self.name = name
        self.parts: list[Part] = []
        self.behind: Any = None
        self.inner: Callable[..., Any] | None = None
        self.order: str | None = None
        self.given: Any = None
        self.entries: tuple[Entry, ...] = ()
        self.noted: Any = None
        self.obeyed = False

    def install(self) -> None:
        """Put this switch before the module's calls."""
        # Where processes split a module's input between them, what is kept are parts: there it stands behind that.
        self.behind = splitting_hook(self.module)
        if self.behind is not None:
            self.inner, self.behind.forward = self.behind.forward, self.stand
            return
        vars(self.module)[_SWITCH] = self
        if not hasattr(type(self.module), _BASE):  # else a class that was put over ours has stayed
            self.module.__class__ = _switched(type(self.module))

    def uninstall(self) -> None:
        """Put back exactly what was there; a class that somebody put over ours since stays, and asks nobody."""
        if self.behind is not None:
            if self.in_place:
                self.behind.forward = self.inner
            return
        if vars(self.module).get(_SWITCH) is not self:
            return
        del vars(self.module)[_SWITCH]
        base = vars(type(self.module)).get(_BASE)
        if base is not None:  # else a module that does not give up its class
            self.module.__class__ = base

    def settle(self) -> None:
        """Move behind what has begun to split the module's input since, or away from where that has ended."""
        if splitting_hook(self.module) is not self.behind:
            self.uninstall()
            self.install()

    @property
    def in_place(self) -> bool:
        """Tell whether the module still calls this switch."""
        if self.behind is not None:
            return bool(self.behind.forward == self.stand)
        return vars(self.module).get(_SWITCH) is self and hasattr(type(self.module), _BASE)

    def stand(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for what was there before."""
        assert self.inner is not None
        return self.call(self.inner, args, kwargs)

    def call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own call, `inner`, unless an action of the present call says otherwise."""
        if torch.compiler.is_compiling() or self.order is not None:
            return self._obey(inner, args, kwargs)
        return self._look_up(inner, args, kwargs)

    def _look_up(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.state.call
        if call is None:
            return inner(*args, **kwargs)
        for part in self.parts:
            result = part.before(call, args, kwargs)
            if result is not RUN_IT:
                part.reused(call)
                pass_by(self.module)
                return result
        output = inner(*args, **kwargs)
        for part in self.parts:
            part.after(call, output)
        return output

    # -- in compiled code ---------------------------------------------------------------------------------

    def tell(self, call: Call | None) -> bool:
        """Give the order for `call`, None being a plain one, and return whether the module is skipped in it."""
        if call is None:
            self.order = "run"
            return False
        if any(part.is_open(call) for part in self.parts):
            return False
        self.entries = tuple(part for part in self.parts if isinstance(part, Entry) and not computes(call, part.index))
        for part in self.parts:
            self.given = part.ahead(call)
            if self.given is not RUN_IT:
                self.order = "restore" if isinstance(self.given, Restoring) else "reuse"
                return True
        wishes = {part.wish(call) for part in self.parts}
        self.order = "keep" if "keep" in wishes else "measure" if "measure" in wishes else "run"
        return False

    def _obey(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.order is None:
            return _interrupt(self, inner, args, kwargs) if self.is_told else inner(*args, **kwargs)
        self.obeyed = True
        for entry in self.entries:
            entry.passage.entered = entry.streams_of(args, kwargs)
        if self.order in _SKIPPING:
            pass_by(self.module)
            return self.given if self.order == "reuse" else self.given.within_call()
        output = inner(*args, **kwargs)
        if self.order == "keep":
            self.noted = output
        elif self.order == "measure":
            self.noted = tree_map(shape_of, output)
        return output

    def report(self, call: Call) -> None:
        """Say what was noted in `call`, if it came by here and ran."""
        if not self.obeyed:
            return
        # Compiled code may use the memory of its outputs again.
        noted = tree_map(torch.clone, self.noted) if self.order == "keep" else self.noted
        for part in self.parts:
            if self.order in _SKIPPING:
                part.reused(call)
            else:
                part.after(call, noted)

    def forget(self) -> None:
        """Hold no order and no tensor between calls."""
        for entry in self.entries:
            entry.passage.entered = ()
        self.order = self.given = self.noted = None
        self.entries, self.obeyed = (), False


@uncompiled(BY_VALUES)
def _interrupt(switch: Switch, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave the compiled code where a switch has to look up what to do; the module then runs as written."""
    return switch._look_up(inner, args, kwargs)


def _switched(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base`, by its own name, whose instances ask their switch at each call."""
    if base in _SUBCLASSES:
        return _SUBCLASSES[base]
    forward: Callable[..., Any] = base.__call__

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        switch = vars(self).get(_SWITCH)
        if switch is None:
            return forward(self, *args, **kwargs)
        return switch.call(functools.partial(forward, self), args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """Name the class by what it is made of: it cannot be imported."""
        return (_remake, (base,), *base.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own = {"__call__": call, "__reduce_ex__": reduce, _BASE: base}
    _SUBCLASSES[base] = type(base.__name__, (base,), {**own, **names})
    register_alike(base, _SUBCLASSES[base])
    return _SUBCLASSES[base]


def _remake(base: type[nn.Module]) -> nn.Module:
    return object.__new__(_switched(base))

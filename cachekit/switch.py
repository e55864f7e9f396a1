"""Stand before a module's calls and obey the plan; the module itself always does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .arguments import parameters_of
from .compiled import BY_VALUES, uncompiled
from .offloading import pass_by, register_alike, splitting_hook
from .plan import Assignment
from .policy import Action, Moment, Policy
from .sites import Region, Target
from .tree import shape_of, tensors, tree_map, with_tensors

if TYPE_CHECKING:
    from .policy import Streams
    from .run import Call

_RUN_IT = object()
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
            if result is not _RUN_IT:
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
        self.entries = tuple(part for part in self.parts if isinstance(part, Entry) and not _computes(call, part.index))
        for part in self.parts:
            self.given = part.ahead(call)
            if self.given is not _RUN_IT:
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


class Part:
    """Play one role of a module for one assignment."""

    def __init__(self, index: int, bound: Assignment) -> None:
        """Serve assignment `index`."""
        self.index = index
        self.policy = bound.policy
        self.target = bound.target

    def is_open(self, call: Call) -> bool:
        """Tell whether what this part does in `call` depends on values within it."""
        return call.actions[self.index] is None

    def wish(self, call: Call) -> str:
        """Return what it wants to know of the computed output: "keep" all, "measure" shapes, or "run"."""
        return "run"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a stand-in for the module's output, or the marker that it has to run."""
        return _RUN_IT

    def ahead(self, call: Call) -> Any:
        """Return the same before the call, or a `Restoring` that makes the stand-in within it."""
        return self.before(call, (), {})

    def reused(self, call: Call) -> None:
        """Take notice that a stand-in was handed out."""

    def after(self, call: Call, output: Any) -> None:
        """Look at the module's computed output."""


class Passage:
    """Hold, within a call that is told ahead, the tensors that enter a region until its exit."""

    entered: Streams = ()


class Exit(Part):
    """Keep and restore the output of a site, or of the last module of a region.

    There is a `passage` where what enters the region matters.
    """

    def __init__(self, index: int, bound: Assignment, passage: Passage | None = None) -> None:
        """Serve assignment `index`."""
        super().__init__(index, bound)
        self.passage = passage

    def is_open(self, call: Call) -> bool:
        """Tell whether values decide, or may decide how what enters the region is found."""
        return super().is_open(call) or (self.passage is not None and None in call.actions)

    def wish(self, call: Call) -> str:
        """Return "keep" where something is kept, a reuse that found nothing included."""
        return "run" if _computes(call, self.index) else "keep"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the restored output when the action is REUSE and something is kept."""
        found = self._restoring(call)
        return _RUN_IT if found is None else found.output(self._entered(call))

    def ahead(self, call: Call) -> Any:
        """Return the restored output, or what restores it from the tensors that enter the region."""
        found = self._restoring(call)
        if found is None:
            return _RUN_IT
        return found.output(()) if self.passage is None else found

    def _restoring(self, call: Call) -> Restoring | None:
        if call.actions[self.index] is not Action.REUSE:
            return None
        kept = call.kept(self.index)
        if kept is None:
            call.miss(self.index)
            call.actions[self.index] = Action.STORE
            return None
        return Restoring(self, kept, call.run.templates[call.slot(self.index)], call.moment(self.index))

    def reused(self, call: Call) -> None:
        """Count the reuse, unless it was of another region around this module."""
        if call.actions[self.index] is Action.REUSE:
            call.count(self.index, Action.REUSE)

    def after(self, call: Call, output: Any) -> None:
        """Keep the output when the action is STORE."""
        action = call.actions[self.index]
        if action is Action.COMPUTE:
            call.count(self.index, Action.COMPUTE)
            return
        call.count(self.index, Action.STORE)
        # What lies on another device is only fetched for those who look at it.
        before = call.kept(self.index) if type(self.policy).to_keep is not Policy.to_keep else None
        entry = _lasting(self._entered(call), output)
        streams = self.own(tuple(tensors(output)))
        call.keep(self.index, self.policy.to_keep(streams, entry, before, call.moment(self.index)))
        call.run.templates[call.slot(self.index)] = tree_map(_no_elements, output)

    def _entered(self, call: Call) -> Streams:
        """Return the tensors that entered the region; compiled code may use the memory of its own again."""
        if self.passage is None or self.index in call.entries:
            return call.entries.get(self.index, ())
        return tuple(map(torch.clone, self.passage.entered))

    def own(self, streams: Streams) -> Streams:
        """Return streams that later code may edit."""
        edited = isinstance(self.target, Region) and self.target.edited
        return tuple(tensor.clone() for tensor in streams) if edited else streams


@dataclass
class Restoring:
    """Make an output of what was kept and of the tensors that enter the region; this may be compiled."""

    exit: Exit
    kept: Any
    template: Any
    moment: Moment

    def output(self, entry: Streams) -> Any:
        """Return the output for the tensors that entered."""
        streams = self.exit.policy.restore(self.kept, _lasting(entry, self.template), self.moment)
        return with_tensors(self.template, self.exit.own(streams))

    def within_call(self) -> Any:
        """Return the output for the tensors that entered in the present call."""
        assert self.exit.passage is not None
        return self.output(self.exit.passage.entered)


def _lasting(entry: Streams, output: Any) -> Streams:
    """Return the tensors that entered, without a stream that the exit ends (its output is None)."""
    if isinstance(output, tuple) and len(output) == len(entry):
        return tuple(tensor for tensor, left in zip(entry, output) if left is not None)
    return entry


class Member(Part):
    """Skip a module inside a region; what it returns instead only has the right shapes."""

    def __init__(self, index: int, bound: Assignment, name: str) -> None:
        """Serve assignment `index` for module `name`."""
        super().__init__(index, bound)
        self.name = name

    def wish(self, call: Call) -> str:
        """Return "measure" where a placeholder may be needed later."""
        return "run" if _computes(call, self.index) else "measure"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a placeholder when the region is reused."""
        if call.actions[self.index] is not Action.REUSE:
            return _RUN_IT
        shapes, branches = call.run.shapes[call.slot(self.index), self.name]
        placeholder = Placeholder(len(call.branches), branches)
        return tree_map(placeholder, shapes)

    def after(self, call: Call, output: Any) -> None:
        """Record, once in a run, the shapes that a placeholder must have."""
        key = (call.slot(self.index), self.name)
        if call.actions[self.index] is not Action.COMPUTE and key not in call.run.shapes:
            call.run.shapes[key] = (tree_map(shape_of, output), len(call.branches))


class Placeholder:
    """Make stand-ins for the outputs of a skipped module, of the recorded shapes.

    The first tensor of an output flows on and may be edited in place (T2I-Adapter, FreeU), so it is real
    memory; the others are only added to or joined, so one zero without memory of its own serves.
    """

    def __init__(self, branches: int, recorded_branches: int) -> None:
        """Scale dimension 0 from the recorded number of branches to the present one."""
        self.branches = branches
        self.recorded_branches = recorded_branches
        self.is_first = True

    def __call__(self, recorded: Tensor) -> Tensor:
        """Return zeros in the shape, dtype and device of one recorded tensor."""
        batch = recorded.shape[0] * self.branches // self.recorded_branches
        device = recorded.device
        if self.is_first:
            self.is_first = False
            return torch.zeros((batch, *recorded.shape[1:]), dtype=recorded.dtype, device=device)
        return torch.zeros((), dtype=recorded.dtype, device=device).expand(batch, *recorded.shape[1:])


class Entry(Part):
    """Remember the tensors that enter a region, for residuals."""

    def __init__(self, index: int, bound: Assignment, module: nn.Module, passage: Passage) -> None:
        """Serve assignment `index`, whose region `module` begins."""
        super().__init__(index, bound)
        assert isinstance(bound.target, Region)
        self.streams = bound.target.streams
        self.places = {name: place for place, name in enumerate(parameters_of(module))}
        self.passage = passage

    def is_open(self, call: Call) -> bool:
        """Tell whether values may decide how the tensors are found."""
        return None in call.actions

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember, and let the module run."""
        call.entries[self.index] = self.streams_of(args, kwargs)
        return _RUN_IT

    def ahead(self, call: Call) -> Any:
        """Let the module run; its arguments are not known yet."""
        return _RUN_IT

    def streams_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """Return the tensors that enter the region."""
        return tuple(kwargs[name] if name in kwargs else args[self.places[name]] for name in self.streams)


class Probe(Part):
    """Let the policy decide from one module's output whether its region is reused in this call."""

    def after(self, call: Call, output: Any) -> None:
        """Ask the policy when the action is still open."""
        if call.actions[self.index] is None:
            call.decide(self.index, tuple(tensors(output)))


def needs_entry(policy: Policy, target: Target) -> bool:
    """Tell whether what enters a region matters to its policy: where it keeps or restores more than the output."""
    has_entry = isinstance(target, Region) and bool(target.entry)
    own = type(policy)
    return has_entry and (own.to_keep is not Policy.to_keep or own.restore is not Policy.restore)


def _computes(call: Call, index: int) -> bool:
    return call.actions[index] is Action.COMPUTE


def _no_elements(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)

"""Stand before a module's calls and obey the plan; the module itself always does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compiled import uncompiled
from .offloading import pass_by, splitting_hook
from .plan import Assignment
from .policy import Action, Policy
from .sites import Region, Target
from .tree import shape_of, tensors, tree_map, with_tensors

if TYPE_CHECKING:
    from .policy import Streams
    from .run import Call, RunState

_RUN_IT = object()
_SWITCH, _BASE = "_cachekit_switch", "_cachekit_switched"
_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Switch:
    """Stand before one module's calls: outside of its hooks and of whatever wraps its forward.

    The module's instance holds the switch, and gets a subclass of its own class that asks it. Wrappers on `forward`
    come and go beneath, in any order, and a module that is skipped does not move its weights either. It is an object
    so that a deep copy of the model copies it too.

    Compiled code is shared by like modules, and compiled anew for whatever differs. So within it the switch looks up
    nothing: before a call it is told its `order`, and after the call it reports what it noted.
    """

    def __init__(self, state: RunState, module: nn.Module, name: str) -> None:
        """Prepare for `module`; nothing is changed before `install`."""
        self.state = state
        self.module = module
        self.name = name
        self.parts: list[Part] = []
        self.behind: Any = None
        self.inner: Callable[..., Any] | None = None
        self.order: str | None = None
        self.given: Any = None
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
        self.module.__class__ = _switched(type(self.module))

    def uninstall(self) -> None:
        """Put back exactly what was there; a class that somebody put over ours since stays, and asks nobody."""
        if not self.in_place:
            return
        if self.behind is not None:
            self.behind.forward = self.inner
            return
        del vars(self.module)[_SWITCH]
        self.module.__class__ = vars(type(self.module)).get(_BASE, type(self.module))

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
        for part in self.parts:
            given = part.before(call, (), {})
            if given is not _RUN_IT:
                pass_by(self.module)
                self.order, self.given = "reuse", given
                return True
        wishes = {part.wish(call) for part in self.parts}
        self.order = "keep" if "keep" in wishes else "measure" if "measure" in wishes else "run"
        return False

    def _obey(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.order is None:
            return _interrupt(self, inner, args, kwargs)
        self.obeyed = True
        if self.order == "reuse":
            return self.given
        output = inner(*args, **kwargs)
        if self.order == "keep":
            self.noted = output
        elif self.order == "measure":
            self.noted = tree_map(shape_of, output)
        return output

    def report(self, call: Call) -> None:
        """Say what was noted in `call`, if it came by here and ran."""
        if not self.obeyed or self.order == "reuse":
            return
        # Compiled code may use the memory of its outputs again.
        noted = tree_map(torch.clone, self.noted) if self.order == "keep" else self.noted
        for part in self.parts:
            part.after(call, noted)

    def forget(self) -> None:
        """Hold no order and no tensor between calls."""
        self.order = self.given = self.noted = None
        self.obeyed = False


@uncompiled("decides here by values")
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

    def after(self, call: Call, output: Any) -> None:
        """Look at the module's computed output."""


class Exit(Part):
    """Keep and restore the output of a site, or of the last module of a region."""

    def is_open(self, call: Call) -> bool:
        """Tell whether the tensors that enter the region are needed as well."""
        return super().is_open(call) or (needs_entry(self.policy, self.target) and not _computes(call, self.index))

    def wish(self, call: Call) -> str:
        """Return "keep" where something is kept, a reuse that found nothing included."""
        return "run" if _computes(call, self.index) else "keep"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the restored output when the action is REUSE and something is kept."""
        action = call.actions[self.index]
        if action is not Action.REUSE:
            return _RUN_IT
        found = call.kept(self.index)
        if found is None:
            call.miss(self.index)
            call.actions[self.index] = Action.STORE
            return _RUN_IT
        call.count(self.index, Action.REUSE)
        template = call.run.templates[call.slot(self.index)]
        streams = self.policy.restore(found, self._entry(call, template), call.moment(self.index))
        return with_tensors(template, self._own(streams))

    def after(self, call: Call, output: Any) -> None:
        """Keep the output when the action is STORE."""
        action = call.actions[self.index]
        if action is Action.COMPUTE:
            call.count(self.index, Action.COMPUTE)
            return
        call.count(self.index, Action.STORE)
        # What lies on another device is only fetched for those who look at it.
        before = call.kept(self.index) if type(self.policy).to_keep is not Policy.to_keep else None
        entry = self._entry(call, output)
        streams = self._own(tuple(tensors(output)))
        call.keep(self.index, self.policy.to_keep(streams, entry, before, call.moment(self.index)))
        call.run.templates[call.slot(self.index)] = tree_map(_no_elements, output)

    def _entry(self, call: Call, output: Any) -> Streams:
        """Return the tensors that entered the region, without a stream that the exit ends (its output is None)."""
        entry = call.entries.get(self.index, ())
        if isinstance(output, tuple) and len(output) == len(entry):
            return tuple(tensor for tensor, left in zip(entry, output) if left is not None)
        return entry

    def _own(self, streams: Streams) -> Streams:
        edited = isinstance(self.target, Region) and self.target.edited
        return tuple(tensor.clone() for tensor in streams) if edited else streams


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

    def __init__(self, index: int, bound: Assignment, module: nn.Module, streams: tuple[str, ...]) -> None:
        """Serve assignment `index`; `streams` are parameter names of `module`'s forward."""
        super().__init__(index, bound)
        self.streams = streams
        self.places = parameter_places(module)

    def is_open(self, call: Call) -> bool:
        """Tell whether somebody will ask for the tensors."""
        return not _computes(call, self.index)

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember, and let the module run."""
        call.entries[self.index] = tuple(
            kwargs[name] if name in kwargs else args[self.places[name]] for name in self.streams
        )
        return _RUN_IT


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


def parameter_places(module: nn.Module) -> dict[str, int]:
    """Return the position of each parameter of the module class's forward, without self."""
    import inspect

    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {name: place for place, name in enumerate(names)}


def _no_elements(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)

"""Put one small callable on a module's forward that obeys the plan; the original always does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .plan import Assignment
from .policy import Action
from .sites import Region
from .tree import shape_of, tensors, tree_map, with_tensors

if TYPE_CHECKING:
    from .policy import Streams
    from .run import Call, RunState

_RUN_IT = object()


class Switch:
    """Stand on one module's forward, as an object, so that a deep copy of the model copies it too."""

    def __init__(self, state: RunState, module: nn.Module, name: str) -> None:
        """Prepare for `module`; nothing is changed before `install`."""
        self.state = state
        self.module = module
        self.name = name
        self.parts: list[Part] = []
        self.had_forward = "forward" in vars(module)
        self.inner = module.forward

    def install(self) -> None:
        """Put this switch on the module's instance."""
        self.module.forward = self

    def uninstall(self) -> None:
        """Put back exactly what was there, also beneath a wrapper that was added later."""
        for attribute in ("forward", "_old_forward"):
            if vars(self.module).get(attribute) is self:
                if attribute == "forward" and not self.had_forward:
                    del self.module.forward
                else:
                    setattr(self.module, attribute, self.inner)

    @property
    def in_place(self) -> bool:
        """Tell whether the module still calls this switch."""
        return any(vars(self.module).get(name) is self for name in ("forward", "_old_forward"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward unless an action of the present call says otherwise."""
        call = self.state.call
        if call is None:
            return self.inner(*args, **kwargs)
        for part in self.parts:
            result = part.before(call, args, kwargs)
            if result is not _RUN_IT:
                return result
        output = self.inner(*args, **kwargs)
        for part in self.parts:
            part.after(call, output)
        return output


class Part:
    """Play one role of a module for one assignment."""

    def __init__(self, index: int, bound: Assignment) -> None:
        """Serve assignment `index`."""
        self.index = index
        self.policy = bound.policy
        self.target = bound.target

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a stand-in for the module's output, or the marker that it has to run."""
        return _RUN_IT

    def after(self, call: Call, output: Any) -> None:
        """Look at the module's computed output."""


class Exit(Part):
    """Keep and restore the output of a site, or of the last module of a region."""

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the restored output when the action is REUSE and something is kept."""
        action = call.actions[self.index]
        if action is not Action.REUSE:
            return _RUN_IT
        found = call.kept(self.index)
        if found is None:
            call.miss(self.index)
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
        before = call.kept(self.index)
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


def parameter_places(module: nn.Module) -> dict[str, int]:
    """Return the position of each parameter of the module class's forward, without self."""
    import inspect

    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {name: place for place, name in enumerate(names)}


def _no_elements(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)

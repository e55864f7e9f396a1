"""The roles that a switch plays for its module: exit, member, entry or probe of a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cachekit.interface.policy import Action, Moment, Policy
from cachekit.interface.sites import Region, Target
from cachekit.planning.assignments import Assignment
from cachekit.switches.placeholders import Placeholder
from cachekit.tensors import shape_of, tensors, tree_map, with_tensors
from cachekit.upstream.arguments import parameters_of

if TYPE_CHECKING:
    from cachekit.interface.policy import Streams
    from cachekit.runs.call import Call


from collections.abc import Iterator

RUN_IT = object()


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
        return RUN_IT

    def ahead(self, call: Call) -> Any:
        """Return the same before the call, or a `Restoring` that makes the stand-in within it."""
        return self.before(call, (), {})

    def reused(self, call: Call) -> None:
        """Take notice that a stand-in was handed out."""

    def after(self, call: Call, output: Any) -> None:
        """Look at the module's computed output."""


class RegionInputs:
    """Hold, within a call that is told ahead, the tensors that enter a region until its exit."""

    entered: Streams = ()


class Exit(Part):
    """Keep and restore the output of a site, or of the last module of a region.

    There is a `passage` where what enters the region matters.
    """

    def __init__(self, index: int, bound: Assignment, passage: RegionInputs | None = None) -> None:
        """Serve assignment `index`."""
        super().__init__(index, bound)
        self.passage = passage

    def is_open(self, call: Call) -> bool:
        """Tell whether values decide, or may decide how what enters the region is found."""
        return super().is_open(call) or (self.passage is not None and None in call.actions)

    def wish(self, call: Call) -> str:
        """Return "keep" where something is kept, a reuse that found nothing included."""
        return "run" if computes(call, self.index) else "keep"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the restored output when the action is REUSE and something is kept."""
        found = self._restoring(call)
        return RUN_IT if found is None else found.output(self._entered(call))

    def ahead(self, call: Call) -> Any:
        """Return the restored output, or what restores it from the tensors that enter the region."""
        found = self._restoring(call)
        if found is None:
            return RUN_IT
        return found.output(()) if self.passage is None else found

    def _restoring(self, call: Call) -> Restoring | None:
        if call.actions[self.index] is not Action.REUSE:
            return None
        kept = call.kept(self.index)
        if kept is None:
            call.miss(self.index)
            call.actions[self.index] = Action.STORE
            return None
        return Restoring(self, kept, call.keeper.templates[call.slot(self.index)], call.moment(self.index))

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
        call.keeper.templates[call.slot(self.index)] = tree_map(_no_elements, output)

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
        return "run" if computes(call, self.index) else "measure"

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a placeholder when the region is reused."""
        if call.actions[self.index] is not Action.REUSE:
            return RUN_IT
        shapes, branches = call.keeper.shapes[call.slot(self.index), self.name]
        placeholder = Placeholder(len(call.branches), branches)
        return tree_map(placeholder, shapes)

    def after(self, call: Call, output: Any) -> None:
        """Record, once in a run, the shapes that a placeholder must have."""
        key = (call.slot(self.index), self.name)
        if call.actions[self.index] is not Action.COMPUTE and key not in call.keeper.shapes:
            call.keeper.shapes[key] = (tree_map(shape_of, output), len(call.branches))


class Entry(Part):
    """Remember the tensors that enter a region, for residuals."""

    def __init__(self, index: int, bound: Assignment, module: nn.Module, passage: RegionInputs) -> None:
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
        return RUN_IT

    def ahead(self, call: Call) -> Any:
        """Let the module run; its arguments are not known yet."""
        return RUN_IT

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


def computes(call: Call, index: int) -> bool:
    """Whether the action of assignment `index` in this call is COMPUTE."""
    return call.actions[index] is Action.COMPUTE


def _no_elements(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)


def region_parts(index: int, bound: Assignment, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Part]]:
    """Yield, by module name, the parts that skip and restore the region of assignment `index`."""
    region = bound.target
    assert isinstance(region, Region)
    if region.probe:
        yield region.probe, Probe(index, bound)
    passage = RegionInputs() if needs_entry(bound.policy, region) else None
    if passage is not None:
        yield region.entry, Entry(index, bound, modules[region.entry], passage)
    for name in region.skipped:
        yield name, Member(index, bound, name)
    yield region.exit, Exit(index, bound, passage)

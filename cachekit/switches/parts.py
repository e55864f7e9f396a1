"""The roles of a module in what is cached: exit, member, entry or probe of a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cachekit.interface.policy import OPEN, Action, Moment, Policy
from cachekit.interface.sites import Region, Target
from cachekit.planning.assignments import Assignment
from cachekit.switches.orders import Order
from cachekit.switches.placeholders import Memory, Placeholder, Scratch, zeros, zeros_like
from cachekit.tensors import tensors, tree_map, with_tensors
from cachekit.upstream.arguments import parameters_of

if TYPE_CHECKING:
    from cachekit.interface.policy import Streams
    from cachekit.runs.call import Call

#: Returned in place of a stand-in for the module's output: the module has to run.
RUN_IT = object()


class Part:
    """One role of a module, which may skip the module's calls or use what they return."""

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a stand-in for the output of the module called with these arguments; `RUN_IT` if it has to run."""
        return RUN_IT

    def skipped(self, call: Call) -> None:
        """Count that the module was skipped, because this part or another made a stand-in."""

    def after(self, call: Call, output: Any) -> None:
        """Use the output of the module, which ran."""


class AssignedPart(Part):
    """One role of a module for one assignment.

    Where the assignment's action is COMPUTE the module runs and the part does nothing but count.
    """

    #: Whether this part counts.
    is_counted = False

    def __init__(self, index: int, bound: Assignment) -> None:
        """Bind the role to assignment `index`."""
        self.index = index
        self.policy = bound.policy
        self.target = bound.target

    def is_open(self, call: Call) -> bool:
        """Whether what this part does depends on values within the call."""
        return call.actions[self.index] is OPEN

    def before_compiled(self, call: Call) -> Any:
        """Make the stand-in before the call, or a `Restoring` for within it; `RUN_IT` if the module has to run."""
        return self.before(call, (), {})

    def needs(self, call: Call) -> Order:
        """Choose how the module has to run in compiled code, for `after`: RUN, MEASURE or KEEP."""
        return Order.RUN


class Exit(AssignedPart):
    """Keeps and restores the output of a site, or of the last module of a region."""

    is_counted = True

    def __init__(self, index: int, bound: Assignment) -> None:
        """Bind the role to assignment `index`."""
        super().__init__(index, bound)
        self._needs_entry = needs_entry(bound.policy, bound.target)
        self._needs_kept = _overrides(bound.policy, "to_keep")
        self._is_edited = isinstance(bound.target, Region) and bound.target.edited

    def is_open(self, call: Call) -> bool:
        """Whether values decide, or may decide how the tensors that enter the region are found."""
        return super().is_open(call) or (self._needs_entry and OPEN in call.actions)

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Restore the output where the action is REUSE and something is kept."""
        found = self._restoring(call)
        return RUN_IT if found is None else found.output(call.entries.get(self.index, ()))

    def before_compiled(self, call: Call) -> Any:
        """Restore the output, or make the `Restoring` that does from the tensors that enter the region."""
        found = self._restoring(call)
        if found is None:
            return RUN_IT
        return found if self._needs_entry else found.output(())

    def needs(self, call: Call) -> Order:
        """Choose KEEP where something is kept, even if a reuse was planned that found nothing."""
        return Order.RUN if computes(call, self.index) else Order.KEEP

    def skipped(self, call: Call) -> None:
        """Count the reuse, unless it was of another region around this module."""
        if call.actions[self.index] is Action.REUSE:
            call.count(self.index, Action.REUSE)

    def after(self, call: Call, output: Any) -> None:
        """Keep the output where the action is STORE."""
        if computes(call, self.index):
            call.count(self.index, Action.COMPUTE)
            return
        call.count(self.index, Action.STORE)
        # What lies on another device is only fetched for policies that look at it.
        before = call.kept(self.index) if self._needs_kept else None
        entry = _leaving(call.entries.get(self.index, ()), output)
        streams = self.own(tuple(tensors(output)))
        call.keep(self.index, self.policy.to_keep(streams, entry, before, call.moment(self.index)))
        call.keeper.templates[call.slot(self.index)] = tree_map(_no_elements, output)

    def own(self, streams: Streams) -> Streams:
        """Copy the streams where later code edits them in place."""
        return tuple(tensor.clone() for tensor in streams) if self._is_edited else streams

    def _restoring(self, call: Call) -> Restoring | None:
        if call.actions[self.index] is not Action.REUSE:
            return None
        kept = call.kept(self.index)
        if kept is None:
            call.miss(self.index)
            call.actions[self.index] = Action.STORE
            return None
        return Restoring(self, kept, call.keeper.templates[call.slot(self.index)], call.moment(self.index))


@dataclass
class Restoring:
    """Makes an exit's output from what was kept and the tensors that enter its region, in compiled code too."""

    exit: Exit
    kept: Any
    template: Any
    moment: Moment

    def output(self, entry: Streams) -> Any:
        """Make the output of a call in which the region's inputs are `entry`."""
        streams = self.exit.policy.restore(self.kept, _leaving(entry, self.template), self.moment)
        return with_tensors(self.template, self.exit.own(streams))


class Member(AssignedPart):
    """Skips a module inside a region; its stand-in has the right shapes and nothing else."""

    def __init__(self, index: int, bound: Assignment, name: str) -> None:
        """Bind the role of module `name` to assignment `index`."""
        super().__init__(index, bound)
        self.name = name

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a placeholder where the region is reused."""
        if call.actions[self.index] is not Action.REUSE:
            return RUN_IT
        if call.scratch is None:
            call.scratch = Scratch()
        return self._placeholder(call, call.scratch)

    def before_compiled(self, call: Call) -> Any:
        """Make a placeholder with memory of its own: compiled code assumes that its inputs do not overlap."""
        return self._placeholder(call, zeros) if call.actions[self.index] is Action.REUSE else RUN_IT

    def _placeholder(self, call: Call, memory: Memory) -> Any:
        shapes, branches = call.keeper.shapes[call.slot(self.index), self.name]
        return tree_map(Placeholder(len(call.branches), branches, memory), shapes)

    def needs(self, call: Call) -> Order:
        """Choose MEASURE where a placeholder may be needed later."""
        return Order.RUN if computes(call, self.index) else Order.MEASURE

    def after(self, call: Call, output: Any) -> None:
        """Record, once in a run, the shapes that a placeholder must have."""
        key = (call.slot(self.index), self.name)
        if not computes(call, self.index) and key not in call.keeper.shapes:
            call.keeper.shapes[key] = (tree_map(zeros_like, output), len(call.branches))


class Entry(AssignedPart):
    """Remembers the tensors that enter a region, for policies that keep or restore a residual."""

    def __init__(self, index: int, bound: Assignment, module: nn.Module) -> None:
        """Bind the role to assignment `index`, whose region begins with `module`."""
        super().__init__(index, bound)
        assert isinstance(bound.target, Region)
        self.streams = bound.target.streams
        self.places = {name: place for place, name in enumerate(parameters_of(module))}

    def is_open(self, call: Call) -> bool:
        """Whether values may decide how the tensors are found."""
        return OPEN in call.actions

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember the tensors, unless the region is only computed."""
        if not computes(call, self.index):
            call.entries[self.index] = self.streams_of(args, kwargs)
        return RUN_IT

    def before_compiled(self, call: Call) -> Any:
        """`RUN_IT`: the arguments are not known before the call."""
        return RUN_IT

    def streams_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """Pick the tensors that enter the region from the arguments of its first module."""
        return tuple(kwargs[name] if name in kwargs else args[self.places[name]] for name in self.streams)


class Probe(AssignedPart):
    """Shows a policy one module's output, from which it decides whether its region is reused in the same call."""

    def after(self, call: Call, output: Any) -> None:
        """Ask the policy where the action is still open."""
        if call.actions[self.index] is OPEN:
            call.decide(self.index, tuple(tensors(output)))


def region_parts(index: int, bound: Assignment, modules: dict[str, nn.Module]) -> Iterator[tuple[str, AssignedPart]]:
    """Yield, by module name, the parts that skip and restore the region of assignment `index`."""
    region = bound.target
    assert isinstance(region, Region)
    if region.probe:
        yield region.probe, Probe(index, bound)
    if needs_entry(bound.policy, region):
        yield region.entry, Entry(index, bound, modules[region.entry])
    for name in region.skipped:
        yield name, Member(index, bound, name)
    yield region.exit, Exit(index, bound)


def needs_entry(policy: Policy, target: Target) -> bool:
    """Whether a policy uses the tensors that enter a region: where it keeps or restores more than the output."""
    has_entry = isinstance(target, Region) and bool(target.entry)
    return has_entry and (_overrides(policy, "to_keep") or _overrides(policy, "restore"))


def computes(call: Call, index: int) -> bool:
    """Whether the action of assignment `index` in this call is COMPUTE."""
    return call.actions[index] is Action.COMPUTE


def _overrides(policy: Policy, method: str) -> bool:
    return getattr(type(policy), method) is not getattr(Policy, method)


def _leaving(entry: Streams, output: Any) -> Streams:
    """Drop the streams that end within the region, for which the exit's output has None."""
    if isinstance(output, tuple) and len(output) == len(entry):
        return tuple(tensor for tensor, left in zip(entry, output) if left is not None)
    return entry


def _no_elements(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)

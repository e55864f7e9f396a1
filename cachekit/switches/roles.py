"""The roles of a module in what is cached: exit, member, entry or probe of a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cachekit.errors import PolicyError, SiteError, attributed
from cachekit.interface.indicators import Indicator, Signal
from cachekit.interface.moment import OPEN, Action
from cachekit.interface.parts import credited
from cachekit.interface.sites import Kind, Region
from cachekit.planning.assignments import Assignment
from cachekit.runs.quantities import matching
from cachekit.switches.orders import Order
from cachekit.switches.placeholders import Placeholder, Recorded, Scratch, alike, zeros_like
from cachekit.tensors import no_elements, tensors, tree_map, with_tensors
from cachekit.upstream.arguments import parameters_of
from cachekit.upstream.attention import image_first, streams_of_site

if TYPE_CHECKING:
    from cachekit.interface.moment import Streams
    from cachekit.runs.call import Call

#: Returned in place of a stand-in for the module's output: the module has to run.
RUN_IT = object()

_REUSE = Action.REUSE  # looking it up on the enum in each call is slow


class Role:
    """One role of a module, which may skip the module's calls or use what they return."""

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a stand-in for the output of the module called with these arguments; `RUN_IT` if it has to run."""
        return RUN_IT

    def skipped(self, call: Call) -> None:
        """Count that the module was skipped, because this role or another made a stand-in."""

    def after(self, call: Call, output: Any) -> None:
        """Use the output of the module, which ran."""


class AssignedRole(Role):
    """One role of a module for one assignment.

    Where the assignment's action is COMPUTE the module runs and the role does nothing but count.
    """

    #: Whether this role counts.
    is_counted = False

    def __init__(self, index: int, bound: Assignment) -> None:
        """Bind the role to assignment `index`."""
        self.index = index
        self.bound = bound
        self.policy = bound.policy
        self.target = bound.target

    def is_open(self, call: Call) -> bool:
        """Whether what this role does depends on values within the call."""
        return call.actions[self.index] is OPEN

    def before_compiled(self, call: Call) -> Any:
        """Make the stand-in before the call, or a `Restoring` for within it; `RUN_IT` if the module has to run."""
        return self.before(call, (), {})

    def refuse_open(self, call: Call) -> None:
        """Raise `PolicyError` where the region is reached before its probe has decided."""
        if call.actions[self.index] is OPEN:
            probe = self.target.probe if isinstance(self.target, Region) else ""
            place = credited(self.bound.choice.where, self.policy)
            raise PolicyError(
                f"{attributed(self.policy)}: probe {probe!r} of {place}"
                f" does not run before {self.target.name!r}; give a module that does"
            )

    def needs(self, call: Call) -> Order:
        """Choose how the module has to run in compiled code, for `after`: RUN, MEASURE or KEEP."""
        return Order.RUN


class Exit(AssignedRole):
    """Keeps and restores the output of a site, or of the last module of a region."""

    is_counted = True

    def __init__(self, index: int, bound: Assignment) -> None:
        """Bind the role to assignment `index`."""
        super().__init__(index, bound)
        self.quantity = bound.choice.what.of
        self._is_edited = isinstance(bound.target, Region) and bound.target.edited

    @property
    def needs_entry(self) -> bool:
        """Whether what enters is needed for what is kept."""
        return self.quantity == "residual"

    def is_open(self, call: Call) -> bool:
        """Whether values decide the action, or any action where the region's inputs have to be recorded."""
        return super().is_open(call) or (self.needs_entry and OPEN in call.actions)

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the output where the action is REUSE and something is kept."""
        self.refuse_open(call)
        found = self._restoring(call)
        return RUN_IT if found is None else found.output(call.entries.get(self.index, ()))

    def before_compiled(self, call: Call) -> Any:
        """Make the output, or the `Restoring` that does from the tensors that enter the region."""
        found = self._restoring(call)
        if found is None:
            return RUN_IT
        return found if self.needs_entry else found.output(())

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
        entry = leaving(call.entries.get(self.index, ()), output)
        call.keep(self.index, self._taken(tuple(tensors(output)), entry))
        call.keeper.templates[call.slot(self.index)] = tree_map(no_elements, output)

    def _taken(self, streams: Streams, entry: Streams) -> Streams:
        if self.quantity == "output":
            return self.own(streams)
        try:
            return tuple(made - into for made, into in zip(streams, matching(streams, entry)))
        except SiteError as error:
            raise SiteError(f"{self.policy}: {self.target.name!r}: {error}") from None

    def own(self, streams: Streams) -> Streams:
        """Copy the streams where later code edits them in place."""
        return tuple(tensor.clone() for tensor in streams) if self._is_edited else streams

    def _restoring(self, call: Call) -> Restoring | None:
        if call.actions[self.index] is not Action.REUSE:
            return None
        predicted = call.predicted(self.index)
        if predicted is None:
            call.miss(self.index)
            call.actions[self.index] = Action.STORE
            return None
        return Restoring(self, predicted, call.keeper.templates[call.slot(self.index)])


@dataclass
class Restoring:
    """Makes an exit's output from what was predicted and the tensors that enter its region, in compiled code too."""

    exit: Exit
    predicted: Streams
    template: Any

    def output(self, entry: Streams) -> Any:
        """Make the output of a call in which the region's inputs are `entry`."""
        if not self.exit.needs_entry:
            return with_tensors(self.template, self.exit.own(self.predicted))
        entered = leaving(entry, self.template)
        return with_tensors(self.template, tuple(into + added for into, added in zip(entered, self.predicted)))


class Member(AssignedRole):
    """Skips a module inside a region; its stand-in has the right shapes and nothing else."""

    def __init__(self, index: int, bound: Assignment, name: str) -> None:
        """Bind the role of module `name` to assignment `index`."""
        super().__init__(index, bound)
        self.name = name

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a placeholder where the region is reused."""
        if call.actions[self.index] is not _REUSE:
            self.refuse_open(call)
            return RUN_IT
        if call.scratch is None:
            call.scratch = Scratch()
        return call.scratch.placeholder(self._recorded(call), len(call.branches))

    def before_compiled(self, call: Call) -> Any:
        """Make a placeholder with memory of its own: compiled code assumes that its inputs do not overlap."""
        if call.actions[self.index] is not _REUSE:
            return RUN_IT
        recorded = self._recorded(call)
        return tree_map(Placeholder(len(call.branches), recorded.branches), recorded.tree)

    def _recorded(self, call: Call) -> Recorded:
        found: dict[str, Recorded] = call.keeper.shapes[call.slot(self.index), self.name]
        return found.get(call.branch) or next(iter(found.values()))

    def needs(self, call: Call) -> Order:
        """Choose MEASURE where a placeholder may be needed later."""
        return Order.RUN if computes(call, self.index) else Order.MEASURE

    def after(self, call: Call, output: Any) -> None:
        """Record, once in a run, the shapes that a placeholder must have: texts of branches may differ in length."""
        if computes(call, self.index):
            return
        keeper, branches = call.keeper, len(call.branches)
        found = keeper.shapes.setdefault((call.slot(self.index), self.name), {})
        if call.branch not in found:
            kind = (alike(output), branches)
            if kind not in keeper.kinds:
                keeper.kinds[kind] = Recorded(tree_map(zeros_like, output), branches)
            found[call.branch] = keeper.kinds[kind]


class Entry(AssignedRole):
    """Remembers the tensors that enter a site or region, for what is kept of a residual."""

    def __init__(self, index: int, bound: Assignment, module: nn.Module, streams: tuple[str, ...]) -> None:
        """Bind the role to assignment `index`, which begins with `module`; `streams` names its parameters."""
        super().__init__(index, bound)
        self.streams = streams
        self.places = {name: place for place, name in enumerate(parameters_of(module))}

    def is_open(self, call: Call) -> bool:
        """Whether values decide any action of the call: the inputs are then recorded outside of compiled code."""
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


class Probe(Entry):
    """Shows an indicator what enters and leaves one module: it decides whether its region is reused in the same call.

    Both come with `hidden_states` first, in whatever order the module returns its streams.
    """

    def __init__(self, index: int, bound: Assignment, module: nn.Module, streams: tuple[str, ...]) -> None:
        """Bind the role to assignment `index`; `streams` are in the order in which `module` returns them."""
        super().__init__(index, bound, module, image_first(streams))
        self.returned = streams
        self.is_early = isinstance(bound.target, Region) and bound.target.early

    def is_open(self, call: Call) -> bool:
        """Whether values are shown, as they are in each call."""
        return True

    def streams_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """Pick those that are given: the first attention may have no text."""
        given = (kwargs.get(name, next(iter(args[self.places[name] :]), None)) for name in self.streams)
        return tuple(stream for stream in given if stream is not None)

    def before(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show what enters an early probe, or remember it."""
        entered = self.streams_of(args, kwargs)
        if self.is_early:
            call.show(self.index, Signal(entered))
        else:
            call.probes[self.index] = entered
        return RUN_IT

    def after(self, call: Call, output: Any) -> None:
        """Show what has entered and left."""
        if not self.is_early:
            call.show(self.index, Signal(call.probes.get(self.index, ()), self._in_order(tuple(tensors(output)))))

    def _in_order(self, output: Streams) -> Streams:
        """Put what the probe returned in the order of its streams, where each of them is returned."""
        if len(output) != len(self.returned):
            return output
        return tuple(output[self.returned.index(name)] for name in self.streams)


def roles_of(index: int, bound: Assignment, modules: dict[str, nn.Module]) -> Iterator[tuple[str, AssignedRole]]:
    """Yield, by module name, the roles that skip and restore the target of assignment `index`."""
    target = bound.target
    if isinstance(target, Region) and target.probe and isinstance(bound.choice.when, Indicator):
        yield target.probe, Probe(index, bound, modules[target.probe], _streams_of_probe(target, modules))
    entered = entry_of(bound, modules)
    if entered is not None:
        yield entered[0], Entry(index, bound, modules[entered[0]], entered[1])
    for name in target.skipped if isinstance(target, Region) else ():
        yield name, Member(index, bound, name)
    yield target.exit, Exit(index, bound)


def _streams_of_probe(region: Region, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Name the parameters of a probe that are shown: a block's streams, or those of an attention."""
    module = modules[region.probe]
    if region.early:
        return streams_of_site(module, Kind.JOINT_ATTENTION)
    return region.streams or streams_of_site(module, Kind.BLOCK)


def entry_of(bound: Assignment, modules: Mapping[str, nn.Module]) -> tuple[str, tuple[str, ...]] | None:
    """Find the module whose inputs enter a target, and which of its parameters; None where they are not needed."""
    if bound.choice.what.of != "residual" or bound.is_guidance or bound.is_whole:
        return None
    if isinstance(bound.target, Region):
        return bound.target.entry, bound.target.streams
    return bound.target.name, streams_of_site(modules[bound.target.name], bound.target.kind)


def computes(call: Call, index: int) -> bool:
    """Whether the action of assignment `index` in this call is COMPUTE."""
    return call.actions[index] is Action.COMPUTE


def leaving(entry: Streams, output: Any) -> Streams:
    """Drop the streams that end within the region, for which the exit's output has None."""
    if isinstance(output, tuple) and len(output) == len(entry):
        return tuple(tensor for tensor, left in zip(entry, output) if left is not None)
    return entry

"""Attach policies to a denoiser, drive its runs, and undo everything exactly."""

from __future__ import annotations

import contextlib
import inspect
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .catalog import Catalog, installed
from .clock import Clock, count_steps, mark_of, shares_table
from .errors import AdapterError, AttachmentError, CachekitError
from .guidance import (
    Observation,
    branch_order,
    by_branch,
    first_tensor,
    is_guided,
    pick,
    spread,
)
from .pipelines import call_arguments, denoiser_of, plain_arguments, track, untrack
from .plan import Assignment, Branches, Plan, Row, assign, make_plan
from .policy import Action, Policy
from .report import Report
from .run import Call, Run, RunState
from .sites import Kind, Region, SiteMap
from .spec import Spec, parse_all
from .switch import Entry, Exit, Member, Part, Probe, Switch
from .tree import shape_of, tree_map

_ATTRIBUTE = "_cachekit_attachment"
_SAMPLE, _TIMESTEP = ("sample", "hidden_states", "x"), ("timestep", "timesteps", "t")


def apply(pipe: Any, specs: Spec | Iterable[Spec], *, catalog: Catalog | None = None) -> Attachment:
    """Apply caching policies to a pipeline (or a bare denoiser) and return the attachment that undoes it.

    `specs` is one or several of `"name:key=value"` or policy instances. Raise a `CachekitError` with one line
    that says what to do, and leave the pipeline as it was, when that is impossible.
    """
    catalog = catalog or installed()
    policies = parse_all(specs, catalog.policies)
    denoiser = denoiser_of(pipe)
    if _ATTRIBUTE in vars(denoiser):
        present = ", ".join(repr(str(policy)) for policy in vars(denoiser)[_ATTRIBUTE].policies)
        raise AttachmentError(
            f"{type(denoiser).__name__} already has an attachment ({present});"
            " call cachekit.remove(pipe) first, or give all specs to one apply"
        )
    attachment = Attachment(denoiser, policies, catalog)
    attachment.install(pipe)
    return attachment


def remove(pipe: Any) -> None:
    """Undo `apply` on a pipeline or denoiser; without an attachment nothing happens."""
    attachment = attachment_of(denoiser_of(pipe))
    if attachment is not None:
        attachment.remove()
    untrack(pipe)


def attachment_of(denoiser: Any) -> Attachment | None:
    """Return the attachment of a denoiser, if it has one."""
    found: Attachment | None = vars(denoiser).get(_ATTRIBUTE)
    return found


class Attachment:
    """Own everything that `apply` changed, and undo it.

    It belongs to the denoiser: every pipeline that shares the denoiser is cached. Usable as a context manager.
    """

    def __init__(self, denoiser: nn.Module, policies: Sequence[Policy], catalog: Catalog) -> None:
        """Decide everything for `denoiser`; nothing is changed before `install`."""
        self.denoiser = denoiser
        self.policies = tuple(policies)
        self.catalog = catalog
        adapter: Adapter = catalog.adapter_for(denoiser)
        self.sites: SiteMap = adapter.sites(denoiser)
        self.layout = adapter.layout(denoiser)
        self.assignments = assign((policy, policy.select(self.sites), policy.stays(self.layout)) for policy in policies)
        self._observers = [policy for policy in policies if type(policy).observe is not Policy.observe]
        self._parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._state = RunState()
        self._plans: dict[tuple[int, Branches], Plan] = {}
        self._pipes: weakref.WeakSet[Any] = weakref.WeakSet()
        self._switches: list[Switch] = []
        self._handles: list[Any] = []
        self._last: Report | None = None
        catalog.check_plan(self._plan(50, self.layout.order))

    # -- attaching and undoing ----------------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Put the switches, hooks and the pipeline's tracking class in place, or change nothing."""
        switches = self._make_switches()
        try:
            for switch in switches:
                self._switches.append(switch)
                switch.install()
            before = self.denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)
            self._handles.append(before)
            self._handles.append(self.denoiser.register_forward_hook(self._after_call, with_kwargs=True))
            vars(self.denoiser)[_ATTRIBUTE] = self
            if pipe is not self.denoiser:
                self._pipes.add(pipe)
                track(pipe)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back as it was before `apply`; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for switch in self._switches:
            switch.uninstall()
        self._handles, self._switches = [], []
        if vars(self.denoiser).get(_ATTRIBUTE) is self:
            del vars(self.denoiser)[_ATTRIBUTE]
        for pipe in list(self._pipes):
            untrack(pipe)
        self._end_run(None)

    def __enter__(self) -> Attachment:
        """Return the attachment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it."""
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Return an attachment of the copied denoiser, with no run and no pipeline of its own yet."""
        import copy

        twin = object.__new__(type(self))
        memo[id(self)] = twin
        fresh: dict[str, Any] = {"_pipes": weakref.WeakSet(), "_last": None, "_plans": {}}
        # What never changes is shared.
        fresh |= {name: vars(self)[name] for name in ("catalog", "policies", "assignments", "sites", "layout")}
        for name, value in vars(self).items():
            vars(twin)[name] = fresh[name] if name in fresh else copy.deepcopy(value, memo)
        return twin

    def _make_switches(self) -> list[Switch]:
        modules = dict(self.denoiser.named_modules())
        switches: dict[str, Switch] = {}

        def at(name: str) -> list[Part]:
            if name not in modules:
                raise AttachmentError(f"{type(self.denoiser).__name__} has no module {name!r}, named by its adapter")
            return switches.setdefault(name, Switch(self._state, modules[name], name)).parts

        for index, bound in enumerate(self.assignments):
            if bound.target.kind is Kind.GUIDANCE:
                continue
            if isinstance(bound.target, Region):
                for name, part in _region_parts(index, bound, modules):
                    at(name).append(part)
            else:
                at(bound.target.name).append(Exit(index, bound))
        return list(switches.values())

    # -- what it tells ------------------------------------------------------------------------------------

    def plan(self, num_inference_steps: int, *, guided: bool = True) -> Plan:
        """Return the table of actions of a run whose loop has `num_inference_steps` iterations."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise CachekitError(f"num_inference_steps={num_inference_steps!r}: give a whole number of at least 1")
        return self._plan(num_inference_steps, self.layout.order if guided else ("cond",))

    def report(self) -> Report:
        """Return what the last run did: the present one of this thread, if it has not ended."""
        if self._state.run is not None and self._state.run.signature:
            return self._report(self._state.run)
        if self._last is None:
            raise AttachmentError("no run yet: call the pipeline, then report()")
        return self._last

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run this thread's calls uncached within the block."""
        self._state.paused += 1
        try:
            yield
        finally:
            self._state.paused -= 1

    def _plan(self, steps: int, order: Branches) -> Plan:
        if (steps, order) not in self._plans:
            self._plans[steps, order] = make_plan(self.assignments, steps, order)
        return self._plans[steps, order]

    def _report(self, run: Run) -> Report:
        from .macs import cost_of

        return Report(self.assignments, run.finish(), lambda record: cost_of(self, record))

    # -- runs ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run_of(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Bound one run exactly: what is kept ends with the pipeline's call, by an exception too."""
        self._pipes.add(pipe)
        self._check_switches()
        state = self._state
        if state.pipeline is None:
            self._end_run(False)  # of a bare loop, which nothing else ends
        outer = (state.run, state.call, state.pipeline)
        state.run, state.call = None, None
        state.pipeline = (pipe, call_arguments(pipe, args, kwargs))
        try:
            yield
        except BaseException:
            self._end_run(True)
            raise
        else:
            self._end_run(False)
        finally:
            state.run, state.call, state.pipeline = outer

    def _end_run(self, interrupted: bool | None) -> None:
        run, self._state.run, self._state.call = self._state.run, None, None
        if run is None or not run.signature:  # none, or one whose first call was refused
            return
        run.record.interrupted = bool(interrupted)
        self._last = self._report(run)
        run.forget()
        if interrupted is False:
            self.catalog.run_finished(self._last)

    def _check_switches(self) -> None:
        if any(handle.hooks_dict_ref().get(handle.id) is None for handle in self._handles):
            raise AttachmentError(
                f"something removed the hooks of {type(self.denoiser).__name__} since apply;"
                " call cachekit.remove(pipe) and apply again"
            )
        for switch in self._switches:
            if not switch.in_place or self.denoiser.get_submodule(switch.name) is not switch.module:
                raise AttachmentError(
                    f"something replaced {switch.name!r} or its forward since apply;"
                    " call cachekit.remove(pipe) and apply again"
                )

    def _run_for(self, sample: Tensor, timestep: Any) -> Run:
        state = self._state
        scheduler = self._scheduler(timestep)
        mark = mark_of(timestep, scheduler if state.pipeline else None)
        if state.run is not None and state.run.clock.starts_anew(mark):
            self._end_run(False)
        if state.run is None:
            self._check_switches()
            state.run = Run(self.assignments, Clock(exact=state.pipeline is not None))
        run = state.run
        run.clock.tick(mark)
        if not run.signature:
            order = self._order(sample)
            steps = count_steps(state.pipeline[0] if state.pipeline else None, scheduler, timestep)
            run.begin(self._plan(steps, order), order, steps)
            run.record.arguments = plain_arguments(state.pipeline[1]) if state.pipeline else {}
        return run

    def _follow_batch(self, run: Run, sample: Tensor) -> None:
        """Notice a batch that changes in the middle of a run: a guidance cut by the pipeline, or new shapes."""
        branches = len(run.order)
        signature = (sample.shape[0] // branches, sample.shape[1:], sample.dtype, sample.device)
        if run.signature and signature != run.signature:
            if branches > 1 and sample.shape[0] == run.signature[0]:
                run.change_order(("cond",))
                return
            run.store.clear()
            run.shapes.clear()
        run.signature = signature

    def _order(self, sample: Tensor) -> Branches:
        told = is_guided(*self._state.pipeline, self.denoiser) if self._state.pipeline else None
        return branch_order(told, sample, self.layout, type(self.denoiser).__name__)

    def _scheduler(self, timestep: Any) -> Any:
        """Return the scheduler behind a timestep: the running pipeline's, else the known one it belongs to."""
        if self._state.pipeline:
            return getattr(self._state.pipeline[0], "scheduler", None)
        known = [getattr(pipe, "scheduler", None) for pipe in list(self._pipes)]
        owners = [scheduler for scheduler in known if shares_table(timestep, scheduler)]
        return owners[0] if owners else (known[0] if len(known) == 1 else None)

    @contextlib.contextmanager
    def replaying(self, rows: Sequence[Row], steps: int, guided: bool) -> Iterator[Run]:
        """Make the next calls obey these rows, one each, instead of the clock: for counting costs."""
        run = Run(self.assignments, Clock(exact=True))
        order = self.layout.order if guided else ("cond",)
        run.begin(self._plan(steps, order), order, steps)
        self._state.run, self._state.replay = run, list(reversed(rows))
        try:
            yield run
        finally:
            self._state.run, self._state.call, self._state.replay = None, None, []

    def _replayed(self) -> Call | None:
        state = self._state
        if not state.replay or state.run is None:
            return None
        row = state.replay.pop()
        state.run.enter(row)
        return Call(state.run, row, 0)

    # -- calls --------------------------------------------------------------------------------------------

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        state.call = None
        if state.paused:
            return None
        start = time.perf_counter()
        arguments = {**dict(zip(self._parameters, args)), **kwargs}
        sample, timestep = _find(arguments, _SAMPLE), _find(arguments, _TIMESTEP)
        if not isinstance(sample, Tensor):
            name = type(self.denoiser).__name__
            raise AdapterError(
                f"{name}: samples in a {type(sample).__name__} are not supported; call cachekit.remove(pipe)"
            )
        call = self._replayed()
        if call is None:
            run = self._run_for(sample, timestep)
            if not run.serves(sample.shape[0]):
                return None
            self._follow_batch(run, sample)
            call = run.begin_call(run.clock.step)
            call.sample, call.timestep = sample, timestep
            run.record.calls.append((sample.shape[0], call.row))
            if sample.shape[0] not in run.record.inputs:
                run.record.inputs[sample.shape[0]] = tree_map(shape_of, (args, kwargs))
        state.call = call
        result = None
        if call.narrowed_by >= 0:
            picked = pick(arguments, self.layout, call.branches[0], sample.shape[0])
            result = (tuple(picked.pop(name) for name in self._parameters[: len(args)]), picked)
        call.run.record.deciding_seconds += time.perf_counter() - start
        return result

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call, self._state.call = self._state.call, None
        if call is None:
            return None
        if call.narrowed_by >= 0:
            return self._spread(call, output)
        if len(call.branches) > 1:
            self._observe(call, output)
        return None

    def _spread(self, call: Call, output: Any) -> Any:
        index = call.narrowed_by
        call.count(index, Action.REUSE)
        policy, kept = self.assignments[index].policy, call.run.store.get(call.slot(index), ())
        return spread(output, self.layout, call.branches[0], lambda tensor: policy.restore_branch(tensor, kept))

    def _observe(self, call: Call, output: Any) -> None:
        keeping = call.count_guidance()
        if not keeping and not self._observers:
            return
        outputs = by_branch(first_tensor(output), call.branches)
        for index in keeping:
            call.run.store.put(call.slot(index), (), self.assignments[index].policy.branches_to_keep(outputs))
        if self._observers and call.sample is not None:
            start = time.perf_counter()
            sample = call.sample.chunk(len(call.branches))[0]
            seen = Observation(call.row.step, outputs, sample, call.timestep, self._scheduler(call.timestep))
            for policy in self._observers:
                policy.observe(seen, call.run.memories[policy.name])
            call.run.record.deciding_seconds += time.perf_counter() - start


def _region_parts(index: int, bound: Assignment, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Part]]:
    region = bound.target
    assert isinstance(region, Region)
    if region.probe:
        yield region.probe, Probe(index, bound)
    if region.entry:
        yield region.entry, Entry(index, bound, modules[region.entry], region.streams)
    for name in region.skipped:
        yield name, Member(index, bound, name)
    yield region.exit, Exit(index, bound)


def _find(arguments: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if arguments.get(name) is not None:
            return arguments[name]
    raise AdapterError(f"the denoiser was called without any of {', '.join(names)}")

"""Drive runs: take each call of a denoiser through its row of the plan."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from cachekit.driving.entrance import CallSteps
from cachekit.driving.inputs import CallInputs, timestep_of
from cachekit.driving.installation import Installation
from cachekit.driving.pipelines import Pipelines
from cachekit.driving.scopes import Scope, Scopes
from cachekit.driving.setup import Setup
from cachekit.driving.starting import FitFunction, Fitting
from cachekit.errors import AdapterError, CachekitError, CostError
from cachekit.runs.call import Call
from cachekit.runs.clock import Clock, Mark, mark_of
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.limit import NO_LIMIT, Limit
from cachekit.runs.record import Cost, Fit, Record
from cachekit.runs.report import Report
from cachekit.runs.run import Run
from cachekit.runs.state import PipelineCall, RunState
from cachekit.runs.timing import UncachedTimes
from cachekit.tensors import shape_of, tree_map
from cachekit.upstream.arguments import PAIR
from cachekit.upstream.guiders import branch_name, name_by_guider
from cachekit.upstream.schedulers import is_entry, shares_table

#: Counts the MACs of a run.
CostFunction = Callable[[Setup, Record], Cost]


def no_cost(setup: Setup, record: Record) -> Cost:
    """Refuse to count: the default of attachments that `apply` has not made."""
    raise CostError("the costs of this attachment are not counted; use cachekit.apply")


def no_fit(limit: Limit) -> FitFunction:
    """Keep everything: the fit of runs without a limit."""
    return lambda setup, start: Fit()


class Driver:
    """Takes each call of the attached denoisers through its row of the plan, within runs.

    Which plan that is, is settled where a run begins, or the pipeline's call that it belongs to: by the scope that is
    entered then.
    """

    def __init__(
        self, setup: Setup, limit: Limit = NO_LIMIT, cost: CostFunction = no_cost, fitting: Fitting = no_fit
    ) -> None:
        """Start without a run; `cost` counts the MACs of runs, and `fitting` makes what fits them into a limit."""
        self.state = RunState()
        self.pipelines = Pipelines()
        self.scopes = Scopes(setup, limit, fitting, self.state, self.pipelines)
        self.last_report: Report | None = None
        self._uncached = UncachedTimes()
        self._cost = cost
        self.installation = Installation(setup, self.state, self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last report out of copies: they have not run yet."""
        return {**vars(self), "last_report": None}

    @property
    def setup(self) -> Setup:
        """The denoisers, and the policies applied to them."""
        return self.scopes.applied.regime.setup

    @property
    def scope(self) -> Scope:
        """The scope of this thread's present run, or of one that would begin now."""
        found: Scope | None = self.state.scope
        return found or self.scopes.entered

    # -- a call: locate it, run the forward or not, finish ------------------------------------------------

    def call(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], enclosed: bool) -> CallSteps:
        """Yield the arguments for the denoiser's forward, receive its output, and return that of the call.

        Nothing is yielded where the forward is left out. `enclosed` is whether it is compiled as a whole, by code
        outside of the denoiser.
        """
        self.state.call = None
        if self.state.paused:
            self._pass_by(timestep_of(denoiser.parameters, args, kwargs))
            return (yield from self._pass(denoiser, args, kwargs, enclosed))
        start = time.perf_counter()
        inputs = self._inputs(denoiser, args, kwargs)
        call = None if inputs is None else self.locate(denoiser, inputs)
        if inputs is None or call is None:
            return (yield from self._pass(denoiser, args, kwargs, enclosed))
        regime = self.scope.regime
        if call.is_dropped or call.is_left_out:
            _record(call, inputs, start, runs=False)
            made = regime.finisher.replaced(call) if call.is_dropped else regime.finisher.predicted(call, inputs)
            call.note_output(made)
            self._note_call()
            return made
        given = regime.finisher.narrowed(call, inputs)
        _record(call, inputs, start, runs=True)
        call.duties = regime.duties[denoiser.name]
        self.state.call = call
        try:
            with self.installation.prompting(denoiser.name, call, enclosed):
                output = yield given
            made = regime.finisher.finish(call, inputs, output)
            call.note_output(made)
            return made
        finally:
            self.state.call = None
            self._note_call()

    def _note_call(self) -> None:
        """Take note of the end of a call: of a bare loop, it may be the last."""
        run = self.state.run
        if run is not None:
            run.note_time()
            if not run.clock.exact:
                run.finish()

    def _inputs(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallInputs | None:
        """Read the arguments of a call; None where they can't be read, and no policy needs them."""
        try:
            return CallInputs(denoiser.module, denoiser.parameters, args, kwargs)
        except AdapterError:
            if self.scope.policies:
                raise
            return None

    def _pass(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], enclosed: bool) -> CallSteps:
        with self.installation.prompting(denoiser.name, None, enclosed):
            return (yield args, kwargs)

    def locate(self, denoiser: Denoiser, inputs: CallInputs) -> Call | None:
        """Find the run, the step and the branches of a call; None where it runs uncached."""
        scheduler = self.pipelines.scheduler_behind(inputs.timestep, self.state.pipeline)
        mark = mark_of(inputs.timestep, scheduler if self.state.pipeline else None)
        if self._is_of_another_loop(mark, scheduler):
            return None
        run = self._run_of_call(denoiser, inputs, mark, scheduler)
        if not run.serves(inputs.batch):
            return None
        run.follow_batch(denoiser.name, inputs.sample, inputs.cache_mode)
        if self.state.pipeline:
            run.guidance_state = self.state.pipeline.guidance_state
        call = run.begin_call(denoiser.name, self._context(run.clock), inputs.batch, inputs.sample)
        if call.branch in run.layout.order[1:]:
            self.scope.regime.starter.check_order(run.layout, denoiser)
        return call

    def _pass_by(self, timestep: Any) -> None:
        """Note a paused call in a pipeline's loop: it counts as a step if the loop goes on after it."""
        run = self.state.run
        if run is not None and self.state.pipeline and isinstance(timestep, Tensor) and is_entry(timestep):
            run.clock.note(mark_of(timestep, None))

    # -- runs ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run_of(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Bound runs by a pipeline's call: what they keep is dropped at its end, after an exception too."""
        self.pipelines.add(pipe)
        self.installation.check()
        pipeline = PipelineCall.of(pipe, args, kwargs)
        state, scope = self.state, self.scopes.entered
        starter = scope.regime.starter
        if not state.paused:
            starter.refuse(pipeline)
        if state.pipeline is None:
            self.end_run(interrupted=False)  # of a bare loop, which nothing else ends
            state.reports = ()
        processors = starter.processors()
        outer = (state.run, state.call, state.pipeline, state.scope)
        state.run, state.call, state.pipeline, state.scope = None, None, pipeline, scope
        try:
            yield
        except BaseException as error:
            self.end_run(interrupted=True)
            if isinstance(error, CachekitError):
                starter.put_back(processors)
            raise
        else:
            self.end_run(interrupted=False)
        finally:
            state.run, state.call, state.pipeline, state.scope = outer

    def _run_of_call(self, denoiser: Denoiser, inputs: CallInputs, mark: Mark, scheduler: Any) -> Run:
        """Find or start the run that a call at `mark` belongs to, and advance its clock."""
        state = self.state
        if state.run is not None and state.run.clock.starts_anew(mark):
            self.end_run(interrupted=False)
        if state.run is not None:
            state.run.tick(mark)
            return state.run
        scope = self.scope
        if state.pipeline is None:  # otherwise checked at the pipeline's call
            self.installation.check()
        clock = Clock(exact=state.pipeline is not None)
        clock.tick(mark)
        context = self._context(clock)
        state.run = scope.regime.starter.start(denoiser, inputs, clock, scheduler, state.pipeline, context)
        state.scope = scope
        scope.last_report = self.report_of(state.run)
        return state.run

    def end_run(self, interrupted: bool) -> None:
        """End this thread's run, if there is one: report it, and drop what it keeps."""
        state = self.state
        run, state.run, state.call = state.run, None, None
        if run is None:
            return
        run.record.interrupted = interrupted
        if run.clock.exact:
            run.note_time()
        scope = self.scope
        report = self.report_of(run)
        report.earlier = state.reports
        scope.last_report = state.report = self.last_report = report
        if state.pipeline is None:
            state.scope = None
        else:
            state.reports = (*state.reports, report)
        run.forget()
        if not interrupted:
            if not scope.policies:
                self._uncached.note(run.record)
            self.setup.catalog.run_finished(report)

    def report_of(self, run: Run) -> Report:
        """Report on a run so far, the present one of this thread."""
        if not run.record.interrupted:
            run.keeper.find_not_finite()
        cost = functools.partial(self._cost, self.scope.regime.setup)
        return Report(run.plan.assignments, run.finish(), cost, self._uncached.like)

    # -- what pipelines show ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def named(self, context: str | None) -> Iterator[None]:
        """Apply the pipeline's name for the calls in this block."""
        before, self.state.context = self.state.context, branch_name(context)
        try:
            yield
        finally:
            self.state.context = before

    def _context(self, clock: Clock) -> str | None:
        """Find the name of the present call: the pipeline's for it, or that of its guider; None without one."""
        state = self.state
        if state.context in PAIR or not state.pipeline or not state.pipeline.has_guider:
            return state.context
        return branch_name(name_by_guider(state.pipeline.pipe, clock.step, clock.call)) or state.context

    def _is_of_another_loop(self, mark: Mark, scheduler: Any) -> bool:
        """Whether another pipeline runs with this denoiser in a callback of the running one."""
        run = self.state.run
        if run is None or mark.kind != "entry" or run.clock.is_in_table(mark) or self.state.pipeline is None:
            return False
        return run.clock.goes_through(scheduler) and not shares_table(mark.source, scheduler)


def _record(call: Call, inputs: CallInputs, start: float, runs: bool) -> None:
    """Add a call that was decided since `start` to its run's record, with the shapes of its arguments."""
    record, made = call.keeper.record, call.record(runs)
    record.calls.append(made)
    if made.inputs not in record.inputs:
        record.inputs[made.inputs] = tree_map(shape_of, (inputs.args, inputs.kwargs))
    record.deciding_seconds += time.perf_counter() - start

"""Drive runs: each call of a denoiser finds its step, its branches and what was kept for it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cachekit.driving.setup import Setup
from cachekit.errors import AdapterError, GuidanceError
from cachekit.guidance.detection import FirstCall, is_guided, layout_of_run, refuse_unfit
from cachekit.guidance.observation import CallObservation
from cachekit.guidance.slicing import as_batch, as_batches, as_lists, by_branch, pick_call, spread
from cachekit.interface.policy import Action, Policy
from cachekit.interface.sites import Kind
from cachekit.reports.record import CallRecord, Fit
from cachekit.runs.call import Call
from cachekit.runs.clock import Clock, mark_of
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.limit import Limit
from cachekit.runs.run import Run
from cachekit.runs.start import RunStart
from cachekit.runs.state import RunState
from cachekit.runs.store import Store
from cachekit.runs.voting import Vote, vote_of
from cachekit.switches.prompter import Prompter
from cachekit.tensors import shape_of, tensors, tree_map
from cachekit.upstream.arguments import PAIR, SAMPLE, by_name
from cachekit.upstream.guiders import has_momentum, name_by_guider
from cachekit.upstream.pipelines import call_arguments, controlnets_of, perturbs_attention, plain_arguments
from cachekit.upstream.schedulers import count_steps, is_entry, shares_table

if TYPE_CHECKING:
    from cachekit.interface.adapter import Layout


#: Arguments that a denoiser writes to.
_WRITTEN = ("kv_cache", "kv_caches")


#: What a pipeline's batch depends on, and may change from step to step.
_TELLING = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")


_TIMESTEP = ("timestep", "timesteps", "t", "timestep_ratio", "r", "vision_timesteps")


#: A call in steps: yields the arguments of the forward it needs, is sent its output, and returns its own.
Steps = Generator[tuple[tuple[Any, ...], dict[str, Any]], Any, Any]


class Driver:
    """Take each call of the attached denoisers through its row of the plan."""

    def __init__(
        self,
        setup: Setup,
        check: Callable[[], None],
        finished: Callable[[Run], None],
        limit: Limit,
        fit: Callable[[Setup, RunStart], Fit],
    ) -> None:
        """Start without a run; `check` is called before each, `finished` told of each that ends.

        `limit` makes the stores, and `fit` says what of a plan fits into them.
        """
        self.setup = setup
        self.assignments, policies = setup.assignments, setup.policies
        self.state = RunState()
        self.pipes: weakref.WeakSet[Any] = weakref.WeakSet()
        self.prompters: dict[str, Prompter] = {}
        self._check, self._finished = check, finished
        self._limit, self._fit = limit, fit
        self._observers = [policy for policy in policies if type(policy).observe is not Policy.observe]
        self._narrowing = [bound.policy for bound in self.assignments if bound.target.kind is Kind.GUIDANCE]

    def __deepcopy__(self, memo: dict[int, Any]) -> Driver:
        """Return a driver with no run and no pipeline, for the copied switches."""
        check, finished = copy.deepcopy(self._check, memo), copy.deepcopy(self._finished, memo)
        twin = type(self)(copy.deepcopy(self.setup, memo), check, finished, self._limit, self._fit)
        memo[id(self)] = twin
        twin.state = copy.deepcopy(self.state, memo)
        return twin

    # -- where runs begin and end -------------------------------------------------------------------------

    @contextlib.contextmanager
    def run_of(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Bound one run exactly: what is kept ends with the pipeline's call, by an exception too."""
        self.pipes.add(pipe)
        self._check()
        state = self.state
        if state.pipeline is None:
            self.end_run(interrupted=False)  # of a bare loop, which nothing else ends
            state.reports = ()
        outer = (state.run, state.call, state.pipeline)
        state.run, state.call = None, None
        state.pipeline = (pipe, call_arguments(pipe, args, kwargs))
        try:
            yield
        except BaseException:
            self.end_run(interrupted=True)
            raise
        else:
            self.end_run(interrupted=False)
        finally:
            state.run, state.call, state.pipeline = outer

    def end_run(self, interrupted: bool) -> None:
        """End this thread's run, if there is one whose first call was not refused."""
        run, self.state.run, self.state.call = self.state.run, None, None
        if run is None or not run.batch:
            return
        run.record.interrupted = interrupted
        self._finished(run)

    def _run_for(self, denoiser: Denoiser, sample: Tensor, timestep: Any, arguments: dict[str, Any]) -> Run:
        state = self.state
        scheduler = self._scheduler(timestep)
        mark = mark_of(timestep, scheduler if state.pipeline else None)
        if state.run is not None and state.run.clock.starts_anew(mark):
            self.end_run(interrupted=False)
        if state.run is None:
            if state.pipeline is None:  # its call has been checked
                self._check()
            clock = Clock(exact=state.pipeline is not None)
            state.run = Run(self.assignments, clock, vote_of(denoiser.module), self._limit.store())
        run = state.run
        run.pass_by(mark)
        run.clock.tick(mark)
        if not run.batch:
            layout = self._layout(denoiser, sample, arguments)
            run.is_named = self._context() in PAIR
            steps = count_steps(state.pipeline[0] if state.pipeline else None, scheduler, timestep)
            fit = self._fit(self.setup, RunStart(denoiser, arguments, sample.shape[0], layout, steps))
            run.begin(self.setup.plan(steps, layout, fit.dropped), layout, steps)
            run.record.fit = fit
            run.record.arguments = plain_arguments(state.pipeline[1]) if state.pipeline else {}
        return run

    def _layout(self, denoiser: Denoiser, sample: Tensor, given: dict[str, Any]) -> Layout:
        pipe, arguments = self.state.pipeline or (None, {})
        refuse_unfit(pipe, arguments, sample, _find(given, _TIMESTEP))
        context = self._context()
        told = pipe and is_guided(pipe, arguments, denoiser.module, context)
        if told is None and pipe is not None and denoiser.layout.calls:
            told = True  # for now: the second call, or none, will tell
        first = FirstCall(
            told=told,
            sample=sample,
            context=context,
            narrows=bool(self._narrowing),
            denoiser=type(denoiser.module).__name__,
            perturbed=perturbs_attention(pipe, denoiser.module),
            remembers=any(given.get(name) is not None for name in _WRITTEN),
            momentum=has_momentum(pipe),
        )
        return layout_of_run(first, denoiser.layout)

    def _context(self) -> str | None:
        """Return the name of the present call: the pipeline's for it, or that of its guider; or None."""
        state = self.state
        if state.context in PAIR or not state.pipeline or not state.run:
            return state.context
        return (
            _without_prefix(name_by_guider(state.pipeline[0], state.run.clock.step, state.run.clock.call))
            or state.context
        )

    def _check_order(self, layout: Layout, name: str) -> None:
        for policy in self._narrowing:
            stays, called_first = policy.stays(layout), layout.order[0]
            if stays != called_first:
                raise GuidanceError(
                    f"{policy}: would keep the branch {stays!r}, but {name} is called for {called_first!r} first,"
                    f" when nothing stands in for it yet; use a policy that keeps {called_first!r}"
                )

    def _scheduler(self, timestep: Any) -> Any:
        """Return the scheduler behind a timestep: the running pipeline's, else the known one it belongs to."""
        if self.state.pipeline:
            return getattr(self.state.pipeline[0], "scheduler", None)
        known = [getattr(pipe, "scheduler", None) for pipe in list(self.pipes)]
        owners = [scheduler for scheduler in known if shares_table(timestep, scheduler)]
        return owners[0] if owners else (known[0] if len(known) == 1 else None)

    def _is_of_another_loop(self, timestep: Any) -> bool:
        """Tell whether somebody runs another pipeline with this denoiser in a callback of the running one."""
        if self.state.run is None or self.state.pipeline is None:
            return False
        scheduler = getattr(self.state.pipeline[0], "scheduler", None)
        is_in_table = isinstance(timestep, Tensor) and is_entry(timestep)
        return is_in_table and self.state.run.clock.goes_through(scheduler) and not shares_table(timestep, scheduler)

    def _follow_batch(self, run: Run, name: str, sample: Tensor, arguments: dict[str, Any]) -> None:
        """Notice a batch that changes in the middle of a run: a guidance cut by the pipeline, or new shapes.

        Two denoisers that take turns may have shapes of their own.
        """
        batch = sample.shape[0] // run.together
        run.told = self._told()
        # A call that writes keys and values is for more tokens than one that reads them.
        kind = (sample.shape[1:], sample.dtype, sample.device, arguments.get("kv_cache_mode"))
        if run.batch and (batch, kind) != (run.batch, run.kinds.get(name, kind)):
            if run.together > 1 and sample.shape[0] == run.batch:
                run.change_layout(run.layout.alone)
                return
            run.store.clear()
            run.shapes.clear()
        run.batch, run.kinds[name] = batch, kind

    def _told(self) -> tuple[Any, ...]:
        """Return what the running pipeline says of its guidance now; a callback may change that."""
        pipe = self.state.pipeline[0] if self.state.pipeline else None
        return tuple(getattr(pipe, name, None) for name in _TELLING)

    @contextlib.contextmanager
    def named(self, context: str | None) -> Iterator[None]:
        """Hold the name that the pipeline gives the calls within the block."""
        before, self.state.context = self.state.context, _without_prefix(context)
        try:
            yield
        finally:
            self.state.context = before

    # -- companions ---------------------------------------------------------------------------------------

    def foresee(self, companion: nn.Module, arguments: dict[str, Any]) -> Call | None:
        """Return the call that the denoiser will be given next, or None where that is not certain.

        `companion` is given its `arguments` just before: the same timestep, and a batch of the same branches.
        """
        state, run = self.state, self.state.run
        if run is None or state.pipeline is None or state.paused or run.layout.separate or not run.is_alone:
            return None
        pipe = state.pipeline[0]
        timestep, sample = _find(arguments, _TIMESTEP), _find(arguments, SAMPLE)
        if timestep is None or not isinstance(sample, Tensor):
            return None
        mark, batch = mark_of(timestep, getattr(pipe, "scheduler", None)), sample.shape[0]
        is_next = not run.clock.is_at(mark) and not run.clock.starts_anew(mark)
        is_whole = batch == run.batch * run.together
        is_as_before = self._told() == run.told  # in guess mode the ControlNet's batch would not show a change
        if not (is_next and is_whole and is_as_before and any(companion is other for other in controlnets_of(pipe))):
            return None
        run.pass_by(mark)
        return run.foresee(run.clock.step + 1, batch)

    # -- replays ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def replaying(self, layout: Layout, steps: int) -> Iterator[Run]:
        """Make the calls within the block obey `expect` instead of the clock: for counting costs."""
        run = Run(self.assignments, Clock(exact=True), Vote(), Store())
        run.begin(self.setup.plan(steps, layout), layout, steps)
        self.state.run = run
        try:
            yield run
        finally:
            self.state.run, self.state.call, self.state.replayed = None, None, None

    def expect(self, made: CallRecord) -> None:
        """Make the next call within `replaying` do what was done in this one."""
        self.state.replayed = made

    def _replayed(self) -> Call | None:
        state = self.state
        made, state.replayed = state.replayed, None
        if made is None or state.run is None:
            return None
        state.run.enter(made.row)
        return Call(state.run, made.row, made.denoiser, made.branch, 0)

    # -- calls --------------------------------------------------------------------------------------------

    def call(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], enclosed: bool) -> Steps:
        """Yield the arguments of the denoiser's own forward, unless it is not needed, take its output; return one.

        `enclosed` says that the forward is being compiled as a whole, by somebody outside of the denoiser.
        """
        state = self.state
        state.call = None
        if state.paused:
            self._pass(denoiser, args, kwargs)
            return (yield from self._plain(denoiser, args, kwargs, enclosed))
        start = time.perf_counter()
        call = self._begin_call(denoiser, args, kwargs)
        if call is None:
            return (yield from self._plain(denoiser, args, kwargs, enclosed))
        if call.narrowed_by is not None and not call.branch:
            whole = (args, kwargs)
            args, kwargs = pick_call(whole, denoiser.parameters, call.run.layout, call.branches[0], call.batch)
        call.run.record.deciding_seconds += time.perf_counter() - start
        if call.is_dropped:
            return self._stand_in(call)
        state.call = call
        try:
            with self._prompted(denoiser, call, enclosed):
                output = yield args, kwargs
            return as_lists(self._output(call, as_batches(output))) if call.is_listed else self._output(call, output)
        finally:
            state.call = None

    def _pass(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notice a call in a pipeline's loop that goes by uncached: a step, if the loop goes on behind it."""
        run, pipeline = self.state.run, self.state.pipeline
        timestep = _find(by_name(denoiser.parameters, args, kwargs), _TIMESTEP) if run and pipeline else None
        if run is not None and isinstance(timestep, Tensor) and is_entry(timestep):
            run.clock.note(mark_of(timestep, None))

    def _prompted(
        self, denoiser: Denoiser, call: Call | None, enclosed: bool
    ) -> contextlib.AbstractContextManager[None]:
        prompter = self.prompters.get(denoiser.name)
        return contextlib.nullcontext() if prompter is None else prompter.call(call, enclosed)

    def _plain(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], enclosed: bool) -> Steps:
        with self._prompted(denoiser, None, enclosed):
            return (yield args, kwargs)

    def _begin_call(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        arguments = by_name(denoiser.parameters, args, kwargs)
        given, timestep = _find(arguments, SAMPLE), _find(arguments, _TIMESTEP)
        sample = as_batch(given)
        _refuse_unknown(type(denoiser.module).__name__, sample, timestep)
        call = self._replayed()
        if call is None:
            call = self._next_call(denoiser, sample, timestep, arguments)
            if call is not None:
                call.sample, call.timestep = sample, timestep
        if call is not None:
            call.batch, call.is_listed = sample.shape[0], sample is not given
            made = call.made()
            call.run.record.calls.append(made)
            if made.inputs not in call.run.record.inputs:
                call.run.record.inputs[made.inputs] = tree_map(shape_of, (args, kwargs))
        return call

    def _next_call(self, denoiser: Denoiser, sample: Tensor, timestep: Any, arguments: dict[str, Any]) -> Call | None:
        if self._is_of_another_loop(timestep):
            return None
        run = self._run_for(denoiser, sample, timestep, arguments)
        if not run.serves(sample.shape[0]):
            return None
        self._follow_batch(run, denoiser.name, sample, arguments)
        if run.calls_one_branch():
            run.take_as_alone()
        run.tick()
        context = self._context()
        run.expect_guidance(context)
        branch = run.branch_of_call(context)
        if branch in run.layout.order[1:]:
            self._check_order(run.layout, type(denoiser.module).__name__)
        return run.begin_call(run.clock.step, denoiser.name, branch)

    def _output(self, call: Call, output: Any) -> Any:
        if call.branch:
            return self._of_one_branch(call, output)
        if call.narrowed_by is not None:
            restore = self._restored(call)
            return spread(output, call.run.layout, call.branches[0], restore)
        if len(call.branches) > 1 and (self._narrowing or self._observers):
            self._observe(call, by_branch(output, call.branches))
        return output

    def _of_one_branch(self, call: Call, output: Any) -> Any:
        """Hold a branch's output until the step ends: others are compared with it, or replaced by it."""
        outputs, order = call.run.outputs, call.run.layout.order
        outputs[call.branch] = output
        is_last = len(order) > 1 and call.branch in order and all(branch in outputs for branch in order)
        if is_last and call.narrowed_by is None:
            self._observe(call, {branch: tuple(tensors(outputs[branch])) for branch in order})
        return output

    def _stand_in(self, call: Call) -> Any:
        (stays,) = call.row.branches
        return tree_map(self._restored(call), call.run.outputs[stays])

    def _restored(self, call: Call) -> Callable[[Tensor], Tensor]:
        """Return what makes the dropped branch's output from the other's."""
        index = call.narrowed_by
        assert index is not None
        call.count(index, Action.REUSE)
        policy, kept = self.assignments[index].policy, call.run.store.get(call.slot(index), ())
        each = itertools.repeat(None) if kept is None else iter(kept)
        return lambda output: policy.restore_branch(output, next(each, None))

    def _observe(self, call: Call, each: Mapping[str, tuple[Tensor, ...]]) -> None:
        for index in call.count_guidance():
            call.keep_branches(index, each)
        if self._observers and call.sample is not None:
            start = time.perf_counter()
            outputs, sample = {name: of[0] for name, of in each.items()}, call.sample.chunk(call.run.together)[0]
            scheduler, negated = self._scheduler(call.timestep), call.run.layout.negated
            seen = CallObservation(call.row.step, outputs, sample, call.timestep, scheduler, negated)
            for policy in self._observers:
                policy.observe(seen, call.run.memories[policy.name])
            call.run.record.deciding_seconds += time.perf_counter() - start


def _without_prefix(context: str | None) -> str | None:
    """Return a call's name: guiders name their calls after the predictions that come of them."""
    return context and context.removeprefix("pred_")


def _refuse_unknown(name: str, sample: Any, timestep: Any) -> None:
    for what, value, names in (("sample", sample, SAMPLE), ("timestep", timestep, _TIMESTEP)):
        if value is None:
            raise AdapterError(
                f"{name} is called without a {what} ({', '.join(names)}): its steps cannot be told; call"
                " cachekit.remove(pipe)"
            )
    if not isinstance(sample, Tensor):
        raise AdapterError(
            f"{name}: samples of several sizes, or lists within lists, are not supported; give images of one size, or"
            " call cachekit.remove(pipe)"
        )


def _find(arguments: dict[str, Any], names: Sequence[str]) -> Any:
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)

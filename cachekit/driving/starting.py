"""Start runs: from a pipeline's call, and from the first denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.driving.detection import (
    FirstCall,
    Obstacle,
    layout_of_run,
    refuse_arguments,
    refuse_inputs,
    refuse_narrowing,
)
from cachekit.driving.evidence import warn_of_run
from cachekit.driving.inputs import CallInputs
from cachekit.driving.setup import Setup
from cachekit.errors import GuidanceError, PolicyError, SiteError
from cachekit.interface.adapter import Layout
from cachekit.interface.beginning import Beginning
from cachekit.interface.moment import Moment, Time
from cachekit.planning.lengths import refuse_unknown_length
from cachekit.runs.border import begun
from cachekit.runs.clock import Clock
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.limit import Limit
from cachekit.runs.record import Fit
from cachekit.runs.run import Run
from cachekit.runs.state import PipelineCall
from cachekit.runs.voting import vote_of
from cachekit.tensors import tensors
from cachekit.upstream.arguments import PAIR
from cachekit.upstream.calling import OUTPUT
from cachekit.upstream.guidance import (
    attention_processors,
    has_true_guidance,
    is_guided,
    perturbs_attention,
    put_processors_back,
    will_perturb_attention,
)
from cachekit.upstream.guiders import has_momentum
from cachekit.upstream.pipelines import plain_arguments
from cachekit.upstream.prediction import times_of
from cachekit.upstream.schedulers import UNKNOWN_STEPS, count_steps


@dataclass(frozen=True)
class RunStart:
    """What the first call of a run shows: its arguments, the layout of its branches, the run's length and its times."""

    denoiser: Denoiser
    inputs: CallInputs
    layout: Layout
    steps: int
    times: tuple[Time, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What the bytes that the run keeps depend on."""
        given = sorted(self.inputs.named.items())
        shapes = tuple((name, *((it.shape, it.dtype) for it in tensors(value))) for name, value in given)
        return (self.denoiser.name, shapes, self.inputs.batch, self.layout, self.steps, self.times)


#: Chooses what a run may keep.
FitFunction = Callable[[Setup, RunStart], Fit]
#: Makes what chooses within a limit.
Fitting = Callable[[Limit], FitFunction]


class RunStarter:
    """Starts runs: detects the layout of branches, counts the steps, and fits the plan into the limit."""

    def __init__(self, setup: Setup, limit: Limit, fit: FitFunction) -> None:
        """Start runs with `setup`; `fit` chooses what a run keeps within `limit`."""
        self._setup = setup
        self._limit = limit
        self._fit = fit

    def refuse(self, call: PipelineCall) -> None:
        """Raise `GuidanceError` for a pipeline call whose arguments show that its run would be refused."""
        pipe, arguments = call.pipe, call.arguments
        if self._setup.policies:
            refuse_arguments(pipe, arguments)
        if not self._setup.narrowing:
            return
        for denoiser in self._setup.denoisers.values():
            if will_perturb_attention(pipe, arguments, denoiser.module):
                refuse_narrowing(type(pipe).__name__, Obstacle.PERTURBED_ATTENTION.value)
            if denoiser.layout.calls and has_true_guidance(arguments):
                self.check_order(denoiser.layout.by_calls(denoiser.layout.calls), denoiser)
        if has_momentum(pipe):
            refuse_narrowing(type(pipe).__name__, Obstacle.MOMENTUM.value)

    def processors(self) -> dict[str, dict[str, Any]]:
        """Note the attention processors of each denoiser, which some pipelines replace before a policy refuses."""
        if not self._setup.policies:
            return {}
        return {name: attention_processors(denoiser.module) for name, denoiser in self._setup.denoisers.items()}

    def put_back(self, processors: Mapping[str, Mapping[str, Any]]) -> None:
        """Undo what a pipeline did to its denoisers before a policy refused the run within the loop."""
        for name, found in processors.items():
            put_processors_back(self._setup.denoisers[name].module, found)

    def start(
        self,
        denoiser: Denoiser,
        inputs: CallInputs,
        clock: Clock,
        scheduler: Any,
        pipeline: PipelineCall | None,
        context: str | None,
    ) -> Run:
        """Start a run with its first call, to which `clock` has advanced; `context` is the name of the call.

        Raises `GuidanceError` where a policy would drop a branch that cannot be dropped, `BudgetError` where nothing
        fits into the limit, `PolicyError` where a part needs what the loop doesn't show, and what parts raise in
        `begin`.
        """
        layout, is_known = self._layout(denoiser, inputs, pipeline, context)
        counted = count_steps(pipeline and pipeline.pipe, scheduler, inputs.timestep)
        steps = counted or UNKNOWN_STEPS
        times = times_of(scheduler, inputs.timestep, steps, layout.negated)
        self._refuse_unknown(times, scheduler)
        if counted is None:
            refuse_unknown_length(self._setup.assignments)
        start = RunStart(denoiser, inputs, layout, steps, times)
        fit = self._fit(self._setup, start)
        run = Run(
            self._setup.plan(steps, layout, fit.dropped, times),
            layout,
            steps,
            inputs.batch // layout.together,
            clock=clock,
            store=self._limit.store(),
            vote=vote_of(denoiser.module),
            is_named=context in PAIR,
            fit=fit,
            arguments=plain_arguments(pipeline.arguments) if pipeline else {},
        )
        run.record.timing_key = (*start.key, inputs.sample.device, *_outside(pipeline))
        self._begin(run, denoiser, inputs, scheduler, pipeline, is_known)
        for preset in self._setup.presets:
            warn_of_run(preset, counted, pipeline.arguments if pipeline else {})
        return run

    def _begin(
        self,
        run: Run,
        denoiser: Denoiser,
        inputs: CallInputs,
        scheduler: Any,
        pipeline: PipelineCall | None,
        guided: bool,
    ) -> None:
        """Call `begin` of schedules and stand-ins, which may refuse the run; guidance belongs to the first denoiser."""
        for index, parts in self._setup.beginning:
            if index in run.plan.dropped:
                continue
            bound = self._setup.assignments[index]
            beginning = Beginning(
                (denoiser if bound.is_guidance else self._setup.denoisers[bound.denoiser]).module,
                scheduler,
                pipeline.arguments if pipeline else {},
                run.record.steps,
                run.plan.times,
                run.layout,
                str(bound.choice.when),
                run.plan.full(index),
                tuple(inputs.sample.shape),
                guided,
                tuple(row.branches for row in run.plan.rows),
            )
            shared = run.keeper.memories.of(bound.policy.name)
            at = Moment(0, run.record.steps, target=bound.target, shared=shared)
            for part in parts:
                begun(bound, part, at, beginning, shared)

    def _layout(
        self, denoiser: Denoiser, inputs: CallInputs, pipeline: PipelineCall | None, context: str | None
    ) -> tuple[Layout, bool]:
        """Detect the layout of a run, and whether the first call already shows that it has several branches."""
        pipe, arguments = (pipeline.pipe, pipeline.arguments) if pipeline else (None, {})
        if self._setup.policies:
            refuse_arguments(pipe, arguments)  # again: the pipeline's call may have begun in a paused block
            refuse_inputs(pipe, inputs.sample, inputs.timestep)
        guided = known = is_guided(pipe, arguments, denoiser.module, context) if pipeline else None
        if guided is None and pipeline and denoiser.layout.calls:
            guided = True  # assumed until a second call confirms it, or fails to come
        first = FirstCall(inputs.sample, guided, context, _obstacle(denoiser, inputs, pipeline))
        if inputs.writes_cache or inputs.cache_mode is not None:
            self._refuse_left_out(denoiser)
        layout, reason = layout_of_run(first, denoiser.layout)
        if reason and self._setup.narrowing:
            refuse_narrowing(type(denoiser.module).__name__, reason)
        return layout, layout.together > 1 or (bool(known) and layout.separate)

    def check_order(self, layout: Layout, denoiser: Denoiser) -> None:
        """Raise `GuidanceError` where a policy keeps a branch that is not called first."""
        called_first = layout.order[0]
        for bound in self._setup.narrowing:
            stays = bound.stays(layout)
            if stays != called_first:
                name = type(denoiser.module).__name__
                raise GuidanceError(
                    f"{bound.policy}: would keep the branch {stays!r}, but {name} is called for {called_first!r} first,"
                    f" before there is anything to replace it; use a policy that keeps {called_first!r}"
                )

    def _refuse_left_out(self, denoiser: Denoiser) -> None:
        """Raise `SiteError` where a skipped call would have written keys and values that later calls read."""
        for bound in self._setup.assignments:
            if bound.is_whole and bound.denoiser == denoiser.name:
                raise SiteError(
                    f"{bound.policy}: would leave out calls of {type(denoiser.module).__name__}, but"
                    f" {Obstacle.WRITTEN_CACHE.value}; use a policy for attention or blocks"
                )

    def _refuse_unknown(self, times: Sequence[Time], scheduler: Any) -> None:
        """Raise `PolicyError` where a stand-in needs what the scheduler doesn't give."""
        for bound in self._setup.reading:
            missing = bound.choice.what.missing(times)
            if missing:
                name = "a loop without a scheduler" if scheduler is None else type(scheduler).__name__
                raise PolicyError(
                    f"{bound.policy}: {bound.choice.what} needs {missing}, which {name} does not give;"
                    " use axis=step and of=output"
                )


def _obstacle(denoiser: Denoiser, inputs: CallInputs, pipeline: PipelineCall | None) -> Obstacle | None:
    """Find what keeps all branches of a run from being dropped, whatever its layout."""
    if pipeline and pipeline.has_guider and has_momentum(pipeline.pipe):
        return Obstacle.MOMENTUM
    if inputs.writes_cache:
        return Obstacle.WRITTEN_CACHE
    perturbs = perturbs_attention(pipeline and pipeline.pipe, denoiser.module)
    return Obstacle.PERTURBED_ATTENTION if perturbs else None


def _outside(pipeline: PipelineCall | None) -> tuple[Any, ...]:
    """Find what the time of a run depends on beside its denoiser: the pipeline, and what it makes of latents."""
    return (type(pipeline.pipe), pipeline.arguments.get(OUTPUT)) if pipeline else ()

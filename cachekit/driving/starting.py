"""Start runs: from a pipeline's call, and from the first denoiser call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachekit.driving.inputs import CallInputs
from cachekit.driving.setup import Setup
from cachekit.errors import GuidanceError
from cachekit.guidance.detection import (
    HAS_MOMENTUM,
    PERTURBS_ATTENTION,
    FirstCall,
    layout_of_run,
    refuse_arguments,
    refuse_inputs,
    refuse_narrowing,
)
from cachekit.interface.adapter import Layout
from cachekit.reports.record import Fit
from cachekit.runs.clock import Clock
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.limit import Limit
from cachekit.runs.run import Run
from cachekit.runs.start import RunStart
from cachekit.runs.state import PipelineCall
from cachekit.runs.voting import vote_of
from cachekit.upstream.arguments import PAIR
from cachekit.upstream.guidance import has_true_guidance, is_guided, perturbs_attention, will_perturb_attention
from cachekit.upstream.guiders import has_momentum
from cachekit.upstream.pipelines import plain_arguments
from cachekit.upstream.schedulers import count_steps

#: Chooses what a run may keep.
FitFunction = Callable[[Setup, RunStart], Fit]


class RunStarter:
    """Starts runs: detects the layout of branches, counts the steps, and fits the plan into the limit."""

    def __init__(self, setup: Setup, limit: Limit, fit: FitFunction) -> None:
        """Start runs with `setup`; `fit` chooses what of a run fits into `limit`."""
        self._setup = setup
        self._limit = limit
        self._fit = fit

    def refuse(self, call: PipelineCall) -> None:
        """Raise `GuidanceError` for a pipeline call whose arguments show that its run would be refused."""
        pipe, arguments = call.pipe, call.arguments
        refuse_arguments(pipe, arguments)
        if not self._setup.narrowing:
            return
        for denoiser in self._setup.denoisers.values():
            if will_perturb_attention(pipe, arguments, denoiser.module):
                refuse_narrowing(type(pipe).__name__, PERTURBS_ATTENTION)
            if denoiser.layout.calls and has_true_guidance(arguments):
                self.check_order(denoiser.layout.by_calls(denoiser.layout.calls), denoiser)
        if has_momentum(pipe):
            refuse_narrowing(type(pipe).__name__, HAS_MOMENTUM)

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

        Raises `GuidanceError` where a policy would drop a branch that cannot be dropped, and `BudgetError` where
        nothing fits into the limit.
        """
        layout = self._layout(denoiser, inputs, pipeline, context)
        steps = count_steps(pipeline and pipeline.pipe, scheduler, inputs.timestep)
        fit = self._fit(self._setup, RunStart(denoiser, inputs.named, inputs.batch, layout, steps))
        return Run(
            self._setup.plan(steps, layout, fit.dropped),
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

    def _layout(
        self, denoiser: Denoiser, inputs: CallInputs, pipeline: PipelineCall | None, context: str | None
    ) -> Layout:
        pipe, arguments = (pipeline.pipe, pipeline.arguments) if pipeline else (None, {})
        refuse_arguments(pipe, arguments)  # again: the pipeline's call may have begun in a paused block
        refuse_inputs(pipe, inputs.sample, inputs.timestep)
        guided = is_guided(pipe, arguments, denoiser.module, context) if pipeline else None
        if guided is None and pipeline and denoiser.layout.calls:
            guided = True  # for now: the second call, or its absence, will show
        first = FirstCall(
            sample=inputs.sample,
            guided=guided,
            context=context,
            writes_cache=inputs.writes_cache,
            has_momentum=has_momentum(pipe),
            perturbs_attention=perturbs_attention(pipe, denoiser.module),
        )
        layout, reason = layout_of_run(first, denoiser.layout)
        if reason and self._setup.narrowing:
            refuse_narrowing(type(denoiser.module).__name__, reason)
        return layout

    def check_order(self, layout: Layout, denoiser: Denoiser) -> None:
        """Raise `GuidanceError` where a policy keeps a branch that is not called first."""
        called_first = layout.order[0]
        for policy in self._setup.narrowing:
            stays = policy.stays(layout)
            if stays != called_first:
                raise GuidanceError(
                    f"{policy}: would keep the branch {stays!r}, but {type(denoiser.module).__name__} is called for"
                    f" {called_first!r} first, when nothing stands in for it yet; use a policy that keeps"
                    f" {called_first!r}"
                )

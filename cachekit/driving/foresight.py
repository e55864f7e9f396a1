"""Plan the denoiser's next call before it is made, for the ControlNet that is called just before it."""

from __future__ import annotations

from torch import nn

from cachekit.driving.inputs import CallInputs
from cachekit.runs.call import Call
from cachekit.runs.clock import Mark, mark_of
from cachekit.runs.run import Run
from cachekit.runs.state import PipelineCall, RunState
from cachekit.upstream.pipelines import controlnets_of
from cachekit.upstream.schedulers import scheduler_of


def foresee(state: RunState, controlnet: nn.Module, inputs: CallInputs) -> Call | None:
    """Plan the denoiser's next call in this thread's run; None where it is not certain.

    `controlnet` is given `inputs`: the timestep of that call, and a batch of the same branches.
    """
    run, pipeline = state.run, state.pipeline
    if run is None or pipeline is None or state.paused or run.layout.separate or not run.is_alone or inputs.is_listed:
        return None
    mark = mark_of(inputs.timestep, scheduler_of(pipeline.pipe))
    if not _is_next(run, pipeline, mark, inputs.batch):
        return None
    if all(controlnet is not own for own in controlnets_of(pipeline.pipe)):
        return None
    run.pass_by(mark)
    return run.foresee(run.clock.step + 1, inputs.batch, inputs.sample)


def _is_next(run: Run, pipeline: PipelineCall, mark: Mark, batch: int) -> bool:
    """Whether a call at `mark` begins the next step, with the batch and the guidance of the last call."""
    is_next = not run.clock.is_at(mark) and not run.clock.starts_anew(mark)
    is_whole = batch == run.images * run.calls.together
    # In guess mode the ControlNet's batch would not show a change of guidance.
    return is_next and is_whole and pipeline.guidance_state == run.guidance_state

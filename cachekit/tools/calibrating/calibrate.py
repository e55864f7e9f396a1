"""Calibrate: fit weights along the cached trajectory, towards the uncached one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Union

from pydantic import PrivateAttr, ValidationError
from typing_extensions import Self

from cachekit.applying import apply
from cachekit.attaching.attachment import Attachment
from cachekit.errors import CalibrationError, reason_of
from cachekit.interface.beginning import Beginning
from cachekit.interface.parts import Choice
from cachekit.interface.policy import Policy
from cachekit.interface.sites import DENOISER
from cachekit.interface.specs import Spec, parse
from cachekit.registry.catalog import Catalog, installed
from cachekit.tools.calibrating.batches import Batch, Prompt, batched, call_of, shared_arguments, size_of
from cachekit.tools.calibrating.branches import refuse_equal_branches
from cachekit.tools.calibrating.calibration import Calibration, versions
from cachekit.tools.calibrating.fits import Figures, Fit, Mean
from cachekit.tools.calibrating.key import guidance_of, key_of
from cachekit.tools.calibrating.lockstep import Exchange, Lockstep, alone
from cachekit.tools.calibrating.measured import Measured, Note, measured_key, watched_choices
from cachekit.tools.calibrating.standins import Recorder
from cachekit.tools.calibrating.trajectories import Cached, Reference
from cachekit.upstream.pipelines import denoisers_of, offloads
from cachekit.upstream.stepping import StepCall, watched

#: Called with the steps done and all steps.
Progress = Callable[[int, int], None]
#: One guidance scale or several; None is the pipeline's own.
Scales = Union[float, Sequence[float], None]
#: What a pipeline's copy runs within, given its arguments.
Within = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]


def calibrate(
    pipe: Any,
    spec: Spec,
    prompts: Sequence[Prompt],
    *,
    num_inference_steps: int,
    guidance_scale: Scales = None,
    reference_steps: int | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    exchange: Exchange = alone,
    catalog: Catalog | None = None,
    **arguments: Any,
) -> Calibration:
    """Fit the weights with which a policy's skipped outputs, and its full ones, lead to the uncached images.

        calibration = cachekit.calibrate(pipe, "calibrated:interval=4", prompts, num_inference_steps=25)
        calibration.save("weights.json")

    `spec` is a policy for the denoiser as a whole with a static schedule, or one with parts that measure figures of
    their own in uncached runs: see `Measured`. A prompt is a text, or the arguments of a call for one image. Prompt i
    has the noise of `seed` + i. `arguments` go to every call of the pipeline.

    The target is the uncached run of as many steps, or of `reference_steps`, at the same points of its trajectory.
    Batches of at most `batch` prompts run in threads, in step with each other; `exchange` adds the sums of a step over
    several processes. Each of several guidance scales gets a set of weights.

    Raises `CalibrationError`, and leaves the pipeline as it was, where the policy doesn't serve, the scheduler's step
    isn't linear in the output, the pipeline combines branches in another way than u + g (c - u), or weights are to be
    fitted for a prompt that equals the negative one, as an empty prompt does by default.
    """
    if not prompts:
        raise CalibrationError("no prompts to calibrate with; give a few, such as 16")
    scales = [guidance_scale] if guidance_scale is None or isinstance(guidance_scale, (int, float)) else guidance_scale
    policy = parse(spec, catalog or installed())
    aim = reference_steps or num_inference_steps
    batches = batched(prompts, batch, seed)
    measures = bool(watched_choices(policy.chosen(), Note()))
    length = num_inference_steps * len(batches) if measures else aim + num_inference_steps
    found = []
    for place, scale in enumerate(scales):
        given = shared_arguments(pipe, scale, arguments, batches[0])
        show = _shifted(progress, place * length, len(scales) * length)
        if measures:
            found.append(_measured(pipe, policy, batches, num_inference_steps, given, show, catalog))
        else:
            choice = choice_of(policy)
            work = _Calibrator(pipe, choice, num_inference_steps, aim, len(batches), given)
            found.append(work.run(batches, exchange, show, catalog))
    return Calibration.merge(*found)


def _measured(
    pipe: Any,
    policy: Policy,
    batches: Sequence[Batch],
    steps: int,
    arguments: Mapping[str, Any],
    show: Callable[[int], None],
    catalog: Catalog | None,
) -> Calibration:
    """Have the parts of a policy measure uncached runs of all batches."""
    done = itertools.count(1)

    def step(call: StepCall) -> Any:
        show(next(done))
        return call.run()

    def run(attachment: Attachment) -> None:
        for batch in batches:
            given, twin = call_of(batch, steps, arguments), watched(pipe, step)
            with attachment.run_of(twin, (), given):
                twin(**given)

    return measured_in(pipe, policy, run, sum(map(size_of, batches)), catalog)


def measured_in(
    pipe: Any, policy: Policy, run: Callable[[Attachment], Any], images: int = 1, catalog: Catalog | None = None
) -> Calibration:
    """Have the parts of a policy measure figures in uncached runs, which `run` makes of that many images.

    Raises `CalibrationError` where several parts do, the pipeline has several denoisers or no guidance scale, or a
    figure is not finite.
    """
    _refuse_several(pipe)
    note, name = Note(), measured_name(policy)
    with apply(pipe, Given.of(watched_choices(policy.chosen(), note)), catalog=catalog) as attachment:
        run(attachment)
    assert note.run is not None, "the pipeline has called its denoiser"
    try:
        return _of_note(note, note.run, name, images)
    except ValidationError as error:
        first = error.errors()[0]
        reason = "a figure is not finite" if first["type"] == "finite_number" else reason_of(first)
        raise CalibrationError(
            f"{name}: this run can't be calibrated: {reason}; measure it with other prompts, steps or precision"
        ) from None


def _of_note(note: Note, run: Beginning, name: str, images: int) -> Calibration:
    figures: list[dict[str, Mean]] = [{} for _ in range(run.steps)]
    for (place, figure), (total, count) in note.totals.items():
        figures[place][figure] = Mean(total=total, count=int(count))
    fit = Figures(guidance=guidance_of(run), prompts=images, steps=figures)
    return Calibration(key=measured_key(run, name), reference_steps=run.steps, versions=versions(), fits=[fit])


def measured_name(policy: Policy) -> str:
    """Name the part of a policy that measures figures of its own, "" if there is none.

    Raises `CalibrationError` where several do.
    """
    parts = (part for choice in policy.chosen().values() for part in (choice.when, choice.what))
    names = sorted({part.name for part in parts if isinstance(part, Measured)})
    if len(names) > 1:
        raise CalibrationError(f"{policy}: {' and '.join(names)} can't be measured together; do one at a time")
    return "".join(names)


def choice_of(policy: Policy) -> Choice:
    """Find the one choice of a policy, at the denoiser."""
    choices = list(policy.chosen().values())
    if len(choices) != 1 or getattr(choices[0].where, "name", "") != DENOISER.name:
        raise CalibrationError(
            f"{policy}: skips more or other than whole calls of the denoiser; use where=denoiser alone"
        )
    return choices[0]


def _shifted(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total) if progress else None


class Given(Policy):
    """Choices that are given, in place of a policy's own."""

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = "choices that are given"

    _choices: Mapping[str, Choice] = PrivateAttr()

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Self:
        """Make a policy of choices."""
        policy = cls()
        policy._choices = choices
        return policy

    def choices(self) -> Mapping[str, Choice]:
        """Choose what is given."""
        return self._choices


def _refuse_several(pipe: Any) -> None:
    """Raise `CalibrationError` for a pipeline with several denoisers."""
    if len(denoisers_of(pipe)) > 1:
        names = " and ".join(denoisers_of(pipe))
        raise CalibrationError(f"{type(pipe).__name__} has the denoisers {names}; only one can be calibrated")


class _Calibrator:
    """Calibrates a pipeline at one guidance scale."""

    def __init__(
        self, pipe: Any, choice: Choice, steps: int, reference_steps: int, batches: int, arguments: dict[str, Any]
    ) -> None:
        _refuse_several(pipe)
        if batches > 1 and offloads(pipe):
            raise CalibrationError(
                f"{type(pipe).__name__} moves its models to and from the CPU, which {batches} batches at once can't"
                " share; give a batch= that holds all prompts"
            )
        self._pipe, self._steps, self._reference_steps, self._arguments = pipe, steps, reference_steps, arguments
        self._recorder = Recorder()
        self._policy = Given.of({"denoiser": choice.with_parts(what=self._recorder)})

    def run(
        self,
        batches: Sequence[Batch],
        exchange: Exchange,
        show: Callable[[int], None],
        catalog: Catalog | None,
    ) -> Calibration:
        """Calibrate with these batches of prompts."""
        lock = Lockstep(len(batches), _turns(self._pipe), exchange)
        with apply(self._pipe, self._policy, catalog=catalog) as attachment:
            refuse_equal_branches(self._pipe, attachment, self._recorder, batches, self._steps, self._arguments)
            works = [
                partial(self._run_batch, attachment, batch, lock, place, () if place else (show,))
                for place, batch in enumerate(batches)
            ]
            run, *_ = lock.run(works)
        fit = Fit(guidance=guidance_of(run), prompts=sum(map(size_of, batches)), steps=lock.fits)
        return Calibration(key=key_of(run), reference_steps=self._reference_steps, versions=versions(), fits=[fit])

    def _run_batch(
        self,
        attachment: Attachment,
        batch: Batch,
        lock: Lockstep,
        place: int,
        shows: Sequence[Callable[[int], None]],
    ) -> Beginning:
        """Run one batch uncached, then cached, and get what the cached run began with."""
        reference, done = Reference(), itertools.count(1)
        cached = Cached(self._recorder, reference, partial(lock.meet, place))

        def watched_run(watch: Callable[[StepCall], Any], steps: int, within: Within) -> Any:
            given = call_of(batch, steps, self._arguments)
            with lock.entering() as enter:

                def step(call: StepCall) -> Any:
                    enter()
                    made = watch(call)
                    for show in shows:
                        show(next(done))
                    return made

                twin = watched(self._pipe, step)
                with within(twin, given):
                    twin(**given)
                return twin.scheduler

        scheduler = watched_run(reference.watch, self._reference_steps, lambda twin, given: attachment.paused())
        reference.finish(scheduler)
        watched_run(cached.watch, self._steps, lambda twin, given: attachment.run_of(twin, (), given))
        return self._recorder.run


def _turns(pipe: Any) -> int:
    """Choose how many batches run at once: a GPU is busy with one, and has no room for all."""
    device = getattr(getattr(pipe, "device", None), "type", "cpu")
    return (os.cpu_count() or 1) if device == "cpu" else 1

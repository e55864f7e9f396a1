"""Calibrate: fit weights along the cached trajectory, towards the uncached one."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Union

from pydantic import PrivateAttr
from typing_extensions import Self

from cachekit.applying import apply
from cachekit.attaching.attachment import Attachment
from cachekit.calibrating.calibration import Calibration, Fit, versions
from cachekit.calibrating.key import guidance_of, key_of
from cachekit.calibrating.lockstep import Exchange, Lockstep, alone
from cachekit.calibrating.standins import Recorder
from cachekit.calibrating.trajectories import Batch, Reference
from cachekit.errors import CalibrationError
from cachekit.interface.beginning import Beginning
from cachekit.interface.parts import Choice, StandIn
from cachekit.interface.policy import Policy
from cachekit.interface.sites import DENOISER
from cachekit.interface.specs import Spec, parse
from cachekit.registry.catalog import Catalog, installed
from cachekit.upstream.pipelines import denoisers_of, offloads
from cachekit.upstream.scales import scale_argument
from cachekit.upstream.stepping import StepCall, watched

#: The arguments of a call for one image; a text is its prompt.
Prompt = Union[str, Mapping[str, Any]]
#: Called with the steps done and all steps.
Progress = Callable[[int, int], None]
#: One guidance scale or several; None is the pipeline's own.
Scales = Union[float, Sequence[float], None]
#: What a pipeline's copy runs within, given its arguments.
Within = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]
#: Where a batch has the seeds of its noise.
_SEEDS = "seeds"


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

    `spec` is a policy for the denoiser as a whole with a static schedule. A prompt is a text, or the arguments of a
    call for one image. Prompt i has the noise of `seed` + i. `arguments` go to every call of the pipeline.

    The target is the uncached run of as many steps, or of `reference_steps`, at the same points of its trajectory.
    Batches of at most `batch` prompts run in threads, in step with each other; `exchange` adds the sums of a step over
    several processes. Each of several guidance scales gets a set of weights.

    Raises `CalibrationError`, and leaves the pipeline as it was, where the policy doesn't serve, the scheduler's step
    isn't linear in the output, or the pipeline combines branches in another way than u + g (c - u).
    """
    if not prompts:
        raise CalibrationError("no prompts to calibrate with; give a few, such as 16")
    scales = [guidance_scale] if guidance_scale is None or isinstance(guidance_scale, (int, float)) else guidance_scale
    choice = choice_of(spec, catalog or installed())
    aim = reference_steps or num_inference_steps
    length = aim + num_inference_steps
    batches = _batched(prompts, batch, seed)
    found = []
    for place, scale in enumerate(scales):
        given = _arguments(pipe, scale, arguments, batches[0])
        work = _Calibrator(pipe, choice, num_inference_steps, aim, len(batches), given)
        show = _shifted(progress, place * length, len(scales) * length)
        found.append(work.run(batches, exchange, show, catalog))
    return Calibration.merge(*found)


def choice_of(spec: Spec, catalog: Catalog) -> Choice:
    """Find the one choice of a policy, at the denoiser."""
    policy = parse(spec, catalog)
    choices = list(policy.chosen().values())
    if len(choices) != 1 or getattr(choices[0].where, "name", "") != DENOISER.name:
        raise CalibrationError(
            f"{policy}: skips more or other than whole calls of the denoiser; use calibrated:interval=4"
        )
    return choices[0]


def _shifted(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total) if progress else None


class Whole(Policy):
    """A choice at the denoiser, with another stand-in in place of its own."""

    name: ClassVar[str] = "whole"
    summary: ClassVar[str] = "a choice with another stand-in"

    _choice: Choice = PrivateAttr()

    @classmethod
    def of(cls, choice: Choice, what: StandIn) -> Self:
        """Replace the stand-in of a choice."""
        policy = cls()
        policy._choice = choice.with_parts(what=what)
        return policy

    def choices(self) -> Mapping[str, Choice]:
        """Choose the denoiser."""
        return {"denoiser": self._choice}


class _Calibrator:
    """Calibrates a pipeline at one guidance scale."""

    def __init__(
        self, pipe: Any, choice: Choice, steps: int, reference_steps: int, batches: int, arguments: dict[str, Any]
    ) -> None:
        if len(denoisers_of(pipe)) > 1:
            names = " and ".join(denoisers_of(pipe))
            raise CalibrationError(f"{type(pipe).__name__} has the denoisers {names}; only one can be calibrated")
        if batches > 1 and offloads(pipe):
            raise CalibrationError(
                f"{type(pipe).__name__} moves its models to and from the CPU, which {batches} batches at once can't"
                " share; give a batch= that holds all prompts"
            )
        self._pipe, self._steps, self._reference_steps, self._arguments = pipe, steps, reference_steps, arguments
        self._recorder = Recorder()
        self._policy = Whole.of(choice, self._recorder)

    def run(
        self,
        batches: Sequence[Mapping[str, Any]],
        exchange: Exchange,
        show: Callable[[int], None],
        catalog: Catalog | None,
    ) -> Calibration:
        """Calibrate with these batches of prompts."""
        lock = Lockstep(len(batches), _turns(self._pipe), exchange)
        with apply(self._pipe, self._policy, catalog=catalog) as attachment:
            works = [
                partial(self._run_batch, attachment, batch, lock, place, () if place else (show,))
                for place, batch in enumerate(batches)
            ]
            run, *_ = lock.run(works)
        fit = Fit(guidance=guidance_of(run), prompts=sum(map(_size, batches)), steps=lock.fits)
        return Calibration(key=key_of(run), reference_steps=self._reference_steps, versions=versions(), fits=[fit])

    def _run_batch(
        self,
        attachment: Attachment,
        batch: Mapping[str, Any],
        lock: Lockstep,
        place: int,
        shows: Sequence[Callable[[int], None]],
    ) -> Beginning:
        """Run one batch uncached, then cached, and get what the cached run began with."""
        reference, done = Reference(), itertools.count(1)
        cached = Batch(self._recorder, reference, partial(lock.meet, place))

        def watched_run(watch: Callable[[StepCall], Any], steps: int, within: Within) -> Any:
            given = self._call(batch, steps)
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

    def _call(self, batch: Mapping[str, Any], steps: int) -> dict[str, Any]:
        import torch

        given = dict(batch)
        seeds = given.pop(_SEEDS)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shared = {name: _for_each(name, value, len(seeds)) for name, value in self._arguments.items()}
        return {**shared, **given, "num_inference_steps": steps, "generator": generators}


def _arguments(pipe: Any, scale: float | None, given: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the arguments of calls: the guidance scale, and latents as output, since images aren't looked at.

    Whether guidance is true guidance is seen from those of a batch too.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {**({"output_type": "latent"} if "output_type" in taken else {}), **given}
    if scale is not None:
        arguments[scale_argument({**dict.fromkeys(taken), **arguments, **batch})] = scale
    return arguments


def _turns(pipe: Any) -> int:
    """Choose how many batches run at once: a GPU is busy with one, and has no room for all."""
    device = getattr(getattr(pipe, "device", None), "type", "cpu")
    return (os.cpu_count() or 1) if device == "cpu" else 1


# -- prompts ----------------------------------------------------------------------------------------------


def _batched(prompts: Sequence[Prompt], batch: int, seed: int) -> list[dict[str, Any]]:
    """Split prompts into batches: the arguments of a call for each, and the seeds of its noise."""
    each = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
    return [
        {
            **_joined(each[first : first + batch]),
            _SEEDS: [seed + place for place in range(len(each))][first : first + batch],
        }
        for first in range(0, len(each), batch)
    ]


def _joined(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the arguments of several prompts: tensors along dimension 0, anything else in a list."""
    import torch

    joined: dict[str, Any] = {}
    for name, value in prompts[0].items():
        values = [prompt[name] for prompt in prompts]
        if isinstance(value, torch.Tensor):
            joined[name] = torch.cat(values)
        else:
            joined[name] = None if value is None else values
    return joined


def _for_each(name: str, value: Any, count: int) -> Any:
    """Repeat a negative prompt for each prompt, since some pipelines want one for each."""
    return [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value


def _size(batch: Mapping[str, Any]) -> int:
    return len(batch[_SEEDS])

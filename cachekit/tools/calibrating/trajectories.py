"""The uncached trajectory that a calibration aims at, and the cached one that it is made along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cachekit.errors import CalibrationError
from cachekit.interface.moment import Time
from cachekit.tools.calibrating.fits import StepFit
from cachekit.tools.calibrating.key import guidance_of
from cachekit.tools.calibrating.standins import Recorder, shared_part, weighted
from cachekit.tools.calibrating.sums import Sums
from cachekit.tools.calibrating.terms import SAMPLE
from cachekit.upstream.prediction import times_of
from cachekit.upstream.stepping import StepCall

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Reference:
    """The samples `(batch, ...)` of an uncached run, the first of them before step 0.

    `is_scaled` is whether the scheduler keeps the sample as x0 + noise, and divides it for the denoiser.
    """

    samples: list[Tensor] = field(default_factory=list)
    times: tuple[Time, ...] = ()
    is_scaled: bool = False

    def watch(self, call: StepCall) -> Any:
        """Make a step and keep its sample.

        Raises `CalibrationError` unless the step is linear in the output, and begins where the last one ended.
        """
        scheduler = type(call.scheduler).__name__
        if not self.samples:
            self.is_scaled = call.is_scaled
            self.samples.append(call.sample.float().clone())
        elif not near(call.sample, self.samples[-1]):
            raise CalibrationError(
                "the pipeline changes the sample between two steps; use what=linear, which has no weights"
            )
        zero, one = call.try_constant(0.0), call.try_constant(1.0)
        made = call.run()
        if not near(made[0], zero + call.output.float() * (one - zero)):
            raise CalibrationError(
                f"{scheduler}: its step isn't linear in the denoiser's output, or adds noise; use another scheduler,"
                " or what=reuse(of=x0), which has no weights"
            )
        self.samples.append(made[0].float().clone())
        return made

    def finish(self, scheduler: Any) -> None:
        """Note the times of the run that has ended."""
        self.times = times_of(scheduler, None, len(self.samples) - 1)

    def at(self, step: int, times: Sequence[Time]) -> Tensor:
        """Get the sample before `step` of a run with these times, between two samples of a longer run."""
        if len(self.samples) == len(times) + 1:
            return self.samples[step]
        if step == len(times):
            return self.samples[-1]
        ratios = [_ratio(time) for time in self.times]
        here = _ratio(times[step])
        place = int(np.searchsorted([-ratio for ratio in ratios], -here, side="right")) - 1
        low = min(max(place, 0), len(ratios) - 2)
        share = min(max((ratios[low] - here) / (ratios[low] - ratios[low + 1]), 0.0), 1.0)
        before, after = (self.samples[index] / self._factor(self.times[index]) for index in (low, low + 1))
        return (before + share * (after - before)) * self._factor(times[step])

    def _factor(self, time: Time) -> float:
        """Compute by what x0 + noise is multiplied in the scheduler's sample."""
        return 1.0 if self.is_scaled or time.kind == "flow" else time.alpha or 1.0


def _ratio(time: Time) -> float:
    """Compute the noise beside x0: the share itself in flows, whose paths are straight in it."""
    if time.sigma is None or time.alpha is None:
        raise CalibrationError("the scheduler has no sigmas to find the same points by; leave out reference_steps")
    return time.sigma if time.kind == "flow" else time.sigma / time.alpha


def near(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors differ by rounding alone."""
    wide, other = one.float(), two.float()
    tolerance = 1e-3 if one.element_size() >= 4 else 5e-2
    return bool((wide - other).norm() <= tolerance * other.norm() + 1e-12)


class Cached:
    """The cached run of one batch of prompts, whose weights are fitted step by step."""

    def __init__(self, recorder: Recorder, reference: Reference, meet: Callable[[int, Sums], StepFit]) -> None:
        """Begin before step 0; `meet` gives the weights of a step for the sums of this batch."""
        self._recorder = recorder
        self._reference = reference
        self._meet = meet
        self._step = 0
        self._guidance: float | None = None

    def watch(self, call: StepCall) -> Any:
        """Fit the weights of a step, and make it with what they give."""
        names, terms, returned = self._seen()
        sign = _sign(returned, call.output)
        zero, one = call.try_constant(0.0), call.try_constant(1.0)
        aim = self._reference.at(self._step + 1, self._recorder.run.times)
        gain = one - zero
        # Where the output has no effect, any is as good as the pipeline's own.
        target = sign * ((aim - zero) / gain if bool((gain != 0).all()) else call.output.float())
        fit = self._meet(self._step, Sums.of(names, terms, target))
        self._step += 1
        value = weighted(dict(zip(names, terms)), fit.weights)
        return call.run((sign * value).to(call.output.dtype))

    def _seen(self) -> tuple[list[str], list[Tensor], Tensor]:
        """Combine the calls of a step as guidance does: names of terms, the terms, and what the pipeline was given."""
        seen = self._recorder.take()
        scales = self._scales([branch for call in seen for branch in call.branches[-1:]])
        if len(seen) != len(scales):
            raise CalibrationError(
                f"step {self._step} has {len(seen)} calls of the denoiser; use what=linear, which has no weights"
            )
        names: list[str] = []
        terms: list[Tensor] = []
        returned: list[Tensor] = []
        for call, scale in zip(seen, scales):
            sample = next(term for name, term in call.terms.items() if name.startswith(SAMPLE))
            names += call.terms.keys()
            terms += [term if scale == 1 else term.float() * scale for term in call.terms.values()]
            returned.append(shared_part(call.returned[0].chunk(len(call.branches))[-1], sample).float() * scale)
        return names, terms, sum(returned[1:], returned[0])

    def _scales(self, branches: Sequence[str]) -> list[float]:
        """List by what guidance multiplies each call's output."""
        if len(branches) < 2:
            return [1.0]
        if self._guidance is None:
            self._guidance = guidance_of(self._recorder.run)
        by_branch = {"cond": self._guidance, "uncond": 1 - self._guidance}
        return [by_branch[branch] for branch in dict.fromkeys(branches)]


def _sign(returned: Tensor, output: Tensor) -> float:
    """Find the sign with which the pipeline passes the guided output to the scheduler.

    Raises `CalibrationError` where it passes something else.
    """
    if returned.shape == output.shape:
        for sign in (1.0, -1.0):
            if near(output, sign * returned):
                return sign
    raise CalibrationError(
        "the pipeline gives the scheduler something else than u + g (c - u) of its branches; use what=linear, which"
        " has no weights"
    )

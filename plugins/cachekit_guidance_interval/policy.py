"""Guide within an interval of noise levels, and run the conditional branch alone elsewhere (arXiv 2404.07724)."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import OPEN, Action, Choice, Drop, Guidance, Moment, Open, Policy, PolicyError, Schedule

#: What the bounds of an interval are of.
Axis = Literal["noise", "timestep"]
#: The interval of the paper's experiments with Stable Diffusion XL.
_PUBLISHED = (0.28, 5.42)


class Within(Schedule):
    """Full from step `first` to step `stop` - 1 where low < x <= high, with x the noise level or the timestep."""

    name: ClassVar[str] = "within"

    first: int
    stop: int | None
    low: float | None
    high: float | None
    axis: Axis

    def full(self, at: Moment) -> bool:
        """Whether the step lies within all bounds; without a scheduler, within those of steps."""
        place = self._place(at)
        in_steps = at.step >= self.first and (self.stop is None or at.step < self.stop)
        is_above = self.low is None or place is None or place > self.low
        return in_steps and is_above and (self.high is None or place is None or place <= self.high)

    def action(self, at: Moment) -> Action | Open:
        """Leave it to the run where the bounds are of something that only a scheduler gives."""
        is_bounded = (self.low, self.high) != (None, None)
        return OPEN if is_bounded and self.full(at) and self._place(at) is None else super().action(at)

    def decide(self, at: Moment) -> Action:
        """Raise `PolicyError`: the run has no scheduler that gives what the bounds are of."""
        raise PolicyError(
            f"guidance_interval: no {self.axis} is known at step {at.step}; give the interval in steps, as first= and"
            " stop=, or use a scheduler of diffusers"
        )

    def _place(self, at: Moment) -> float | None:
        if self.axis == "timestep":
            return at.timestep
        if at.sigma is None or at.alpha is None:
            return None
        return at.sigma / at.alpha if at.alpha else inf


class GuidanceInterval(Policy):
    """Guidance interval: both branches run where the noise level lies between two bounds, elsewhere one of them.

    Guided are the steps from `first` to `stop` - 1 with low < x <= high, where x is the noise level sigma over alpha,
    or with `axis=timestep` the timestep. A bound that is None holds always. With nothing given the interval is the
    paper's for Stable Diffusion XL, 0.28 < sigma <= 5.42. In all other steps the conditional branch runs alone.
    """

    name: ClassVar[str] = "guidance_interval"
    summary: ClassVar[str] = "guide within an interval of noise levels or steps, elsewhere run one branch"
    paper: ClassVar[str] = "arXiv 2404.07724"

    first: int = Field(0, ge=0)
    stop: int | None = Field(None, ge=0)
    low: float | None = None
    high: float | None = None
    axis: Axis = "noise"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stop is not None and self.stop <= self.first:
            raise ValueError("stop must be above first; guidance ends before step stop")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError("low must be below high; they bound the guided steps")
        if self.axis == "timestep" and self._bounds == (None, None):
            raise ValueError("axis=timestep needs low, high or both; give the timesteps between which to guide")
        return self

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def choices(self) -> Mapping[str, Choice]:
        """Choose guidance."""
        is_given = (self.first, self.stop, *self._bounds) != (0, None, None, None)
        low, high = self._bounds if is_given else _PUBLISHED
        when = Within(first=self.first, stop=self.stop, low=low, high=high, axis=self.axis)
        return {"guidance": Choice(Guidance(), when, Drop())}

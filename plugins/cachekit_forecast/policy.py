"""Leave out calls of the denoiser, and forecast their output from those of full steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import (
    Calibrated,
    Calibration,
    Choice,
    Every,
    Linear,
    Mask,
    Policy,
    Reuse,
    Schedule,
    StandIn,
    Taylor,
    Where,
    WholeDenoiser,
)


class Forecast(Policy):
    """Forecast: the denoiser runs every `interval` steps; between them its output is extrapolated.

    The first `first` steps are full, then every `interval`-th after them, and the last one too unless `last` is
    false. Between them v_i = v_a + (i - a) / (a - b) * (v_a - v_b), where a and b are the last two full steps; before
    there are two, the only output is reused. `order` is the degree of the series: 0 reuses, 2 is a parabola. `of` is
    what is extrapolated: the output, the output minus the sample, or the clean sample x0, which schedulers that add
    noise in each step need, with order 0.

    Above an interval of 2 the line can miss by far on few steps, high guidance and multistep schedulers: there a
    calibrated forecast is the safe choice.
    """

    name: ClassVar[str] = "forecast"
    summary: ClassVar[str] = "run the denoiser every few steps and extrapolate its output between them"

    interval: int = Field(2, ge=1)
    order: int = Field(1, ge=0, le=8)
    of: Literal["output", "residual", "x0"] = "output"
    last: bool = True
    first: int = Field(1, ge=1)

    @property
    def caution(self) -> str:
        """Why a longer interval is a risk."""
        if self.interval <= 2 or self.order == 0:
            return ""
        return (
            f"{self}: above an interval of 2 an extrapolation can miss by far; compare with calibrated:interval="
            f"{self.interval}"
        )

    def choices(self) -> Mapping[str, Choice]:
        """Choose the denoiser as a whole."""
        what = {0: Reuse(of=self.of), 1: Linear(of=self.of)}.get(self.order, Taylor(order=self.order, of=self.of))
        return {"denoiser": Choice(WholeDenoiser(), Every(n=self.interval, first=self.first, last=self.last), what)}


class CalibratedForecast(Policy):
    """Calibrated forecast: the denoiser runs every `interval` steps; between them its output is a weighted sum.

    v_i = sum_j w_ij q_j, where the q are the last two outputs of each guidance branch and the sample; in full steps,
    the last one included, what was computed is corrected by the same kind of sum. The weights are in `file`, which
    `cachekit calibrate` makes for one model, scheduler, number of steps, interval and guidance scale: a run that
    differs is refused. Without a file, the calibrations of the embedded models are looked through. Without an interval,
    the full steps are those of the file.
    """

    name: ClassVar[str] = "calibrated"
    summary: ClassVar[str] = "run the denoiser every few steps, with weights measured on the model between them"

    file: str | None = None
    interval: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _something_is_given(self) -> Self:
        if self.file is None and self.interval is None:
            raise ValueError("give file=, made by cachekit calibrate, or interval=, to calibrate with")
        return self

    def choices(self) -> Mapping[str, Choice]:
        """Choose the denoiser as a whole; raises `CalibrationError` where the file can't be read."""
        return {"denoiser": Choice(WholeDenoiser(), self._schedule(), Calibrated(file=self.file))}

    def _schedule(self) -> Schedule:
        if self.interval is not None:
            return Every(n=self.interval, last=True)
        assert self.file is not None, "one of both is given"
        return Mask(steps=tuple(Calibration.load(self.file).key.full))


class Cache(Policy):
    """Any place, schedule and stand-in, with no policy around them: `cache:where=...,when=...,what=...`."""

    name: ClassVar[str] = "cache"
    summary: ClassVar[str] = "any place, schedule and stand-in"
    repeats: ClassVar[bool] = True

    where: Where = Field()
    when: Schedule = Every(n=2)
    what: StandIn = Reuse()

    def choices(self) -> Mapping[str, Choice]:
        """Choose what is given."""
        return {"cache": Choice(self.where, self.when, self.what)}

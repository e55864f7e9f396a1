"""Leave out calls of the denoiser, and make their output from the last two by weights measured on the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Calibrated, Calibration, CalibrationError, Choice, Every, Mask, Policy, Schedule, WholeDenoiser


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
        key = Calibration.load(self.file).key
        if not key.full:
            raise CalibrationError(f"{self.file!r} was made for {key.schedule}, not {self.name}; give another file")
        return Mask(steps=tuple(key.full))

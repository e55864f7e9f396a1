"""Leave out calls of the denoiser, and forecast their output from those of full steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import Choice, Every, Linear, Policy, Reuse, Taylor, WholeDenoiser


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

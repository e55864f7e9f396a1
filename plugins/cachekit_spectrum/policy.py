"""Forecast the last features from all full steps so far, by Chebyshev polynomials (arXiv 2603.01623)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from typing import ClassVar

from pydantic import Field

from cachekit import Chebyshev, Choice, Features, Linear, Moment, Policy, Schedule, Time


class Growing(Schedule):
    """Gaps between full steps that grow: the `first` steps are full, then each gap is longer than the one before.

    Gap j is the whole part of `window` + j `growth`.

    >>> [step for step in range(50) if Growing().full(Moment(step, 50))]
    [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    """

    name: ClassVar[str] = "growing"
    summary: ClassVar[str] = "full at first, then at gaps that grow"
    paper: ClassVar[str] = "arXiv 2603.01623"
    positional: ClassVar[str] = "window"

    window: float = Field(default=2, ge=1)
    growth: float = Field(default=0.75, ge=0)
    first: int = Field(default=5, ge=1)

    def full(self, at: Moment) -> bool:
        """Whether the step is one of the first, or ends a gap."""
        since, full, gaps = at.step - at.origin, self.first - 1, 0
        while full < since:
            full += floor(round(self.window + gaps * self.growth, 3))
            gaps += 1
        return since < self.first or since == full


class Spectral(Chebyshev):
    """Ridge regression on Chebyshev polynomials, mixed with the line through the last two values.

    The regression counts `mix`, the line 1 - `mix`.

    >>> what, times = Spectral(mix=0), [Time(4), Time(2), Time(0)]
    >>> what.weights(times, Moment(5, 25, time=Time(5)))
    [1.5, -0.5, 0.0]
    """

    name: ClassVar[str] = "spectral"
    summary: ClassVar[str] = "ridge regression on Chebyshev polynomials, mixed with a line"
    paper: ClassVar[str] = "arXiv 2603.01623"

    mix: float = Field(default=0.5, ge=0, le=1)

    def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
        """Mix the weights of the regression and of the line."""
        line = Linear(axis=self.axis).weights(times, at)
        fitted = super().weights(times, at)
        padded = [*line, *(0.0 for _ in fitted[len(line) :])]
        return [self.mix * curve + (1 - self.mix) * straight for curve, straight in zip(fitted, padded)]


class Spectrum(Policy):
    """Spectrum: the blocks run at gaps that grow; between them their features follow a fit to all full steps so far.

    The features are what leaves the last block. They are fitted by Chebyshev polynomials up to `degree` in the step, by
    ridge regression with penalty `ridge`, which counts `mix`; the rest is the line through the last two full steps.
    The first `warm_up` steps are full, the first gap is `window`, and each gap adds `growth`.
    """

    name: ClassVar[str] = "spectrum"
    summary: ClassVar[str] = "forecast the last block by Chebyshev polynomials, at gaps that grow"
    paper: ClassVar[str] = "arXiv 2603.01623"

    window: float = Field(2, ge=1)
    growth: float = Field(0.75, ge=0)
    warm_up: int = Field(5, ge=1)
    degree: int = Field(4, ge=1, le=16)
    ridge: float = Field(0.1, ge=0)
    mix: float = Field(0.5, ge=0, le=1)

    def choices(self) -> Mapping[str, Choice]:
        """Choose the features, at gaps that grow, and their spectral fit."""
        when = Growing(window=self.window, growth=self.growth, first=self.warm_up)
        what = Spectral(degree=self.degree, ridge=self.ridge, mix=self.mix)
        return {"features": Choice(Features(), when, what)}

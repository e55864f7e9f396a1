"""Stand-ins: what is returned in place of a skipped output, as weighted sums of those kept before."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, factorial
from typing import ClassVar, Literal

from pydantic import Field

from cachekit.errors import PolicyError
from cachekit.interface.moment import History, Moment, Streams, Time
from cachekit.interface.parts import StandIn


class Reuse(StandIn):
    """The newest value as it is.

    >>> from cachekit import Entry
    >>> Reuse().predict((Entry(("newest",), Time(4)), Entry(("older",), Time(2))), Moment(5, 25))
    ('newest',)
    """

    name: ClassVar[str] = "reuse"
    summary: ClassVar[str] = "the last computed value"

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Take the newest entry."""
        return history[0].tensors


class Drop(StandIn):
    """Nothing: at guidance the dropped branch's output is that of the branch which runs.

    >>> Drop().predict((), Moment(5, 25), given=("output of the other branch",))
    ('output of the other branch',)
    """

    name: ClassVar[str] = "drop"
    summary: ClassVar[str] = "the output of the branch that runs, at guidance only"
    length: ClassVar[int | None] = 0

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Take the other branch's output."""
        return given


class Extrapolation(StandIn):
    """Base of stand-ins that extrapolate along an axis of the run.

    `axis` is the step's index, the share of noise sigma, or log-SNR, the logarithm of alpha over sigma.

    >>> Extrapolation(axis="sigma").places([Time(4, sigma=0.5)], Moment(5, 25, time=Time(5, sigma=0.4)))
    [0.4, 0.5]
    """

    axis: Literal["step", "sigma", "log_snr"] = "step"

    @property
    def reads(self) -> tuple[str, ...]:
        """The quantities of the scheduler that are needed."""
        return (*super().reads, *(() if self.axis == "step" else (self.axis,)))

    def places(self, times: Sequence[Time], at: Moment) -> list[float]:
        """List the places of the moment and of `times` on the axis; by step where the axis stands still."""
        found = [getattr(time, self.axis) for time in (at.time, *times)]
        if any(place is None for place in found):
            raise PolicyError(f"{self}: no {self.axis} at step {at.step}; use axis=step")
        if len(set(found)) < len(found):  # schedulers with several calls a step repeat their timesteps
            found = [time.step for time in (at.time, *times)]
        return found


class Differences(Extrapolation):
    """Base of series in finite differences, each divided by its true gap; of a lower order at first."""

    @property
    def degree(self) -> int:
        """The order of the series."""
        raise NotImplementedError

    @property
    def entries(self) -> int | None:
        """One more than the order."""
        return self.degree + 1

    def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
        """Add up the weights of the differences, each times its factor."""
        here, *there = self.places(times[: self.degree + 1], at)
        return _series(there, [self.factor(degree, here - there[0]) for degree in range(len(there))])

    def factor(self, degree: int, distance: float) -> float:
        """Compute the factor of the difference of this degree: that of a Taylor series."""
        return float(distance**degree / factorial(degree))


class Linear(Differences):
    """The line through the last two values: v_a + (x - a) / (a - b) * (v_a - v_b).

    >>> Linear().weights([Time(4), Time(2)], Moment(5, 25, time=Time(5)))
    [1.5, -0.5]
    >>> Linear().weights([Time(0)], Moment(1, 25, time=Time(1)))
    [1.0]
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "the line through the last two computed values"

    @property
    def degree(self) -> int:
        """1."""
        return 1


class Taylor(Differences):
    """A Taylor series in finite differences (TaylorSeer, arXiv 2503.06923, section 3.2) of order `order`.

    >>> Taylor(order=2).weights([Time(6), Time(4), Time(2)], Moment(7, 25, time=Time(7)))
    [1.625, -0.75, 0.125]
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "a Taylor series in finite differences"
    paper: ClassVar[str] = "arXiv 2503.06923"
    positional: ClassVar[str] = "order"

    order: int = Field(default=1, ge=0, le=8)

    @property
    def degree(self) -> int:
        """`order`."""
        return self.order


class Hermite(Taylor):
    """Taylor's differences with scaled Hermite polynomials in place of powers (HiCache, arXiv 2508.16984).

    The factor of degree i is s^i H_i(s x) / i! with the physicists' polynomials and s = `sigma`, between 0 and 1.

    >>> Hermite(order=1, sigma=0.5).weights([Time(4), Time(2)], Moment(5, 25, time=Time(5)))
    [1.25, -0.25]
    """

    name: ClassVar[str] = "hermite"
    summary: ClassVar[str] = "Taylor's differences with scaled Hermite polynomials"
    paper: ClassVar[str] = "arXiv 2508.16984"

    sigma: float = Field(default=0.5, gt=0, le=1)

    def factor(self, degree: int, distance: float) -> float:
        """Compute the scaled polynomial over the factorial of its degree."""
        x = self.sigma * distance
        before, value = 0.0, 1.0
        for k in range(degree):
            before, value = value, 2 * x * value - 2 * k * before
        return self.sigma**degree * value / factorial(degree)


class Chebyshev(Extrapolation):
    """Ridge regression on Chebyshev polynomials of all values so far (Spectrum).

    Polynomials up to `degree` in the step, scaled to -1 to 1 over the run; `ridge` is the penalty on coefficients.

    >>> str(Chebyshev(degree=2, of="residual"))
    'chebyshev(of=residual,degree=2)'
    """

    name: ClassVar[str] = "chebyshev"
    summary: ClassVar[str] = "ridge regression on Chebyshev polynomials of all computed values"
    positional: ClassVar[str] = "degree"
    length: ClassVar[int | None] = None

    axis: Literal["step"] = "step"
    degree: int = Field(default=4, ge=1, le=16)
    ridge: float = Field(default=0.1, ge=0)

    def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
        """Solve the normal equations of the polynomials' coefficients for each value's weight."""
        import numpy as np

        last = max(at.steps - 1, 1)
        here, *rows = (
            [_chebyshev(k, 2 * time.step / last - 1) for k in range(self.degree + 1)] for time in (at.time, *times)
        )
        design = np.array(rows)
        normal = design.T @ design + self.ridge * np.eye(self.degree + 1)
        found: list[float] = (np.linalg.solve(normal, np.array(here)) @ design.T).tolist()
        return found


def _series(places: Sequence[float], factors: Sequence[float]) -> list[float]:
    """Weigh values at `places` so that they add up to their divided differences, each times its factor."""
    count = len(places)
    # Row k: how the difference of the present degree that begins at value k is made of the values.
    rows = [[float(k == j) for j in range(count)] for k in range(count)]
    total = [factors[0] * weight for weight in rows[0]]
    for degree in range(1, count):
        rows = [
            [(a - b) / (places[k] - places[k + 1]) for a, b in zip(rows[k], rows[k + 1])] for k in range(count - degree)
        ]
        total = [before + factors[degree] * weight for before, weight in zip(total, rows[0])]
    return total


def _chebyshev(degree: int, x: float) -> float:
    return cos(degree * acos(min(max(x, -1.0), 1.0)))

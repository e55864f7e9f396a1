"""Static schedules: which steps are full, known before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit.interface.moment import OPEN, Action, Moment, Open
from cachekit.interface.parts import Schedule


class Every(Schedule):
    """A full step every `n` steps: the `first` steps of the run, then every `n`-th after them.

    Counted from `start`, or from where the schedule last started anew. With `last` the last step of the run is full.

    >>> [step for step in range(12) if Every(n=3, first=2, last=True).full(Moment(step, 12))]
    [0, 1, 4, 7, 10, 11]
    """

    name: ClassVar[str] = "every"
    summary: ClassVar[str] = "full every n steps"
    positional: ClassVar[str] = "n"

    n: int = Field(default=2, ge=1)
    first: int = Field(default=1, ge=1)
    last: bool = False
    start: int = Field(default=0, ge=0)

    def full(self, at: Moment) -> bool:
        """Whether the step is one of the first, an `n`-th after them, or the last."""
        since = at.step - max(at.origin, self.start) - (self.first - 1)
        return since < 0 or since % self.n == 0 or (self.last and at.step == at.steps - 1)


class After(Schedule):
    """Full before step `m`, and never from it on: what step m - 1 makes serves all later ones.

    >>> [After(m=2).action(Moment(step, 4)).value for step in range(4)]
    ['store', 'store', 'reuse', 'reuse']
    """

    name: ClassVar[str] = "after"
    summary: ClassVar[str] = "full before step m, never from it on"
    positional: ClassVar[str] = "m"
    insists: ClassVar[bool] = True

    m: int = Field(default=10, ge=0)

    def full(self, at: Moment) -> bool:
        """Whether the step is before `m`."""
        return at.step < self.m


class Window(Schedule):
    """Another schedule in a window of the run; outside of it the target is computed.

    The window goes from step `first` to step `stop` - 1, and holds the timesteps above `low` and below `high`. A
    bound that is None holds always. Of the steps outside those are kept for the window that `when` names as full, or
    with `fresh` all that are read, so that the window begins with what the step before it has made.

    >>> window = Window(first=2, stop=5, when=Every(n=2))
    >>> [window.action(Moment(step, 6)).value for step in range(6)]
    ['store', 'compute', 'store', 'reuse', 'store', 'compute']
    """

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "another schedule between two steps or timesteps, full elsewhere"

    first: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=0)
    low: float | None = None
    high: float | None = None
    when: Schedule = Every(n=2)
    fresh: bool = False

    def full(self, at: Moment) -> bool:
        """Whether the step is outside of the window, or full by the schedule within."""
        return not self.holds(at) or self.when.full(at)

    def action(self, at: Moment) -> Action | Open:
        """Follow the inner schedule within the window; compute outside, and keep its full steps, or all with `fresh`.

        Without a scheduler a window of timesteps leaves the steps between to the run, which computes them.
        """
        action = self.when.action(at)
        if self._has_timesteps and at.timestep is None and action is not Action.STORE:
            return OPEN
        if self.holds(at) or action is Action.STORE:
            return action
        return Action.STORE if self.fresh else Action.COMPUTE

    @property
    def _has_timesteps(self) -> bool:
        return self.low is not None or self.high is not None

    def holds(self, at: Moment) -> bool:
        """Whether the step is in the window."""
        if at.step < self.first or (self.stop is not None and at.step >= self.stop):
            return False
        if not self._has_timesteps:
            return True
        low, high = (float(end if bound is None else bound) for bound, end in ((self.low, "-inf"), (self.high, "inf")))
        return at.timestep is not None and low < at.timestep < high


class Mask(Schedule):
    """Exactly these steps are full, and the first one of the run.

    >>> [step for step in range(8) if Mask(steps=(0, 1, 4)).full(Moment(step, 8))]
    [0, 1, 4]
    """

    name: ClassVar[str] = "mask"
    summary: ClassVar[str] = "full in the listed steps"
    positional: ClassVar[str] = "steps"

    steps: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if min(self.steps) < 0 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError("give steps from 0 on, each once and in order")
        return self

    def full(self, at: Moment) -> bool:
        """Whether the step is listed, or the schedule starts with it."""
        return at.step == at.origin or at.step in self.steps


class Quadratic(Schedule):
    """As many full steps as `every(n)` has, densest around step `center` (DeepCache, arXiv 2312.00858, section 3.3).

    The full steps are c + sign(l) |l|^p for values of l with equal gaps; p is `power`.

    >>> [step for step in range(25) if Quadratic(n=5, center=10).full(Moment(step, 25))]
    [0, 5, 9, 12, 18]
    """

    name: ClassVar[str] = "quadratic"
    summary: ClassVar[str] = "full every n steps on average, densest around a step"
    paper: ClassVar[str] = "arXiv 2312.00858"
    positional: ClassVar[str] = "n"

    n: int = Field(default=3, ge=1)
    center: int = Field(default=15, ge=0, le=10_000)
    power: float = Field(default=1.4, ge=0.1, le=10)
    start: int = Field(default=0, ge=0)

    def full(self, at: Moment) -> bool:
        """Whether the step is one of the full ones, or the schedule starts with it."""
        return at.step in (at.origin, self.start) or at.step in self.full_steps(at.steps)

    def full_steps(self, steps: int) -> frozenset[int]:
        """Compute the full steps of a run of `steps`."""
        count = -(-steps // self.n)
        low, high = (_root(end - self.center, self.power) for end in (0, steps))
        places = (low + (high - low) * k / count for k in range(count))
        return frozenset({0, *(int(self.center + _root(place, 1 / self.power)) for place in places)})


def _root(value: float, power: float) -> float:
    return float(abs(value) ** (1 / power)) * (1 if value >= 0 else -1)


def ends_row(at: Moment, row: Callable[[int], Iterable[bool]]) -> bool:
    """Whether a step is full because a row of skipped ones ends there, or because the schedule starts with it.

    For `Schedule.full` of methods that skip steps while something measured, added up since the last full step, stays
    small. `row(last)` has, for each step after the full step `last`, whether it may be skipped. The first that may not
    is full, and the next row follows it; a step for which `row` has nothing may not. Skipping while errors add up to at
    most 1:

    >>> from itertools import accumulate
    >>> errors = [0, 0.4, 0.4, 0.4, 0.4, 0.4]
    >>> def row(last):
    ...     return (total <= 1 for total in accumulate(errors[last + 1 :]))
    >>> [step for step in range(6) if ends_row(Moment(step, 6), row)]
    [0, 3]
    """
    last = at.origin
    while last < at.step:
        last += 1 + sum(takewhile(bool, islice(row(last), at.step - last)))
    return last == at.step

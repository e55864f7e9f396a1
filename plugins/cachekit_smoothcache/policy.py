"""Reuse layers in the steps in which that was measured to make a small error (arXiv 2411.10510)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from statistics import fmean
from typing import ClassVar

from pydantic import Field

from cachekit import (
    LAYERS,
    Choice,
    History,
    Measured,
    Moment,
    Policy,
    Reuse,
    Schedule,
    Signal,
    Sites,
    Streams,
    ends_row,
    relative_change,
)  # fmt: skip

#: The most steps over which errors are measured.
_LONGEST = 5


class SmoothCache(Policy):
    """SmoothCache: attention and feed-forward layers are reused where the measured error of that is small.

    E_k(i) is the mean of |o_i - o_(i-k)| / |o_i| over all layers of a kind, with o their outputs. After a full step a,
    all layers of a kind are reused in steps i = a + 1, a + 2, ... while E_(i-a)(i) is below `threshold`, at most
    `longest` steps in a row. The curves are in `file`, which `cachekit calibrate` makes for one model, scheduler and
    number of steps. The steps are known before the run.
    """

    name: ClassVar[str] = "smoothcache"
    summary: ClassVar[str] = "reuse attention and feed-forward layers in the steps where the measured error is small"
    paper: ClassVar[str] = "arXiv 2411.10510"

    threshold: float = Field(0.15, ge=0)
    longest: int = Field(3, ge=1, le=_LONGEST)
    file: str | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Choose the layers of all kinds that the model has."""
        when = ErrorCurves(threshold=self.threshold, longest=self.longest, file=self.file)
        return {"layers": Choice(Sites(kinds=LAYERS), when, Reuse())}


class ErrorCurves(Measured, Schedule):
    """Full where the measured error since the last full step reaches `threshold`, for each kind of layers apart."""

    name: ClassVar[str] = "error_curves"
    past = _LONGEST

    threshold: float
    longest: int

    def full(self, at: Moment) -> bool:
        """Whether the step ends a row of reused ones; every step is full without a file."""
        names, figures = [curve(at, gap) for gap in range(1, self.longest + 1)], self.figures

        def row(last: int) -> Iterator[bool]:
            return (errors.get(name, inf) < self.threshold for name, errors in zip(names, figures[last + 1 :]))

        return ends_row(at, row)

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> Mapping[str, float]:
        """Measure the errors of reusing each of the last outputs in place of the new one."""
        return {
            curve(at, at.step - entry.at.step): fmean(map(relative_change, entry.tensors[0], kept[0]))
            for entry in history
        }


def curve(at: Moment, gap: int) -> str:
    """Name the errors of reusing outputs of this kind of layers from `gap` steps before."""
    return f"{at.kind}.{gap}"

"""Skip all blocks while the magnitude of their residual hardly changes (arXiv 2506.09045)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from operator import mul
from typing import Any, ClassVar

from pydantic import Field

from cachekit import (
    Beginning,
    Choice,
    History,
    Measured,
    Moment,
    Policy,
    Reuse,
    Schedule,
    Signal,
    Span,
    Streams,
    ends_row,
)  # fmt: skip

_RATIO = "ratio"


class MagCache(Policy):
    """MagCache: all blocks are skipped while the magnitude of what they add hardly changes.

    With g_i the ratio of that magnitude in step i to the one in step i - 1, skipping up to step i makes the error
    sum_j |1 - prod_k<=j g_k|, over the steps j since the last full one. Steps are skipped while the error is at most
    `threshold` and there are at most `longest` in a row; then what the blocks added last is added again. The first
    `retained` share of the steps is full.

    `ratios` are the g of a model, one for each step of some run; for another number of steps the nearest are taken.
    With `file`, they are what `cachekit calibrate` measured. The steps are known before the run.
    """

    name: ClassVar[str] = "magcache"
    summary: ClassVar[str] = "skip all blocks while the measured magnitude of their residual hardly changes"
    paper: ClassVar[str] = "arXiv 2506.09045"
    exclusive: ClassVar[tuple[str, ...]] = ("ratios", "file")

    threshold: float = Field(0.06, ge=0)
    longest: int = Field(3, ge=1)
    retained: float = Field(0.2, ge=0, le=1)
    ratios: tuple[float, ...] | None = Field(None, min_length=1)
    file: str | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Choose all blocks, those of several chains in a row where the chains join."""
        keys = ("threshold", "longest", "retained", "ratios", "file")
        when = Magnitudes(**{key: getattr(self, key) for key in keys})
        return {"blocks": Choice(Span(chain="all"), when, Reuse(of="residual"))}


class Magnitudes(Measured, Schedule):
    """Full where the accumulated error of the ratios exceeds `threshold`, or after `longest` skipped steps."""

    name: ClassVar[str] = "magnitudes"
    quantity = "residual"

    threshold: float
    longest: int
    retained: float
    ratios: tuple[float, ...] | None

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Raise `CalibrationError` where there are no ratios, or a file was made for something else than this run."""
        if self.ratios is None:
            super().begin(run, shared)

    def full(self, at: Moment) -> bool:
        """Whether the step is retained, or ends a row of skipped ones; every step is full without ratios."""
        ratios, first = self._ratios_of(at.steps), int(self.retained * at.steps + 0.5)

        def row(last: int) -> Iterator[bool]:
            errors = accumulate(abs(1 - ratio) for ratio in accumulate(ratios[last + 1 :], mul))
            return (error <= self.threshold for error in islice(errors, 0 if last + 1 < first else self.longest))

        return ends_row(at, row)

    def _ratios_of(self, steps: int) -> Sequence[float]:
        ratios = self.ratios or [figures.get(_RATIO, 1.0) for figures in self.figures]
        return nearest(ratios, steps) if ratios else ()

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> Mapping[str, float]:
        """Measure the ratio of the magnitudes of two residuals `(batch, tokens, channels)`, the mean over tokens."""
        if not history:
            return {}
        new, old = (residual.float().norm(dim=-1) for residual in (kept[0], history[0].tensors[0]))
        return {_RATIO: float((new / (old + 1e-8)).mean())}


def nearest(ratios: Sequence[float], steps: int) -> Sequence[float]:
    """Stretch the ratios of one run to another number of steps, each step with the nearest."""
    scale = (len(ratios) - 1) / (steps - 1) if steps > 1 else 0.0
    return [ratios[round(step * scale)] for step in range(steps)] if steps > 1 else ratios[-1:]

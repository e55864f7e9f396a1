"""Reuse self-attention outputs for a few steps at a time in a window of the run (arXiv 2408.12588)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Action, Kind, Moment, Policy, Target


class PyramidLite(Policy):
    """Pyramid lite, one level of pyramid attention broadcast (section 3).

    The window goes from share `start` to share `end` of the steps. Within it self-attention is computed every
    `interval` steps and reused in between; outside it is always computed.
    """

    name: ClassVar[str] = "pyramid_lite"
    summary: ClassVar[str] = "reuse self-attention for a few steps in the middle of a run"
    paper: ClassVar[str] = "arXiv 2408.12588"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.SELF_ATTENTION})

    interval: int = Field(2, ge=1)
    start: float = Field(0.2, ge=0, le=1)
    end: float = Field(0.8, ge=0, le=1)

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.start >= self.end:
            raise ValueError("start must be below end; give the window as shares of the steps")
        return self

    def action(self, target: Target, at: Moment) -> Action:
        """Keep every `interval` steps of the window, reuse between them, compute elsewhere."""
        first, stop = round(self.start * at.steps), round(self.end * at.steps)
        if not first <= at.step < stop:
            return Action.COMPUTE
        return Action.REUSE if (at.step - first) % self.interval else Action.STORE

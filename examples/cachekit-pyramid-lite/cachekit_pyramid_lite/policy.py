"""Reuse self-attention outputs for a few steps at a time in a window of the run (arXiv 2408.12588)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Action, Choice, Moment, Policy, Reuse, Schedule, Sites


class Broadcast(Schedule):
    """Full every `n` steps between two shares of the run; outside of them the target is only computed."""

    name: ClassVar[str] = "broadcast"
    summary: ClassVar[str] = "full every n steps between two shares of the run, computed elsewhere"
    paper: ClassVar[str] = "arXiv 2408.12588"
    positional: ClassVar[str] = "n"

    n: int = Field(default=2, ge=1)
    start: float = Field(default=0.2, ge=0, le=1)
    end: float = Field(default=0.8, ge=0, le=1)

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.start >= self.end:
            raise ValueError("start must be below end; give the window as shares of the steps")
        return self

    def action(self, at: Moment) -> Action:
        """Keep every `n` steps of the window, reuse between them, compute elsewhere."""
        first, stop = round(self.start * at.steps), round(self.end * at.steps)
        if not first <= at.step < stop:
            return Action.COMPUTE
        return Action.REUSE if (at.step - first) % self.n else Action.STORE


class PyramidLite(Policy):
    """Pyramid lite, one level of pyramid attention broadcast (section 3).

    The window goes from share `start` to share `end` of the steps. Within it self-attention is computed every
    `interval` steps and reused in between; outside it is always computed.
    """

    name: ClassVar[str] = "pyramid_lite"
    summary: ClassVar[str] = "reuse self-attention for a few steps in the middle of a run"
    paper: ClassVar[str] = "arXiv 2408.12588"

    interval: int = Field(default=2, ge=1)
    start: float = Field(default=0.2, ge=0, le=1)
    end: float = Field(default=0.8, ge=0, le=1)

    def choices(self) -> Mapping[str, Choice]:
        """Choose self-attention, and reuse what was computed last."""
        when = Broadcast(n=self.interval, start=self.start, end=self.end)
        return {"self_attention": Choice(Sites(kinds="self_attention"), when, Reuse())}

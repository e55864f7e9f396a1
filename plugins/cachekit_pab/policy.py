"""Broadcast attention outputs over a few steps, within a window of timesteps (arXiv 2408.12588)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit import Choice, Every, Kind, Policy, Reuse, SiteMap, Sites, Target, Window


class Attention(Sites):
    """Attention of some kinds, of which a model may have none."""

    name: ClassVar[str] = "attention"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites."""
        return sites.of(*self.kinds)


class PyramidAttentionBroadcast(Policy):
    """PAB: within a window of timesteps each kind of attention is computed every few steps, and reused in between.

    Step i is full where i is a multiple of the kind's interval: `spatial` for self-attention and joint attention,
    `temporal` for attention over frames, `cross` for cross-attention; an interval of 1 never reuses. The window holds
    the timesteps between `low` and `high`. Before and after it everything is computed.
    """

    name: ClassVar[str] = "pab"
    summary: ClassVar[str] = "reuse attention for a few steps in the middle of a run, each kind at its own interval"
    paper: ClassVar[str] = "arXiv 2408.12588"

    spatial: int = Field(2, ge=1)
    temporal: int = Field(4, ge=1)
    cross: int = Field(6, ge=1)
    low: float = 100
    high: float = 800

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high; give the window as timesteps")
        return self

    def choices(self) -> Mapping[str, Choice]:
        """Choose each kind of attention."""
        return {
            "spatial": self._choice(self.spatial, Kind.SELF_ATTENTION, Kind.JOINT_ATTENTION),
            "temporal": self._choice(self.temporal, Kind.TEMPORAL_ATTENTION),
            "cross": self._choice(self.cross, Kind.CROSS_ATTENTION),
        }

    def _choice(self, interval: int, *kinds: Kind) -> Choice:
        when = Window(low=self.low, high=self.high, when=Every(n=interval), fresh=True)
        return Choice(Attention(kinds=kinds), when, Reuse())

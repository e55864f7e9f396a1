"""Compute attention and feed-forward layers every few steps, and reuse them in between (arXiv 2407.01425)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from cachekit import LAYERS, Choice, Every, Policy, Reuse, Sites


class Fora(Policy):
    """FORA: every attention and feed-forward layer is computed every `interval` steps, and reused in between.

    What is kept is the layer's own output `(branches * batch, tokens, channels)`, before it is scaled and added to the
    block's input: both of these follow the present step.
    """

    name: ClassVar[str] = "fora"
    summary: ClassVar[str] = "reuse attention and feed-forward layers between full steps"
    paper: ClassVar[str] = "arXiv 2407.01425"

    interval: int = Field(3, ge=1)

    def choices(self) -> Mapping[str, Choice]:
        """Choose all attention and feed-forward layers."""
        return {"layers": Choice(Sites(kinds=LAYERS), Every(n=self.interval), Reuse())}

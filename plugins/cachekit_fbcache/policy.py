"""Skip all blocks after the first while the first one's residual changes little (First Block Cache)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cachekit import Choice, Indicator, Moment, Policy, Reuse, Signal, Tail

if TYPE_CHECKING:
    from torch import Tensor

#: The first block's residual in the last full step, and the mean of its absolute values.
_RESIDUAL, _MAGNITUDE = "residual", "magnitude"


class FBCache(Policy):
    """First Block Cache: the first block runs in each step, the others where its residual has changed.

    The change is |r - r_a| / |r_a|, with r what the first block adds to the hidden states and a the last full step.
    While it is at most `threshold`, what the other blocks added in step a is added again.
    """

    name: ClassVar[str] = "fbcache"
    summary: ClassVar[str] = "skip all blocks after the first while the first one's residual changes little"

    threshold: float = Field(0.05, ge=0)

    def choices(self) -> Mapping[str, Choice]:
        """Choose the blocks after the first."""
        return {"blocks": Choice(Tail(), FirstBlockChange(threshold=self.threshold), Reuse(of="residual"))}


class FirstBlockChange(Indicator):
    """Full where the probe's residual has changed by more than `threshold` since the last full step."""

    name: ClassVar[str] = "first_block_change"

    threshold: float

    def needs(self, signal: Signal, at: Moment) -> bool:
        """Whether the residual has changed by more than the threshold, or isn't a number."""
        last = at.memory.get(_RESIDUAL)
        if last is None:
            return True
        change = (_residual(signal) - last).abs().mean() / at.memory[_MAGNITUDE]
        return not float(change) <= self.threshold

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Hold the residual of full steps, and its magnitude: one reduction less in each step that is skipped."""
        if full:
            residual = _residual(signal)
            at.memory.update({_RESIDUAL: residual, _MAGNITUDE: residual.abs().mean()})


def _residual(signal: Signal) -> Tensor:
    return signal.left[0] - signal.entered[0]

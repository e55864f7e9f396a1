"""Skip all blocks after a few that show how far the residual of the others has moved (arXiv 2508.17356)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cachekit import Accumulating, Choice, History, Moment, Policy, Signal, StandIn, Streams, Tail

if TYPE_CHECKING:
    from torch import Tensor

#: What is held of the probe: its residuals in full steps, and the gains.
_RESIDUALS, _GAINS = "residuals", "gains"


class DiCache(Policy):
    """DiCache: the first `m` blocks run in each step; the others are skipped while the output of those changes little.

    In each step sum += |p - p'| / |p'|, with p the output of block m - 1 and p' that of the step before. While the sum
    is below `threshold`, the residual of the other blocks is r2 + g (r1 - r2), with r1 and r2 those of the last two
    full steps, and g = |q - q2| / |q1 - q2|, kept within 1 and 1.5, with q the residual of block m - 1. Otherwise they
    run, and the sum starts from 0. The first `retained` share of the steps and the last one are full.

    Each image and guidance branch of a batch has a g of its own; the sum is that of the batch, which is skipped or
    computed as a whole.
    """

    name: ClassVar[str] = "dicache"
    summary: ClassVar[str] = "skip all blocks after the first m, whose change shows how far the residual has moved"
    paper: ClassVar[str] = "arXiv 2508.17356"

    threshold: float = Field(0.4, ge=0)
    m: int = Field(1, ge=1)
    retained: float = Field(0.2, ge=0, le=1)

    def choices(self) -> Mapping[str, Choice]:
        """Choose the blocks after the first m."""
        when = ProbeChange(threshold=self.threshold, retained=self.retained)
        return {"blocks": Choice(Tail(m=self.m), when, Trajectory(of="residual"))}


class ProbeChange(Accumulating):
    """Full where the accumulated change of the probe's output reaches `threshold`."""

    name: ClassVar[str] = "probe_change"

    retained: float

    def full(self, at: Moment) -> bool:
        """Whether the step is one of the retained ones, or the last."""
        return at.step <= int(self.retained * at.steps) or at.step == at.steps - 1

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Hold the probe's residual in full steps too, and in others where it is between the last two."""
        super().took(signal, at, full)
        residual, residuals = signal.left[0] - signal.entered[0], at.memory.get(_RESIDUALS, ())
        if full:
            at.memory[_RESIDUALS] = (residual, *residuals[:1])
        elif len(residuals) == 2:
            at.memory[_GAINS] = gains(residual, *residuals)


class Trajectory(StandIn):
    """The last two values, interpolated or extrapolated to where the probe is."""

    name: ClassVar[str] = "trajectory"
    length: ClassVar[int | None] = 2

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Weigh the last two by the gains that the indicator has noted; without any, take the newest."""
        share = at.memory.get(_GAINS)
        if len(history) < 2 or share is None:
            return history[0].tensors
        pairs = zip(history[0].tensors, history[1].tensors)
        return tuple((last * share + before * (1 - share)).to(last.dtype) for last, before in pairs)


def gains(now: Tensor, last: Tensor, before: Tensor) -> Tensor:
    """Compute how far the probe's residual has moved, as a share of its move between the last two full steps.

    There is one for each image and branch, `(branches * batch, 1, ...)`. Where it has not moved between them, it is 1.
    """
    axes = tuple(range(1, now.dim()))
    moved, between = ((residual - before).abs().float().mean(axes, keepdim=True) for residual in (now, last))
    return (moved / between).nan_to_num(1.0, posinf=1.0).clamp(1.0, 1.5)

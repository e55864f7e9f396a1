"""Leave out calls of the denoiser while the sample's change predicts little of the output's (arXiv 2507.02860)."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cachekit import Accumulating, Choice, Moment, Policy, Reuse, Signal, Streams, WholeDenoiser

if TYPE_CHECKING:
    from torch import Tensor

_FULL, _RATE = "full", "rate"


class EasyCache(Policy):
    """EasyCache: calls of the denoiser are left out while the estimated change of its output is small.

    With k = |v_a - v_b| / |x_a - x_b| of the last two full steps, each step adds k |x_i - x_(i-1)| / |v_a| to an
    error. While it is below `threshold`, the output is x_i + (v_a - x_a); otherwise the denoiser runs, and the error
    starts from 0. The first `first` steps are full, and the last one unless `last` is false.
    """

    name: ClassVar[str] = "easycache"
    summary: ClassVar[str] = "leave out calls of the denoiser while its output is estimated to change little"
    paper: ClassVar[str] = "arXiv 2507.02860"

    threshold: float = Field(0.05, ge=0)
    first: int = Field(5, ge=1)
    last: bool = True

    def choices(self) -> Mapping[str, Choice]:
        """Choose the denoiser as a whole."""
        when = SampleChange(threshold=self.threshold, first=self.first, final=int(self.last))
        return {"denoiser": Choice(WholeDenoiser(), when, Reuse(of="residual"))}


class SampleChange(Accumulating):
    """Full where the error that the sample's change predicts reaches `threshold`."""

    name: ClassVar[str] = "sample_change"

    def shown(self, signal: Signal, at: Moment) -> Tensor:
        """Take a copy of the sample, which schedulers may write into."""
        return signal.entered[0].clone()

    def change(self, new: Tensor, old: Tensor, at: Moment) -> float:
        """Compute the error that the sample's change predicts; infinite before the rate is known."""
        if _RATE not in at.memory:
            return inf
        return float(at.memory[_RATE] * size(new - old) / size(at.memory[_FULL][1]))

    def learn(self, output: Streams, signal: Signal, at: Moment) -> None:
        """Hold the sample and the output of full steps, and how much the output changes with the sample."""
        new, last = (signal.entered[0].clone(), output[0].clone()), at.memory.get(_FULL)
        if last is not None:
            at.memory[_RATE] = size(new[1] - last[1]) / size(new[0] - last[0])
        at.memory[_FULL] = new


def size(tensor: Tensor) -> Tensor:
    """Compute the mean absolute value of a tensor."""
    return tensor.abs().mean()

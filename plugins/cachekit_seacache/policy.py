"""Leave out calls of the denoiser while the sample, filtered by frequency, changes little (arXiv 2602.18993)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cachekit import (
    Accumulating,
    Beginning,
    Choice,
    Linear,
    Moment,
    Policy,
    PolicyError,
    Reuse,
    Signal,
    SiteError,
    WholeDenoiser,
    relative_change,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

#: The number of calls left out in a row.
_ROW = "row"
#: The least share of image and of noise in a sample, so that the filter is defined at both ends of a run.
_LEAST = 1e-6


class SeaCache(Policy):
    """SeaCache: calls of the denoiser are left out while the part of the sample that is image changes little.

    The sample alpha x0 + sigma noise is filtered by alpha S / (alpha^2 S + sigma^2) with S = 1 / |f|^p, along each axis
    of space and time, scaled to a mean of 1. In each step sum += |y - y'| / |y'|, with y the filtered sample and y'
    that of the step before. While the sum is below `threshold`, for at most `longest` steps in a row (0: any number),
    the output minus the sample is reused, or with `order` 1 extrapolated from the last two. Otherwise the denoiser
    runs, and the sum starts from 0. The first `first` and the last `final` steps are full.

    `power` is p, by default 2 for images and 3 for videos.
    """

    name: ClassVar[str] = "seacache"
    summary: ClassVar[str] = "leave out calls of the denoiser while the filtered sample changes little"
    paper: ClassVar[str] = "arXiv 2602.18993"

    threshold: float = Field(0.25, ge=0)
    order: int = Field(1, ge=0, le=1)
    first: int = Field(1, ge=1)
    final: int = Field(1, ge=0)
    longest: int = Field(2, ge=0)
    power: float | None = Field(None, gt=0)

    def choices(self) -> Mapping[str, Choice]:
        """Choose the denoiser as a whole."""
        keys = ("threshold", "first", "final", "longest", "power")
        when = FilteredChange(**{key: getattr(self, key) for key in keys})
        return {"denoiser": Choice(WholeDenoiser(), when, (Linear if self.order else Reuse)(of="residual"))}


class FilteredChange(Accumulating):
    """Full where the accumulated change of the filtered sample reaches `threshold`."""

    name: ClassVar[str] = "filtered_change"

    longest: int
    power: float | None

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Refuse a run whose sample has no axes of space, or whose scheduler gives no share of noise.

        Raises `SiteError` for the sample, and `PolicyError` for the scheduler.
        """
        if len(run.sample) < 4:
            raise SiteError(f"seacache: the sample {run.sample} has no axes of space; use easycache")
        if not run.times or any(time.sigma is None or time.alpha is None for time in run.times):
            raise PolicyError("seacache: the scheduler gives no noise level to filter by; use easycache")

    def needs(self, signal: Signal, at: Moment) -> bool:
        """Whether enough calls have been left out, or the sum is too large."""
        return 0 < self.longest <= at.memory.get(_ROW, 0) or super().needs(signal, at)

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Count the calls left out since the last full step too."""
        super().took(signal, at, full)
        at.memory[_ROW] = 0 if full else at.memory.get(_ROW, 0) + 1

    def shown(self, signal: Signal, at: Moment) -> Tensor:
        """Filter the sample."""
        (sample,) = signal.entered
        power = self.power or (3.0 if sample.dim() > 4 else 2.0)
        alpha, sigma = (max(share or 0.0, _LEAST) for share in (at.alpha, at.sigma))
        return filtered(sample, alpha, sigma, power)

    def change(self, new: Tensor, old: Tensor, at: Moment) -> float:
        """Compute the change of each image on its own."""
        return fmean(map(relative_change, new, old))


def filtered(sample: Tensor, alpha: float, sigma: float, power: float) -> Tensor:
    """Filter `(batch, channels, [frames,] height, width)` by its share of signal at each frequency."""
    import torch

    axes = range(2, sample.dim())
    gains = []
    for axis in axes:
        frequency = torch.fft.fftfreq(sample.shape[axis], device=sample.device).abs()
        signal = 1 / (frequency**power + 1e-16)
        gain = alpha * signal / (alpha**2 * signal + sigma**2 + 1e-16)
        gains.append(gain.reshape([-1 if other == axis else 1 for other in axes]))
    whole = prod(gains[1:], start=gains[0])
    spectrum = torch.fft.fftn(sample.float(), dim=tuple(axes))
    made: Tensor = torch.fft.ifftn(spectrum * (whole / whole.mean()), dim=tuple(axes)).real
    return made

"""Forecast features by scaled Hermite polynomials between full steps (arXiv 2508.16984)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import LAYERS, Choice, Every, Features, Hermite, Policy, Sites


class HiCache(Policy):
    """HiCache: outputs are computed every `interval` steps; between them Hermite polynomials forecast them.

    The differences are those of TaylorSeer, up to `order`; the polynomials of degree m take the place of the m-th power
    of the distance, scaled by `sigma` inside and outside so that long forecasts stay bounded. The first `warm_up` steps
    are full. `at` is what is forecast: the output of each attention and feed-forward, or the `features` that leave the
    last block.
    """

    name: ClassVar[str] = "hicache"
    summary: ClassVar[str] = "forecast attention and feed-forward, or the last block, by Hermite polynomials"
    paper: ClassVar[str] = "arXiv 2508.16984"

    interval: int = Field(5, ge=1)
    order: int = Field(2, ge=0, le=8)
    sigma: float = Field(0.5, gt=0, le=1)
    warm_up: int = Field(3, ge=1)
    at: Literal["layers", "features"] = "layers"

    def choices(self) -> Mapping[str, Choice]:
        """Choose the layers or the features, every so many steps, and their Hermite series."""
        where = Sites(kinds=LAYERS) if self.at == "layers" else Features()
        what = Hermite(order=self.order, sigma=self.sigma)
        return {self.at: Choice(where, Every(n=self.interval, first=self.warm_up), what)}

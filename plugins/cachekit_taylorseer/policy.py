"""Forecast features by Taylor series between full steps (arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import LAYERS, Choice, Every, Features, Policy, Sites, Taylor


class TaylorSeer(Policy):
    """TaylorSeer: outputs are computed every `interval` steps; between them they follow their Taylor series.

    The derivatives are finite differences of the full steps' outputs, up to `order`, each divided by its gap. The
    first `warm_up` steps are full. `at` is what is forecast: the output of each attention and feed-forward, so that
    normalisation and modulation still run in all steps, or the `features` alone, which leave the last block.
    """

    name: ClassVar[str] = "taylorseer"
    summary: ClassVar[str] = "forecast attention and feed-forward, or the last block, by Taylor series"
    paper: ClassVar[str] = "arXiv 2503.06923"

    interval: int = Field(5, ge=1)
    order: int = Field(1, ge=0, le=8)
    warm_up: int = Field(3, ge=1)
    at: Literal["layers", "features"] = "layers"

    def choices(self) -> Mapping[str, Choice]:
        """Choose the layers or the features, every so many steps, and their Taylor series."""
        where = Sites(kinds=LAYERS) if self.at == "layers" else Features()
        return {self.at: Choice(where, Every(n=self.interval, first=self.warm_up), Taylor(order=self.order))}

"""Reuse the deep features of a UNet between full steps (arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import BranchChange, Choice, Every, NestedRegion, Policy, Quadratic, Reuse, Window


class DeepCache(Policy):
    """DeepCache: everything deeper than one skip connection runs on full steps alone.

    A full step keeps the tensor `(branches * batch, channels, height, width)` that enters the up layer of skip
    connection `branch`, counted from the shallowest, 0; the other steps compute only what is shallower. Uniform
    schedule: a full step every `interval` steps. Quadratic: as many full steps, densest around step `center`, with
    exponent `power` (section 3.3, the non-uniform 1:N strategy). Steps before `start` and from `end` on are full.
    """

    name: ClassVar[str] = "deepcache"
    summary: ClassVar[str] = "skip everything deeper than one skip connection between full steps"
    paper: ClassVar[str] = "arXiv 2312.00858"

    interval: int = Field(3, ge=1)
    branch: int = Field(0, ge=0)
    schedule: Literal["uniform", "quadratic"] = "uniform"
    center: int = Field(15, ge=0, le=10_000)
    power: float = Field(1.4, ge=0.1, le=10)
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=0)

    def choices(self) -> Mapping[str, Choice]:
        """Choose the region below a skip connection, and reuse what leaves it."""
        uniform = Every(n=self.interval, start=self.start)
        quadratic = Quadratic(n=self.interval, center=self.center, power=self.power, start=self.start)
        when = Window(first=self.start, stop=self.end, when=uniform if self.schedule == "uniform" else quadratic)
        # Features of guided steps are stale once guidance or attention changes: begin a new phase.
        return {"region": Choice(NestedRegion(branch=self.branch), when, Reuse(), BranchChange.REFRESH)}

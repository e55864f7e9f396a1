"""Reuse the deep features of a UNet between full steps (arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from cachekit import Action, BranchChange, Kind, Moment, Policy, SiteError, SiteMap, Target


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
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.BLOCK})
    # Features of guided steps are stale once guidance or attention changes: begin a new phase.
    on_branch_change: ClassVar[BranchChange] = BranchChange.REFRESH

    interval: int = Field(3, ge=1)
    branch: int = Field(0, ge=0)
    schedule: Literal["uniform", "quadratic"] = "uniform"
    center: int = Field(15, ge=0, le=10_000)
    power: float = Field(1.4, ge=0.1, le=10)
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=0)

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the region below skip connection `branch`."""
        if not sites.regions:
            cure = "use delta_dit" if sites.chains else "use a policy for attention or guidance"
            raise SiteError(f"{self}: looked for paired down and up blocks, but {sites.describe()}; {cure}")
        if self.branch >= len(sites.regions):
            last = len(sites.regions) - 1
            raise SiteError(f"{self}: branch={self.branch}, but {sites.model} has branches 0..{last}; use one of them")
        return [sites.regions[self.branch]]

    def action(self, target: Target, at: Moment) -> Action:
        """Keep on full steps and reuse between them."""
        in_use = at.step >= self.start and (self.end is None or at.step < self.end)
        return Action.REUSE if in_use and not self._is_full(at) else Action.STORE

    def _is_full(self, at: Moment) -> bool:
        if self.schedule == "uniform":
            return (at.step - max(at.origin, self.start)) % self.interval == 0
        return at.step in (at.origin, self.start) or at.step in self.full_steps(at.steps)

    def full_steps(self, steps: int) -> frozenset[int]:
        """Compute the full steps of the quadratic schedule for a run of `steps`: c + sign(l) |l|^p, with l linear."""
        count = -(-steps // self.interval)
        low, high = (_root(end - self.center, self.power) for end in (0, steps))
        places = (low + (high - low) * k / count for k in range(count))
        return frozenset({0, *(int(self.center + _root(place, 1 / self.power)) for place in places)})


def _root(value: float, power: float) -> float:
    return float(abs(value) ** (1 / power)) * (1 if value >= 0 else -1)

"""Policies that use what few shipped ones do: a history of residuals, and probes inside a call."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachekit import BranchChange, Choice, Indicator, Linear, Policy, Reuse, Schedule, SiteMap, Span, Where


class WarmedUp(Schedule):
    """Full in the first `warm_up` steps, and in every `interval`-th."""

    name: ClassVar[str] = "warmed_up"
    warm_up: int
    interval: int

    def full(self, at):
        return at.step < self.warm_up or (at.step - at.origin) % self.interval == 0


class Extrapolated(Policy):
    """Skip a span of blocks; its residual is extrapolated on a line through the last two computed ones."""

    name: ClassVar[str] = "extrapolated"
    change: ClassVar[BranchChange] = BranchChange.REMAINING

    interval: int = 2
    warm_up: int = 0
    first: int = 1
    stop: int = 3

    def choices(self):
        when = WarmedUp(warm_up=self.warm_up, interval=self.interval)
        return {"span": Choice(Span(first=self.first, stop=self.stop), when, Linear(of="residual"), self.change)}


class BehindTheFirst(Where):
    """All blocks of the first chain but its first, which is the probe."""

    name: ClassVar[str] = "behind_the_first"

    def find(self, sites: SiteMap):
        chain = sites.chains[0]
        return [dataclasses.replace(sites.span(1, len(chain)), probe=chain[0].name)]


class Changed(Indicator):
    """Computed where the probe's output has changed by `limit` since it last was."""

    name: ClassVar[str] = "changed"
    limit: float = 0.5

    def needs(self, signal, at):
        last = at.memory.get("last")
        return last is None or changed(signal.left[0], last) >= self.limit

    def took(self, signal, at, full):
        if full:
            at.memory["last"] = signal.left[0]


class FirstBlock(Policy):
    """Reuse the residual of all blocks but the first while the first one's output changes little."""

    name: ClassVar[str] = "first_block"

    limit: float = 0.5

    def choices(self):
        return {"blocks": Choice(BehindTheFirst(), Changed(limit=self.limit), Reuse(of="residual"))}


def changed(new, last):
    return float((new - last).abs().mean() / last.abs().mean())

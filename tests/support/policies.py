"""A policy that decides in the run: from the output of a probe inside a call."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachekit import OPEN, Action, Choice, Policy, Reuse, Schedule, SiteMap, Where


class BehindTheFirst(Where):
    """All blocks of the first chain but its first, which is the probe."""

    name: ClassVar[str] = "behind_the_first"

    def find(self, sites: SiteMap):
        chain = sites.chains[0]
        return [dataclasses.replace(sites.span(1, len(chain)), probe=chain[0].name)]


class Changed(Schedule):
    """Computed where the probe's output has changed by `limit` since it last was."""

    name: ClassVar[str] = "changed"
    limit: float = 0.5

    def action(self, at):
        return OPEN

    def probe(self, output, entry, at):
        last, new = at.memory.get("last"), output[0]
        if last is not None and changed(new, last) < self.limit:
            return Action.REUSE
        at.memory["last"] = new
        return Action.STORE


class FirstBlock(Policy):
    """Reuse the residual of all blocks but the first while the first one's output changes little."""

    name: ClassVar[str] = "first_block"

    limit: float = 0.5

    def choices(self):
        return {"blocks": Choice(BehindTheFirst(), Changed(limit=self.limit), Reuse(of="residual"))}


def changed(new, last):
    return float((new - last).abs().mean() / last.abs().mean())

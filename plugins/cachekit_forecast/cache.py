"""Combine any place, schedule and stand-in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from cachekit import Choice, Every, Policy, Reuse, Schedule, StandIn, Where


class Cache(Policy):
    """Any place, schedule and stand-in, with no policy around them: `cache:where=...,when=...,what=...`."""

    name: ClassVar[str] = "cache"
    summary: ClassVar[str] = "any place, schedule and stand-in"
    repeats: ClassVar[bool] = True

    where: Where = Field()
    when: Schedule = Every(n=2)
    what: StandIn = Reuse()

    def choices(self) -> Mapping[str, Choice]:
        """Choose what is given."""
        return {"cache": Choice(self.where, self.when, self.what)}

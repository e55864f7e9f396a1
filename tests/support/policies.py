"""Policies that use what no shipped one does: a history of residuals, and probes inside a call."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cachekit import Action, Kind, Policy


class Forecast(Policy):
    """Skip a span of blocks; its residual is extrapolated on a line through the last two computed ones."""

    name: ClassVar[str] = "forecast"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.BLOCK})
    keeps_history: ClassVar[bool] = True

    interval: int = 2
    warm_up: int = 0
    first: int = 1
    stop: int = 3

    def select(self, sites):
        return [sites.span(self.first, self.stop)]

    def action(self, target, at):
        full = at.step < self.warm_up or (at.step - at.origin) % self.interval == 0
        return Action.STORE if full else Action.REUSE

    def to_keep(self, output, entry, before, at):
        residuals = tuple(after - into for after, into in zip(output, entry))
        return (residuals, at.step, *(before[:2] if before else (None, None)))

    def restore(self, kept, entry, at):
        residuals, step, older, older_step = kept
        if older is None:
            return tuple(into + new for into, new in zip(entry, residuals))
        ahead = (at.step - step) / (step - older_step)
        return tuple(into + (new + ahead * (new - old)) for into, new, old in zip(entry, residuals, older))


class FirstBlock(Policy):
    """Reuse the residual of all blocks but the first while the first one's output changes little."""

    name: ClassVar[str] = "first_block"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.BLOCK})

    limit: float = 0.5

    def select(self, sites):
        chain = sites.chains[0]
        return [dataclasses.replace(sites.span(1, len(chain)), probe=chain[0].name)]

    def action(self, target, at):
        return None

    def probe(self, target, at, value, memory):
        last, new = memory.get("last"), value[0]
        if last is not None and changed(new, last) < self.limit:
            return Action.REUSE
        memory["last"] = new
        return Action.STORE

    def to_keep(self, output, entry, before, at):
        return tuple(after - into for after, into in zip(output, entry))

    def restore(self, kept, entry, at):
        return tuple(into + residual for into, residual in zip(entry, kept))


def changed(new, last):
    return float((new - last).abs().mean() / last.abs().mean())

"""Two sentences on which contenders are worth their place: those that beat plain steps of equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.summary import Group, Row

__all__ = ["LEAD", "lead", "verdict"]

#: The heading of a row's PSNR over that of the best plain steps of equal MACs.
LEAD = "lead (dB)"


@dataclass(frozen=True)
class _Contest:
    """A contender, the plain steps that cost as many MACs, and its lead over them in dB."""

    row: Row
    plain: Row
    lead: float

    @property
    def cost(self) -> str:
        """How much cheaper the contender is than the uncached pipeline."""
        return f"{self.row.mac_reduction:.2f}x MAC reduction ({self.row.speedup:.2f}x in wall time)"


def lead(group: Group, row: Row) -> float | None:
    """PSNR of a row over that of the best plain steps of equal MACs, in dB; None where either is unknown.

    Infinite where only the row is identical to the uncached images, and 0 where both are.
    """
    contest = _contest(group, row)
    return contest.lead if contest else None


def verdict(group: Group) -> list[str]:
    """Two sentences: what leads by most, and how many contenders lead at all; or why nothing can be said."""
    contests = [contest for row in group.rows if (contest := _contest(group, row))]
    if not contests:
        return [
            "Nothing here shows whether a cache is worth having: no images of contenders stand beside images of plain"
            " steps of equal cost."
        ]
    return [_best(max(contests, key=lambda one: one.lead)), _others(contests)]


def _contest(group: Group, row: Row) -> _Contest | None:
    if row.cell.method is Method.PLAIN or row.psnr is None:
        return None
    plain = group.best_plain(row.plain_steps()["MACs"])
    if plain is None or plain.psnr is None:
        return None
    return _Contest(row, plain, 0.0 if row.psnr == plain.psnr else row.psnr - plain.psnr)


def _best(best: _Contest) -> str:
    name, plain = best.row.label, f"where {best.plain.label} have {_decibels(best.plain)}"
    words = f"{_decibels(best.row)} at {best.cost}, {plain}."
    if best.lead > 0:
        return f"{name} wins by most: {words}"
    return f"Nothing beats plain steps of equal cost: {name} comes nearest, {words}"


def _others(contests: Sequence[_Contest]) -> str:
    winners = [contest for contest in contests if contest.lead > 0]
    count = f"{len(winners)} of {len(contests)} configurations"
    said = f"{count} are nearer to the uncached images than plain steps of equal MACs"
    if not winners:
        return f"{said}."
    cheapest = max(winners, key=lambda one: one.row.mac_reduction)
    by = f"by {cheapest.lead:.1f} dB" if math.isfinite(cheapest.lead) else "to the bit"
    return f"{said}, the cheapest of them {cheapest.row.label}: {cheapest.cost}, {by}."


def _decibels(row: Row) -> str:
    return FIGURES["psnr"].text(row) + (" dB" if math.isfinite(row.psnr or 0.0) else "")

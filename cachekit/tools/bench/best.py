"""The cheapest row of a table that fulfils conditions such as `PSNR>=35`."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachekit.errors import nearest
from cachekit.tools.bench.cells import BenchError, Method
from cachekit.tools.bench.figures import FIGURES, decimals
from cachekit.tools.bench.summary import Group, Row

__all__ = ["Best", "Condition", "best_of", "parse_conditions"]

_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|>|<)\s*([+-]?\d+(?:\.\d+)?)\s*(\S*)\s*")
#: What a number without a unit is in, where the table shows another unit than the value has.
_PLAIN_UNITS = {"macs": 1e9, "cache_bytes": 1 << 20, "peak_memory": 1 << 20, "deciding_seconds": 1e-3}
#: Figures that are shares, which the table shows as percentages.
_SHARES = ("caption_match",)
_UNITS = {"": 0.0, "db": 1.0, "x": 1.0, "s": 1.0, "ms": 1e-3, "%": 1e-2, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Condition:
    """A bound on a figure, or on a learned metric, in the unit of its value."""

    text: str
    key: str
    sign: str
    bound: float

    def value(self, row: Row) -> float | None:
        """Value of a row; None where it wasn't measured."""
        return FIGURES[self.key].value(row) if self.key in FIGURES else row.metrics.get(self.key)

    def holds(self, row: Row) -> bool:
        """Whether a row fulfils it."""
        value = self.value(row)
        return value is not None and _SIGNS[self.sign](value, self.bound)

    def shortfall(self, row: Row) -> float:
        """How far a row is from the bound, relative to it."""
        value = self.value(row)
        if self.holds(row):
            return 0.0
        return math.inf if value is None else abs(value - self.bound) / max(abs(self.bound), 1e-9)

    def shown(self, row: Row) -> str:
        """Name and value of the figure, as the table shows them."""
        value = self.value(row)
        if self.key in FIGURES:
            return f"{FIGURES[self.key].name} {FIGURES[self.key].text(row)}"
        return f"{self.key} {'-' if value is None else decimals(value)}"


@dataclass(frozen=True)
class Best:
    """The cheapest cached row of a group that fulfils all conditions, or else the nearest.

    `plain` is the cheapest row of plain steps that fulfils them and costs less than the cached one.
    """

    group: Group
    conditions: Sequence[Condition]
    row: Row
    fulfils: bool
    plain: Row | None = None

    @property
    def figures(self) -> str:
        """The figures of the conditions, and the costs."""
        costs = [f"{FIGURES[key].name} {FIGURES[key].text(self.row)}" for key in ("mac_reduction", "speedup")]
        return ", ".join(dict.fromkeys([*(one.shown(self.row) for one in self.conditions), *costs]))

    @property
    def code(self) -> str:
        """The line to paste."""
        specs = list(self.row.cell.specs)
        return f"cachekit.apply(pipe, {json.dumps(specs[0] if len(specs) == 1 else specs)})"


def parse_conditions(text: str, metrics: Sequence[str] = ()) -> list[Condition]:
    """Parse conditions that must all hold, joined by commas: headings of the table with bounds.

    `metrics` are the names of learned metrics. Raises `BenchError` for an unknown heading, or no number.
    """
    return [_condition(one, metrics) for one in text.split(",")]


def _condition(text: str, metrics: Sequence[str]) -> Condition:
    known = {
        **{figure.name.lower(): key for key, figure in FIGURES.items()},
        **{name.lower(): name for name in metrics},
    }
    found = _CONDITION.fullmatch(text)
    if not found or found[4].lower() not in _UNITS:
        raise BenchError(f"--best {text!r}: not a condition; write the heading of a column and a bound, 'PSNR>=35'")
    name, sign, number, unit = found.groups()
    if name.lower() not in known:
        names = [*(figure.name for figure in FIGURES.values()), *metrics]
        raise BenchError(f"--best {text!r}: unknown column {name!r}{nearest(name, names)}; known: {', '.join(names)}")
    key = known[name.lower()]
    if key in _SHARES and not unit and float(number) > 1:
        raise BenchError(f"--best {text!r}: a share above 1; write '{name}{sign}{number}%'")
    return Condition(text.strip(), key, sign, float(number) * (_UNITS[unit.lower()] or _PLAIN_UNITS.get(key, 1.0)))


def best_of(group: Group, conditions: Sequence[Condition]) -> Best | None:
    """Find the best cached row of a group; None where the group has none."""
    cached = [row for row in group.rows if row.cell.method is Method.CACHEKIT]
    if not cached:
        return None
    fulfilling = [row for row in cached if all(one.holds(row) for one in conditions)]
    if not fulfilling:
        return Best(
            group, conditions, min(cached, key=lambda row: sum(one.shortfall(row) for one in conditions)), False
        )
    row = min(fulfilling, key=_cost)
    plains = [one for one in group.rows if one.cell.method is Method.PLAIN and all(c.holds(one) for c in conditions)]
    plain = min(plains, key=_cost, default=None)
    return Best(group, conditions, row, True, plain if plain is not None and _cost(plain) < _cost(row) else None)


def _cost(row: Row) -> tuple[float, float]:
    return row.macs, row.seconds

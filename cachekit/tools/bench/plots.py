"""Lay out plots of quality over speed, with round numbers on the axes and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.summary import Row

__all__ = ["Axis", "plots"]

_WIDTH, _HEIGHT = 420, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 28, 40, 44
_SPEEDS = {"speedup (wall time)": "speedup", "MAC reduction": "mac_reduction"}
_QUALITIES = {"PSNR to uncached (dB)": "psnr", "caption match (share of images)": "caption_match"}
#: Offsets of a label from its point in pixels, best first.
_AROUND = [(0, -10), (0, 20), (14, 4), (-14, 4), (28, 4), (-28, 4), (0, -22), (0, 32)]
_CHARACTER = 7.0


@dataclass(frozen=True)
class _Point:
    """A row in a plot: its position, what generated its images, its short name and its label."""

    x: float
    y: float
    source: str
    tag: str
    label: str


def plots(rows: Sequence[Row], tags: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a plot for each pair of axes that has values; `tags` are the labels of cells by id."""
    for quality, up in _QUALITIES.items():
        for speed, across in _SPEEDS.items():
            values = [(getattr(row, across), getattr(row, up), row) for row in rows]
            points = [
                _Point(x, y, _source(row.cell.method), tags[row.cell.id], row.label)
                for x, y, row in values
                if y is not None and math.isfinite(y)
            ]
            if points:
                yield _plot(speed, quality, points)


def _source(method: Method) -> str:
    return method.value if method in (Method.CACHEKIT, Method.PLAIN) else "peer"


def _plot(speed: str, quality: str, points: Sequence[_Point]) -> dict[str, Any]:
    across = Axis.over(speed, [point.x for point in points], _LEFT, _WIDTH - _RIGHT)
    up = Axis.over(quality, [point.y for point in points], _HEIGHT - _BOTTOM, _TOP)
    front = [one for one in points if not any(_beats(other, one) for other in points)]
    places = [(across.at(point.x), up.at(point.y)) for point in points]
    # Points drawn last lie on top.
    order = sorted(range(len(points)), key=lambda index: ["plain", "cachekit", "peer"].index(points[index].source))
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "across": across,
        "up": up,
        "points": [(*places[index], points[index]) for index in order],
        "labels": [*_labels(points, places)],
        "front": " ".join(f"{across.at(x)},{up.at(y)}" for x, y in sorted({(one.x, one.y) for one in front})),
    }


def _beats(one: _Point, other: _Point) -> bool:
    return (one.x, one.y) != (other.x, other.y) and one.x >= other.x and one.y >= other.y


def _labels(points: Sequence[_Point], places: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float, _Point]]:
    """Place labels as (x, y, point); one without room, or equal to one nearby, is left to the point's title."""
    taken: list[tuple[float, float, str]] = []
    for point, (x, y) in zip(points, places):
        if any(tag == point.tag and math.dist((x, y), (u, v)) < 24 for u, v, tag in taken):
            continue
        for dx, dy in _AROUND:
            spot = (x + dx, y + dy)
            if _free(spot, point.tag, taken, places):
                taken.append((*spot, point.tag))
                yield (*spot, point)
                break


def _free(
    spot: tuple[float, float], tag: str, taken: Sequence[tuple[float, float, str]], places: Sequence[Any]
) -> bool:
    """Whether a text centred at `spot` covers no other label and no point."""
    half, (x, y) = _CHARACTER * len(tag) / 2, spot
    if not (x - half > _LEFT and x + half < _WIDTH and _TOP - 16 < y < _HEIGHT - _BOTTOM):
        return False
    clear = all(abs(x - u) > half + _CHARACTER * len(other) / 2 + 2 or abs(y - v) > 12 for u, v, other in taken)
    return clear and all(abs(x - u) > half + 5 or abs(y - 4 - v) > 9 for u, v in places)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels between `start` and `stop`, the pixels of the first and last mark."""

    name: str
    marks: tuple[float, ...]
    start: float
    stop: float

    @classmethod
    def over(cls, name: str, values: Sequence[float], start: float, stop: float) -> Axis:
        """Choose round marks that enclose all values."""
        low, high = min(values), max(values)
        width = (high - low) or abs(high) or 1.0
        rough = width / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
        first = math.floor(low / step + 1e-9)
        last = max(math.ceil(high / step - 1e-9), first + 1)
        return cls(name, tuple(step * number for number in range(first, last + 1)), start, stop)

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = (value - self.marks[0]) / (self.marks[-1] - self.marks[0])
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts of the marks."""
        return [(self.at(value), f"{value:.4g}") for value in self.marks]

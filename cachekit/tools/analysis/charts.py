"""Curves over the steps of a run as SVG: a line for each, and its spread as a band."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from cachekit.tools.bench.plots import Axis

__all__ = ["Curve", "chart"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 320, 58, 34, 18, 44
#: Colours that can be told apart by those who see red and green alike.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a8a")
_FONT = "font-family='system-ui, sans-serif' font-size='12' fill='#333'"
_LINE = 16


class Curve(NamedTuple):
    """Steps, and a mean and a spread for each."""

    steps: Sequence[int]
    mean: Sequence[float]
    spread: Sequence[float]


def chart(title: str, up: str, curves: Mapping[str, Curve]) -> str:
    """Draw curves over steps, with `up` as the name of the vertical axis."""
    steps = [step for curve in curves.values() for step in curve.steps]
    ends = [value for one in curves.values() for m, s in zip(one.mean, one.spread) for value in (m, m - s, m + s)]
    across = Axis.over("step", steps, _LEFT, _WIDTH - _RIGHT)
    height = Axis.over(up, ends, _HEIGHT - _BOTTOM, _TOP)
    tall = _HEIGHT + _LINE * len(curves)
    box = f"viewBox='0 0 {_WIDTH} {tall}' width='{_WIDTH}' height='{tall}'"
    label = f"role='img' aria-label='{escape(title, quote=True)}'"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {box} {_FONT} {label}>",
        f"<rect width='{_WIDTH}' height='{tall}' fill='#fff'/>",
        f"<text x='{_LEFT}' y='18' font-weight='bold'>{escape(title)}</text>",
        *_axes(across, height),
        *(part for place, named in enumerate(curves.items()) for part in _drawn(place, named, across, height)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _axes(across: Axis, up: Axis) -> Iterator[str]:
    """Yield the grid, its numbers and the names of both axes."""
    for y, text in up.ticks():
        yield f"<path d='M{_LEFT} {y}H{_WIDTH - _RIGHT}' stroke='#ddd'/>"
        yield f"<text x='{_LEFT - 6}' y='{y + 4}' text-anchor='end'>{text}</text>"
    for x, text in across.ticks():
        yield f"<text x='{x}' y='{_HEIGHT - _BOTTOM + 16}' text-anchor='middle'>{text}</text>"
    yield f"<text x='{(_LEFT + _WIDTH) / 2}' y='{_HEIGHT - 10}' text-anchor='middle'>{across.name}</text>"
    yield f"<text x='{_WIDTH - _RIGHT}' y='18' text-anchor='end'>{escape(up.name)}</text>"


def _drawn(place: int, named: tuple[str, Curve], across: Axis, up: Axis) -> Iterator[str]:
    """Yield the band, the line and the label of a curve."""
    name, curve = named
    colour, xs = _COLOURS[place % len(_COLOURS)], [across.at(step) for step in curve.steps]
    pairs = list(zip(curve.mean, curve.spread))
    edge = [*zip(xs, (m + s for m, s in pairs)), *reversed([*zip(xs, (m - s for m, s in pairs))])]
    yield f"<polygon points='{_points(edge, up)}' fill='{colour}' opacity='0.12'/>"
    line = _points(list(zip(xs, curve.mean)), up)
    yield f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>"
    y = _HEIGHT + place * _LINE
    yield f"<path d='M{_LEFT} {y}h18' stroke='{colour}' stroke-width='3'/>"
    yield f"<text x='{_LEFT + 26}' y='{y + 4}'>{escape(name)}</text>"


def _points(points: Sequence[tuple[float, float]], up: Axis) -> str:
    return " ".join(f"{x},{up.at(y)}" for x, y in points)

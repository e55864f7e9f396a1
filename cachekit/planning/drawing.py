"""Draw a plan as SVG: a square for each target and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

__all__ = ["draw"]

#: What each mark of a plan means, and its colour. The colours differ in lightness too, on light and dark grounds.
_MEANINGS = {
    ".": ("compute", "#0072b2"),
    "S": ("compute and keep", "#e69f00"),
    "r": ("reuse", "#a5d8c8"),
    "?": ("decided during the run", "#8a8a8a"),
}
_CELL, _LINE, _EDGE = 12, 14, 4
# Text is monospaced, so that its width is known; no common font is wider than this.
_FONT, _CHARACTER = "font-family='ui-monospace, monospace' font-size='11' fill='currentColor'", 6.8
#: Of all squares, each of which is a dash. They are set once: plans of large models have thousands of lines.
_DASHES = f"stroke-width='{_CELL}' stroke-dasharray='{_CELL - 1} 1'"

#: Spec, name of the target, kind, and a mark for each step.
Column = tuple[str, str, str, str]


def draw(branches: Sequence[int], columns: Sequence[Column]) -> str:
    """Draw a line for each column, below the steps and the number of `branches` that run in each of them."""
    # Names stand to the right, so that a narrow screen shows the steps first.
    lines = [*_lines(columns, len(branches) * _CELL + _CELL)]
    width = max(line.start + _CHARACTER * len(line.text) for line in lines) + _EDGE
    drawn = [*_numbers(branches)]
    for number, line in enumerate(lines):
        top = number * _LINE + _EDGE
        drawn.extend(_squares(line.marks, top))
        drawn.append(_text(line.start, top, line.text, line.title, line.style))
    size = f"{width:.0f} {len(lines) * _LINE + 2 * _EDGE}"
    box = "viewBox='0 0 {0} {1}' width='{0}' height='{1}'".format(*size.split())
    label = "role='img' aria-label='steps across, sites down'"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {box} {_FONT} {_DASHES} {label}>", *drawn, "</svg>\n"])


class _Line(NamedTuple):
    """Squares, and a text that begins at the pixel `start`; `title` is shown on hovering over the text."""

    start: int
    text: str
    marks: str = ""
    title: str = ""
    style: str = ""


def _lines(columns: Sequence[Column], names: int) -> Iterator[_Line]:
    """Yield the lines from top to bottom."""
    yield _Line(names, "step")
    yield _Line(names, "branches")
    for spec, listed in groupby(columns, lambda column: column[0]):
        yield _Line(_EDGE, spec, style="font-weight='bold'")
        yield from (_Line(names, name, marks, kind) for _, name, kind, marks in listed)
    yield _Line(_EDGE, "")
    for mark, (meaning, _) in _MEANINGS.items():
        if any(mark in marks for *_, marks in columns):
            yield _Line(2 * _CELL, meaning, mark)


def _numbers(branches: Sequence[int]) -> Iterator[str]:
    for step, count in enumerate(branches):
        if step % 5 == 0:
            yield _text(_EDGE + step * _CELL, _EDGE, str(step))
        yield _text(_EDGE + step * _CELL + 2, _EDGE + _LINE, str(count))


def _squares(marks: str, top: float) -> Iterator[str]:
    """Yield one dashed line for each run of equal marks: a dash is a step."""
    for mark, run in groupby(enumerate(marks), lambda pair: pair[1]):
        steps = [step for step, _ in run]
        meaning, colour = _MEANINGS[mark]
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        path = f"M{_EDGE + steps[0] * _CELL} {top + _CELL / 2}h{len(steps) * _CELL}"
        yield f"<path d='{path}' stroke='{colour}'><title>{where}: {meaning}</title></path>"


def _text(x: float, top: float, text: str, title: str = "", style: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f"<text x='{x}' y='{top + 10}' {style}>{escape(text)}{inside}</text>" if text else ""

"""A picture of a study: similarity over what is saved, plain steps beside caches, and the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cachekit.tools.bench.plots import Axis
from cachekit.tools.tuning.study import Measured
from cachekit.tools.tuning.targets import Targets, similarity_of

__all__ = ["pareto_picture"]

_SIZE = (900, 620)
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 40, 50, 70
_INK, _GRID, _PLAIN, _CACHED = (30, 30, 30), (225, 225, 225), (150, 150, 150), (20, 110, 180)
_DOT = 5


def pareto_picture(measured: Sequence[Measured], front: Sequence[Measured], targets: Targets) -> Image.Image:
    """Draw all that was measured: grey squares are plain steps, blue dots caches; the front is joined and named."""
    shown = [one for one in measured if math.isfinite(similarity_of(one.figures))]
    picture = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    if not shown:
        pen.text((_LEFT, _TOP), "nothing measured differs from the uncached images", fill=_INK, font=font)
        return picture
    name = "speedup (wall time)" if targets.by_time else "MAC reduction"
    across = Axis.over(name, [targets.saving(one.figures) for one in shown], _LEFT, _SIZE[0] - _RIGHT)
    up = Axis.over("PSNR to uncached (dB)", [similarity_of(one.figures) for one in shown], _SIZE[1] - _BOTTOM, _TOP)
    _draw_axes(pen, font, across, up)

    def place(one: Measured) -> tuple[float, float]:
        return across.at(targets.saving(one.figures)), up.at(similarity_of(one.figures))

    line = [place(one) for one in front if math.isfinite(similarity_of(one.figures))]
    if len(line) > 1:
        pen.line(line, fill=_CACHED, width=1)
    for one in shown:
        _draw_point(pen, place(one), bool(one.candidate.specs))
    for number, one in enumerate(front, 1):
        if math.isfinite(similarity_of(one.figures)):
            x, y = place(one)
            pen.text((x + 7, y - 12 - 3 * (number % 2)), str(number), fill=_INK, font=font)
    return picture


def _draw_axes(pen: ImageDraw.ImageDraw, font: Any, across: Axis, up: Axis) -> None:
    for x, text in across.ticks():
        pen.line((x, _TOP, x, _SIZE[1] - _BOTTOM), fill=_GRID)
        pen.text((x - 8, _SIZE[1] - _BOTTOM + 8), text, fill=_INK, font=font)
    for y, text in up.ticks():
        pen.line((_LEFT, y, _SIZE[0] - _RIGHT, y), fill=_GRID)
        pen.text((_LEFT - 45, y - 8), text, fill=_INK, font=font)
    pen.text((_LEFT, 16), f"{up.name} over {across.name}; numbers are rows of the table", fill=_INK, font=font)
    pen.text((_SIZE[0] // 2 - 60, _SIZE[1] - 30), across.name, fill=_INK, font=font)


def _draw_point(pen: ImageDraw.ImageDraw, spot: tuple[float, float], is_cached: bool) -> None:
    x, y = spot
    box = (x - _DOT, y - _DOT, x + _DOT, y + _DOT)
    if is_cached:
        pen.ellipse(box, fill=_CACHED)
    else:
        pen.rectangle(box, fill=_PLAIN)

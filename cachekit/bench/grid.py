"""Draw a comparison as one picture: a row per prompt, a column per configuration, a mark for what is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from cachekit.bench.comparison import Comparison, Sample

if TYPE_CHECKING:
    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

__all__ = ["picture_grid"]

_CAPTION, _GAP, _MARK, _LINE = 190, 12, 14, 16
_INK, _GOOD, _BAD = (30, 30, 30), (20, 140, 60), (200, 40, 40)


def picture_grid(comparison: Comparison, cell: int = 128) -> Image.Image:
    """Return the images of a comparison side by side, each `cell` pixels wide."""
    font = ImageFont.load_default(_LINE - 4)
    labels = [_wrapped(comparison.label(row), font, cell + _MARK) for row in comparison.rows]
    captions = [_wrapped(prompt, font, _CAPTION - 2 * _GAP) for prompt in comparison.prompts]
    grid = _Grid(
        cell=cell,
        head=_GAP + _LINE * max(len(lines) for lines in labels),
        height=_GAP + max(cell, *(_LINE * len(lines) for lines in captions)),
    )
    picture = Image.new("RGB", grid.corner(len(labels), len(captions)), "white")
    pen = ImageDraw.Draw(picture)
    for column, (row, lines) in enumerate(zip(comparison.rows, labels)):
        _write(pen, (grid.corner(column, 0)[0], _GAP), lines, font)
        for line, sample in enumerate(row.samples):
            _paste(picture, pen, sample, grid.corner(column, line), cell)
    for line, caption in enumerate(captions):
        _write(pen, (_GAP, grid.corner(0, line)[1]), caption, font)
    return picture


@dataclass(frozen=True)
class _Grid:
    """Say where things lie: the head's height, and the width and height of a cell."""

    cell: int
    head: int
    height: int

    def corner(self, column: int, line: int) -> tuple[int, int]:
        """Return the upper left corner of a cell; a mark stands to the right of its image."""
        return (_CAPTION + column * (self.cell + _MARK + _GAP), _GAP + self.head + line * self.height)


def _paste(picture: Image.Image, pen: ImageDraw.ImageDraw, sample: Sample, corner: tuple[int, int], cell: int) -> None:
    image = sample.image.convert("RGB")
    scale = cell / max(image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture.paste(image.resize((round(image.width * scale), round(image.height * scale)), resampling), corner)
    if sample.shown is not None:
        _mark(pen, sample.shown, (corner[0] + cell + 3, corner[1] + 2))


def _mark(pen: ImageDraw.ImageDraw, good: bool, corner: tuple[int, int]) -> None:
    """Draw a check mark or a cross of lines: the built-in font has neither."""
    x, y = corner
    if good:
        pen.line((x, y + 6, x + 4, y + 11, x + 12, y), fill=_GOOD, width=3)
    else:
        pen.line((x, y, x + 11, y + 11), fill=_BAD, width=3)
        pen.line((x + 11, y, x, y + 11), fill=_BAD, width=3)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Return lines no wider than `width`, broken after spaces and the separators of specs."""
    lines = [""]
    for piece in re.findall(r"[^ :,]*[ :,]*", text):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return lines


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: list[str], font: Font) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * _LINE), line, fill=_INK, font=font)

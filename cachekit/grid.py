"""Draw a comparison as one picture: a row per prompt, a column per configuration, a mark for what is shown."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .comparison import Comparison, Sample

if TYPE_CHECKING:
    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

__all__ = ["picture_grid"]

_CAPTION, _HEAD, _GAP, _FONT = 190, 58, 10, 12
_INK, _GOOD, _BAD = (30, 30, 30), (20, 140, 60), (200, 40, 40)


def picture_grid(comparison: Comparison, cell: int = 128) -> Image.Image:
    """Return the images of a comparison side by side, each `cell` pixels wide."""
    columns, rows = len(comparison.rows), len(comparison.prompts)
    size = (_CAPTION + columns * (cell + _GAP), _HEAD + rows * (cell + _GAP))
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    for column, row in enumerate(comparison.rows):
        left = _CAPTION + column * (cell + _GAP)
        _write(pen, (left, _GAP), comparison.label(row).replace(" + ", " +\n"), font, cell)
        for line, sample in enumerate(row.samples):
            _paste(picture, sample, (left, _HEAD + line * (cell + _GAP)), cell)
    for line, prompt in enumerate(comparison.prompts):
        _write(pen, (_GAP, _HEAD + line * (cell + _GAP)), prompt, font, _CAPTION - 2 * _GAP)
    return picture


def _paste(picture: Image.Image, sample: Sample, corner: tuple[int, int], cell: int) -> None:
    height = round(cell * sample.image.height / sample.image.width)
    enlarges = cell > sample.image.width
    resampling = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
    picture.paste(sample.image.convert("RGB").resize((cell, min(height, cell)), resampling), corner)
    if sample.shown is not None:
        _mark(ImageDraw.Draw(picture), sample.shown, (corner[0] + cell - 22, corner[1] + cell - 22))


def _mark(pen: ImageDraw.ImageDraw, good: bool, corner: tuple[int, int]) -> None:
    """Draw a check mark or a cross as lines: the built-in font has neither."""
    x, y = corner
    pen.rectangle((x, y, x + 20, y + 20), fill="white", outline=_GOOD if good else _BAD)
    if good:
        pen.line((x + 4, y + 10, x + 8, y + 15, x + 16, y + 5), fill=_GOOD, width=3)
    else:
        pen.line((x + 5, y + 5, x + 15, y + 15), fill=_BAD, width=3)
        pen.line((x + 15, y + 5, x + 5, y + 15), fill=_BAD, width=3)


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: Font, width: int) -> None:
    letters = max(1, int(width / font.getlength("n")))
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, letters)]
    pen.multiline_text(corner, "\n".join(lines), fill=_INK, font=font)

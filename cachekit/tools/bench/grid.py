"""Draw a comparison as one picture: a line per caption, a column per configuration, a mark for each caption match."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from cachekit.tools.bench.summary import Group

if TYPE_CHECKING:
    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

__all__ = ["picture_grid"]

_CAPTION, _GAP, _MARK, _LINE = 190, 12, 14, 16
_INK, _GOOD, _BAD = (30, 30, 30), (20, 140, 60), (200, 40, 40)


def picture_grid(group: Group, cell: int = 128) -> Image.Image:
    """Draw the images of a group side by side, each `cell` pixels wide.

    Each result of the group holds the pictures of all its captions, and all rows have the same captions.
    """
    font = ImageFont.load_default(_LINE - 4)
    columns = _columns(group)
    labels = [_wrapped(column.label, font, cell + _MARK) for column in columns]
    captions = [_wrapped(sample.caption, font, _CAPTION - 2 * _GAP) for sample in group.rows[0].samples]
    grid = _Grid(
        cell=cell,
        head=_GAP + _LINE * max(len(lines) for lines in labels),
        height=_GAP + max(cell, *(_LINE * len(lines) for lines in captions)),
    )
    picture = Image.new("RGB", grid.corner(len(labels), len(captions)), "white")
    pen = ImageDraw.Draw(picture)
    for place, (column, lines) in enumerate(zip(columns, labels)):
        _write(pen, (grid.corner(place, 0)[0], _GAP), lines, font)
        for line, (image, match) in enumerate(zip(column.images, column.matches)):
            _paste(picture, pen, image, match, grid.corner(place, line), cell)
    for line, caption in enumerate(captions):
        _write(pen, (_GAP, grid.corner(0, line)[1]), caption, font)
    return picture


@dataclass(frozen=True)
class _Column:
    """The images of one configuration, and whether each shows its caption, where that was checked."""

    label: str
    images: list[Image.Image]
    matches: list[bool | None]


def _columns(group: Group) -> list[_Column]:
    """Column of the uncached pipeline, and one for each row."""
    first = group.rows[0]
    uncached = [_decoded(plain) for _, _, plain in first.results[0].pictures]
    return [
        _Column(group.uncached.label, uncached, [sample.uncached_shown for sample in first.samples]),
        *(
            _Column(
                row.label,
                [_decoded(image) for _, image, _ in row.results[0].pictures],
                [sample.shown for sample in row.samples],
            )
            for row in group.rows
        ),
    ]


def _decoded(uri: str) -> Image.Image:
    """Read an image from a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@dataclass(frozen=True)
class _Grid:
    """The positions of images: the height of the head, and the width and height of a cell."""

    cell: int
    head: int
    height: int

    def corner(self, column: int, line: int) -> tuple[int, int]:
        """Upper left corner of a cell; the mark stands to the right of its image."""
        return (_CAPTION + column * (self.cell + _MARK + _GAP), _GAP + self.head + line * self.height)


def _paste(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    image: Image.Image,
    match: bool | None,
    corner: tuple[int, int],
    cell: int,
) -> None:
    image = image.convert("RGB")
    scale = cell / max(image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture.paste(image.resize((round(image.width * scale), round(image.height * scale)), resampling), corner)
    if match is not None:
        _mark(pen, match, (corner[0] + cell + 3, corner[1] + 2))


def _mark(pen: ImageDraw.ImageDraw, good: bool, corner: tuple[int, int]) -> None:
    """Draw a check mark or a cross from lines: the built-in font has neither."""
    x, y = corner
    if good:
        pen.line((x, y + 6, x + 4, y + 11, x + 12, y), fill=_GOOD, width=3)
    else:
        pen.line((x, y, x + 11, y + 11), fill=_BAD, width=3)
        pen.line((x + 11, y, x, y + 11), fill=_BAD, width=3)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels, after spaces and the separators of specs."""
    lines = [""]
    for piece in re.findall(r"[^ :,]*[ :,]*", text):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return lines


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: list[str], font: Font) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * _LINE), line, fill=_INK, font=font)

"""Write a report of results as one HTML page that loads nothing from outside."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from cachekit.planning.drawing import draw
from cachekit.tools.bench.cells import BenchError, Method
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.plots import plots
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.bench.tables import CONFIGURATION, EQUAL_COST, EQUAL_LEGEND, learned, legend, texts, title
from cachekit.tools.bench.verdict import LEAD, lead, verdict

__all__ = ["write_page"]

#: The columns that are shown at first, on narrow screens and on wide ones; the others can be chosen.
NARROW = ("", CONFIGURATION, "MAC reduction", LEAD)
WIDE = (*NARROW, "s/image", "speedup", "PSNR", "SSIM", "caption match", "Frechet", "kept", *EQUAL_COST)
#: Most characters of all pictures of a page: a report is to be sent around, and to open at once.
_PICTURES = 11_000_000
#: Takes the place of an uncached image that the page has already, until the script copies that.
_BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


def write_page(groups: Sequence[Group], path: Path) -> None:
    """Write a report, with all that it shows inside and every text escaped."""
    try:
        import jinja2
    except ImportError as error:
        raise BenchError("a page needs Jinja: pip install 'cachekit-diffusion[bench]'") from error
    source = resources.files(__package__).joinpath("page.html.jinja").read_text()
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    count = _pictures_of_a_row(groups)
    text = template.render(
        sections=[_section(group, f"image-{place}", count) for place, group in enumerate(groups)],
        command=shlex.join(["cachekit", *sys.argv[1:]]),
        date=date.today().isoformat(),
    )
    try:
        path.write_text(text)
    except OSError as error:
        raise BenchError(f"cannot write {str(path)!r}: {error.strerror}; give another path") from error


# -- what the template shows ------------------------------------------------------------------------------


def _section(group: Group, name: str, count: int) -> dict[str, Any]:
    """All that the template shows of a group, with so many pictures of each row."""
    rows = [group.uncached, *group.rows]
    values = {row.cell.id: _values(row) for row in rows}
    names = [*(figure.name for figure in FIGURES.values()), *learned(rows)]
    names = [heading for heading in names if any(found.get(heading) is not None for found in values.values())]
    tags, pictures, pictured = _tags(group), _Pictures(name, count), _pictured(group)
    return {
        "title": title(group),
        "verdict": verdict(group),
        "columns": [(heading, _shown(heading)) for heading in ("", CONFIGURATION, LEAD, *names, *EQUAL_COST)],
        "rows": [[*_table_cells(group, row, names, tags[row.cell.id])] for row in rows],
        "legend": f"{LEAD}: PSNR over that of the best plain steps at equal MACs; {legend(names)} {EQUAL_LEGEND}",
        "plots": [*plots(rows, tags)],
        "plans": [_plan(row) for row in group.rows if "columns" in (row.results[0].plan or {})],
        "pictures": [pictures.of(row) for row in pictured],
        "fewer": max((len(row.results[0].pictures) for row in pictured), default=0) > count and count,
        "environment": {name: value for name, value in group.environment.items() if value is not None},
        "warnings": group.warnings,
        "notes": group.notes,
    }


def _shown(name: str) -> str:
    """Screens on which a column is shown at first."""
    return "narrow" if name in NARROW else "wide" if name in WIDE or name not in _FIGURES else "none"


_FIGURES = {figure.name for figure in FIGURES.values()}


def _values(row: Row) -> dict[str, float | None]:
    """Values of a row by heading."""
    return {**{figure.name: figure.value(row) for figure in FIGURES.values()}, **row.metrics}


def _table_cells(group: Group, row: Row, names: Sequence[str], tag: str) -> Iterator[tuple[str, str]]:
    """Yield the text of each cell, and the text that it is sorted by."""
    shown, values = texts(group, row), _values(row)
    yield (tag, tag) if tag.isdigit() else ("", "")
    yield shown[CONFIGURATION], shown[CONFIGURATION]
    ahead = lead(group, row)
    yield "-" if ahead is None else f"{ahead:+.1f}", _sort_key(ahead)
    for name in names:
        yield shown.get(name, "-"), _sort_key(values.get(name))
    for name in EQUAL_COST:
        yield shown[name], shown[name].strip("-").partition(":")[0].partition(",")[0]


def _sort_key(value: float | None) -> str:
    if value is None:
        return ""
    return repr(float(value)) if math.isfinite(value) else "1e99"


def _tags(group: Group) -> dict[str, str]:
    """Short name of each row in plots: the number of its specs, the same for every method, or its plain steps.

    A star marks plain steps with another spacing than the scheduler's own.
    """
    numbers: dict[tuple[str, ...], int] = {}
    for row in group.rows:
        if row.cell.method is not Method.PLAIN:
            numbers.setdefault(row.cell.specs, len(numbers) + 1)
    return {
        row.cell.id: str(numbers.get(row.cell.specs, f"{row.cell.steps} steps{'*' if row.cell.spacing else ''}"))
        for row in [group.uncached, *group.rows]
    }


def _plan(row: Row) -> dict[str, Any]:
    plan: dict[str, Any] = row.results[0].plan or {}
    return {"label": row.label, "picture": draw(plan["branches"], plan["columns"])}


def _pictured(group: Group) -> list[Row]:
    """Rows with pictures: contenders, and the plain steps that they are compared with, in their best spacing."""
    contenders = [row for row in group.rows if row.cell.method is not Method.PLAIN]
    beside = (group.best_plain(steps) for row in contenders for steps in row.plain_steps().values())
    chosen = {id(row) for row in (*contenders, *beside)} if contenders else {*map(id, group.rows)}
    return [row for row in group.rows if id(row) in chosen and row.results[0].pictures]


def _pictures_of_a_row(groups: Sequence[Group]) -> int:
    """Count the pictures of each row, at least 1, that a page has room for; uncached images are in it once."""
    listed = [row.results[0].pictures for group in groups for row in _pictured(group)]
    most = max(map(len, listed), default=1)
    counts = range(most, 1, -1)
    return next((count for count in counts if _characters(listed, count) <= _PICTURES), 1)


def _characters(listed: Sequence[Sequence[tuple[str, str, str]]], count: int) -> int:
    pairs = [pair for pictures in listed for pair in pictures[:count]]
    uncached = {image for _, _, image in pairs}
    return sum(len(image) for _, image, _ in pairs) + sum(map(len, uncached))


class _Pictures:
    """The pictures of a group's rows; an uncached image, which is beside each contender's, is in the page once."""

    def __init__(self, group: str, count: int) -> None:
        """Name images after their group, whose name no other has; a row shows at most `count`."""
        self._group = group
        self._count = count
        self._names: dict[str, str] = {}

    def of(self, row: Row) -> dict[str, Any]:
        """Pictures of a row: (caption, cached image, uncached image, name of the uncached image, whether it is new)."""
        shown = row.results[0].pictures[: self._count]
        pairs = [(caption, cached, *self._named(uncached)) for caption, cached, uncached in shown]
        return {"label": row.label, "pairs": pairs, "open": row.cell.method is Method.CACHEKIT}

    def _named(self, image: str) -> tuple[str, str, bool]:
        is_new = image not in self._names
        name = self._names.setdefault(image, f"{self._group}-{len(self._names)}")
        return (image if is_new else _BLANK), name, is_new

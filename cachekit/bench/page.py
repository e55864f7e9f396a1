"""Write a report of results as one HTML page that loads nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cachekit.bench.cells import BenchError, Method
from cachekit.bench.figures import FIGURES
from cachekit.bench.plots import plots
from cachekit.bench.summary import Group, Row
from cachekit.bench.tables import CONFIGURATION, EQUAL_COST, EQUAL_LEGEND, learned, legend, texts, title
from cachekit.planning.drawing import draw

__all__ = ["write_page"]


def write_page(groups: Sequence[Group], path: Path) -> None:
    """Write a report, with all that it shows inside and every text escaped."""
    try:
        import jinja2
    except ImportError as error:
        raise BenchError("a page needs Jinja: pip install 'cachekit-diffusion[bench]'") from error
    source = resources.files(__package__).joinpath("page.html.jinja").read_text()
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    text = template.render(sections=[_section(group) for group in groups])
    try:
        path.write_text(text)
    except OSError as error:
        raise BenchError(f"cannot write {str(path)!r}: {error.strerror}") from error


# -- what the template shows ------------------------------------------------------------------------------


def _section(group: Group) -> dict[str, Any]:
    rows = [group.uncached, *group.rows]
    values = {row.cell.id: _values(row) for row in rows}
    names = [*(figure.name for figure in FIGURES.values()), *learned(rows)]
    names = [name for name in names if any(found.get(name) is not None for found in values.values())]
    tags = _tags(group)
    return {
        "title": title(group),
        "columns": ["", CONFIGURATION, *names, *EQUAL_COST],
        "rows": [[*_table_cells(group, row, names, tags[row.cell.id])] for row in rows],
        "legend": f"{legend(names)} {EQUAL_LEGEND}",
        "plots": [*plots(rows, tags)],
        "plans": [_plan(row) for row in group.rows if "columns" in (row.results[0].plan or {})],
        "pictures": [_pictures(row) for row in group.rows if row.results[0].pictures],
        "environment": {name: value for name, value in group.environment.items() if value is not None},
        "warnings": group.warnings,
        "notes": group.notes,
    }


def _values(row: Row) -> dict[str, float | None]:
    """Values of a row by heading."""
    return {**{figure.name: figure.value(row) for figure in FIGURES.values()}, **row.metrics}


def _table_cells(group: Group, row: Row, names: Sequence[str], tag: str) -> Iterator[tuple[str, str]]:
    """Yield the text of each cell, and the text that it is sorted by."""
    shown, values = texts(group, row), _values(row)
    yield (tag, tag) if tag.isdigit() else ("", "")
    yield shown[CONFIGURATION], shown[CONFIGURATION]
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


def _pictures(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "pairs": row.results[0].pictures,
        "open": row.cell.method is Method.CACHEKIT,
    }

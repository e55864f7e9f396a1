"""Show results: as the texts of a table, and as one page of HTML that needs nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cachekit.bench.cells import BenchError, Method
from cachekit.bench.plots import plots
from cachekit.bench.summary import Group, Row
from cachekit.planning.drawing import draw

__all__ = ["against", "columns", "title", "write_page"]

_AGAINST = {"plain steps at equal MACs": "MACs", "plain steps at equal wall time": "wall time"}


def title(group: Group) -> str:
    """Return what all rows of a group share."""
    cell = group.cell
    size = f"{cell.width or 'own'} x {cell.height or 'own'} pixels" if cell.width or cell.height else ""
    parts = [cell.model, cell.scheduler, f"{cell.uncached_steps} steps", cell.dtype or "", cell.device or "", size]
    return ", ".join(part for part in (*parts, f"compiled by {cell.compiled}" if cell.compiled else "") if part)


def columns(group: Group, row: Row) -> dict[str, str]:
    """Return the texts of one row by name of column; what is not known is a dash."""
    uncached = row.cell.method is Method.PLAIN and row.cell.steps == group.cell.uncached_steps
    return {
        "configuration": f"uncached, {row.cell.steps} steps" if uncached else row.label,
        **{name: _text(figure(row)) for name, (figure, _text) in _FIGURES.items()},
        **({} if row.frechet is None else {"Frechet": f"{row.frechet:.2f} (n={row.images})"}),
        **{name: f"{value:.3f}" for name, value in row.metrics.items()},
    }


def against(group: Group, row: Row, cost: str) -> str:
    """Return the plain steps that cost as much as a row, with what they reach."""
    if row.cell.method is Method.PLAIN:
        return "-"
    steps = row.plain_steps()[cost]
    plain = group.plain(steps)
    shown = "" if plain is None or plain.shown is None else f", {plain.shown:.0%} shown"
    reached = "" if plain is None or plain.psnr is None else f": {_decibel(plain.psnr)} dB{shown}"
    return f"{steps}{reached}"


def write_page(groups: Sequence[Group], path: Path) -> None:
    """Write a report; everything it shows is inside, and every text from outside is escaped."""
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


# -- texts ------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _decibel(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "identical"


def _mebibytes(value: float) -> str:
    return f"{value / (1 << 20):.2f} MiB"


def _known(text: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else text(value)


#: Each column after the first: its figure and how it is written.
_FIGURES: dict[str, tuple[Callable[[Row], float | None], Callable[[float | None], str]]] = {
    "s/image": (lambda row: row.seconds, _known(_seconds)),
    "spread": (lambda row: row.spread, _known(_seconds)),
    "first": (lambda row: row.first_seconds, _known(_seconds)),
    "faster": (lambda row: row.faster, _known(_times)),
    "GMACs": (lambda row: row.macs / 1e9, _known(_seconds)),
    "fewer": (lambda row: row.fewer, _known(_times)),
    "PSNR": (lambda row: row.psnr, _known(_decibel)),
    "SSIM": (lambda row: row.ssim, _known(_seconds)),
    "shown": (lambda row: row.shown, _known("{:.0%}".format)),
    "Frechet": (lambda row: row.frechet, _known("{:.2f}".format)),
    "kept": (lambda row: row.cache_bytes, _known(_mebibytes)),
    "deciding": (lambda row: row.deciding_seconds * 1e3, _known("{:.1f} ms".format)),
    "reused": (lambda row: row.reused, _known("{:.0f}".format)),
    "peak memory": (lambda row: row.peak_memory, _known(_mebibytes)),
}


# -- what the template shows ------------------------------------------------------------------------------


def _section(group: Group) -> dict[str, Any]:
    rows = [group.uncached, *group.rows]
    learned = dict.fromkeys(name for row in rows for name in row.metrics)
    names = [name for name in (*_FIGURES, *learned) if any(columns(group, row).get(name, "-") != "-" for row in rows)]
    tags = _tags(group)
    return {
        "title": title(group),
        "columns": ["", "configuration", *names, *_AGAINST],
        "rows": [[*_table_cells(group, row, names, tags)] for row in rows],
        "plots": [*plots(rows, tags)],
        "plans": [_drawn(row) for row in group.rows if "columns" in (row.results[0].plan or {})],
        "pictures": [_pictures(row) for row in group.rows if row.results[0].pictures],
        "environment": {name: value for name, value in group.environment.items() if value is not None},
        "warnings": list(dict.fromkeys(warning for row in rows for warning in row.warnings)),
    }


def _table_cells(group: Group, row: Row, names: Sequence[str], tags: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (text, what it is sorted by)."""
    texts, tag = columns(group, row), tags[row.cell.id]
    yield (tag, tag) if tag.isdigit() else ("", "")
    yield texts["configuration"], texts["configuration"]
    for name in names:
        value = _FIGURES[name][0](row) if name in _FIGURES else row.metrics.get(name)
        yield texts.get(name, "-"), _sortable(value)
    for cost in _AGAINST.values():
        text = against(group, row, cost)
        yield text, text.partition(":")[0].strip("-")


def _sortable(value: float | None) -> str:
    if value is None:
        return ""
    return repr(float(value)) if math.isfinite(value) else "1e99"


def _tags(group: Group) -> dict[str, str]:
    """Return what plots call each row: the number of its specs, whoever drew them, or how many plain steps it took."""
    numbers: dict[tuple[str, ...], int] = {}
    for row in group.rows:
        if row.cell.method is not Method.PLAIN:
            numbers.setdefault(row.cell.specs, len(numbers) + 1)
    return {
        row.cell.id: str(numbers.get(row.cell.specs, f"{row.cell.steps} steps"))
        for row in [group.uncached, *group.rows]
    }


def _drawn(row: Row) -> dict[str, Any]:
    plan: dict[str, Any] = row.results[0].plan or {}
    return {"label": row.label, "picture": draw(plan["branches"], plan["columns"])}


def _pictures(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "pairs": row.results[0].pictures,
        "open": row.cell.method is Method.CACHEKIT,
    }

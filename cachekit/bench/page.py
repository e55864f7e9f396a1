"""Show results: as the texts of a table, and as one page of HTML that needs nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .cells import BenchError, Method
from .summary import Group, Row

__all__ = ["against", "columns", "title", "write_page"]

_WIDTH, _HEIGHT, _MARGIN = 460, 300, 48
_SWITCHES = {".": "compute", "S": "store", "r": "reuse", "?": "open"}


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
    "kept": (lambda row: row.cache_bytes, _known(_mebibytes)),
    "deciding": (lambda row: row.deciding_seconds * 1e3, _known("{:.1f} ms".format)),
    "reused": (lambda row: row.reused, _known("{:.0f}".format)),
    "peak memory": (lambda row: row.peak_memory, _known(_mebibytes)),
}


# -- what the template shows ------------------------------------------------------------------------------


def _section(group: Group) -> dict[str, Any]:
    rows = [group.uncached, *group.rows]
    learned = list(dict.fromkeys(name for row in rows for name in row.metrics))
    names = ["configuration", *_FIGURES, *learned]
    return {
        "title": title(group),
        "columns": [*names, "fewer steps at equal MACs", "at equal wall time"],
        "rows": [[*_table_cells(group, row, names)] for row in rows],
        "plots": [*_plots(rows)],
        "plans": [_heat(row) for row in rows if row.results[0].plan],
        "pictures": [{"label": row.label, "pairs": row.results[0].pictures} for row in group.rows if _pictures(row)],
        "environment": group.environment,
        "warnings": list(dict.fromkeys(warning for row in rows for warning in row.warnings)),
    }


def _pictures(row: Row) -> bool:
    return bool(row.results[0].pictures)


def _table_cells(group: Group, row: Row, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (text, what it is sorted by)."""
    texts = columns(group, row)
    for name in names:
        value = _FIGURES[name][0](row) if name in _FIGURES else row.metrics.get(name)
        yield texts.get(name, "-"), texts[name] if name == "configuration" else _sortable(value)
    for cost in ("MACs", "wall time"):
        text = against(group, row, cost)
        yield text, text.partition(":")[0]


def _sortable(value: float | None) -> str:
    if value is None:
        return ""
    return repr(float(value)) if math.isfinite(value) else "1e99"


@dataclass(frozen=True)
class _Axis:
    """Place values between two ends of a line of pixels."""

    name: str
    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        width = self.high - self.low or 1.0
        return round(self.start + (value - self.low) / width * (self.stop - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return pixels and texts of five marks."""
        values = [self.low + (self.high - self.low) * part / 4 for part in range(5)]
        return [(self.at(value), f"{value:.3g}") for value in values]


def _plots(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield a plot of quality over speed for each pair of axes that has values."""
    speeds = {"times faster (wall time)": "faster", "times fewer MACs": "fewer"}
    qualities = {"PSNR to uncached (dB)": "psnr", "images that show their caption": "shown"}
    for speed, across in speeds.items():
        for quality, up in qualities.items():
            points = [(getattr(row, across), getattr(row, up), row) for row in rows]
            known = [(x, y, row) for x, y, row in points if y is not None and math.isfinite(y)]
            if known:
                yield _plot(speed, quality, known)


def _plot(speed: str, quality: str, points: Sequence[tuple[float, float, Row]]) -> dict[str, Any]:
    wide = [x for x, _, _ in points]
    high = [y for _, y, _ in points]
    across = _Axis(speed, min(wide), max(wide), _MARGIN, _WIDTH - 16)
    up = _Axis(quality, min(high), max(high), _HEIGHT - _MARGIN, 16)
    front = [(x, y) for x, y, _ in points if not any(_beats((u, v), (x, y)) for u, v, _ in points)]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "across": across,
        "up": up,
        "points": [(across.at(x), up.at(y), str(row.cell.method.value), row.label) for x, y, row in points],
        "front": " ".join(f"{across.at(x)},{up.at(y)}" for x, y in sorted(front)),
    }


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def _heat(row: Row) -> dict[str, Any]:
    plan: dict[str, Any] = row.results[0].plan or {}
    lines = [(name, kind, [(mark, _SWITCHES[mark]) for mark in marks]) for name, kind, marks in plan["sites"]]
    return {"label": row.label, "branches": plan["branches"], "lines": lines}

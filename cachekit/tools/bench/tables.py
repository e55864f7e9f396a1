"""Tables of results: titles, the texts of rows, legends, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.figures import FIGURES, decimals
from cachekit.tools.bench.summary import Group, Row

__all__ = ["CONFIGURATION", "EQUAL_COST", "EQUAL_LEGEND", "headings", "learned", "legend", "markdown", "texts", "title"]

#: The heading of the first column.
CONFIGURATION = "configuration"
#: The columns that compare a row with plain steps, and the cost that is equal.
EQUAL_COST = {"plain steps at equal MACs": "MACs", "plain steps at equal wall time": "wall time"}
EQUAL_LEGEND = (
    "Plain steps at equal cost: the number of steps, with the spacing whose images are most similar to the uncached"
    " ones, their PSNR, how much of that is due to the spacing, and their caption match, with that of another spacing"
    " where it is higher."
)


def title(group: Group) -> str:
    """All that the rows of a group share."""
    cell = group.cell
    size = f"{cell.width or 'own'} x {cell.height or 'own'} pixels" if cell.width or cell.height else ""
    words = [cell.model, cell.scheduler, f"{cell.uncached_steps} steps", cell.dtype or "", cell.device or "", size]
    return ", ".join(word for word in (*words, f"compiled by {cell.compiled}" if cell.compiled else "") if word)


def headings(keys: Iterable[str]) -> list[str]:
    """Headings of figures, by their keys."""
    return [FIGURES[key].name for key in keys]


def learned(rows: Iterable[Row]) -> list[str]:
    """Names of the learned metrics that rows have."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def texts(group: Group, row: Row) -> dict[str, str]:
    """Texts of a row by heading; a dash is not known."""
    return {
        CONFIGURATION: row.label,
        **{figure.name: figure.text(row) for figure in FIGURES.values()},
        **{name: decimals(value) for name, value in row.metrics.items()},
        **{name: _plain_steps(group, row, cost) for name, cost in EQUAL_COST.items()},
    }


def _plain_steps(group: Group, row: Row, cost: str) -> str:
    """Plain steps that cost as much as a row: how many, how they are spaced, and the quality that they reach."""
    if row.cell.method is Method.PLAIN:
        return "-"
    steps = row.plain_steps()[cost]
    plain = group.best_plain(steps)
    if plain is None or plain.psnr is None:
        return str(steps)
    gain = group.gain_by_spacing(steps)
    part = f" ({gain:.1f} by spacing)" if gain else ""
    spelled = f", {plain.cell.spelled}" if plain.cell.spacing else ""
    unit = " dB" if isfinite(plain.psnr) else ""
    return f"{steps}{spelled}: {FIGURES['psnr'].format(plain.psnr)}{unit}{part}{_match(plain, group.best_match(steps))}"


def _match(plain: Row, best: Row | None) -> str:
    """Caption match of plain steps, and that of another spacing where it is higher."""
    if plain.caption_match is None or best is None or best.caption_match is None:
        return ""
    text = FIGURES["caption_match"].format
    higher = f" ({text(best.caption_match)} with {best.cell.spelled or 'the own spacing'})"
    return f", {text(plain.caption_match)} match" + (higher if best.caption_match > plain.caption_match else "")


def legend(names: Iterable[str]) -> str:
    """Explain the figures under these headings, in one line."""
    shown = set(names)
    found = [
        f"{figure.name}: {figure.meaning}" for figure in FIGURES.values() if figure.name in shown and figure.meaning
    ]
    return "; ".join(found) + "."


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Write a Markdown table, whose first `left` columns are aligned left and the others right."""
    rule = [*["---"] * left, *["---:"] * (len(header) - left)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))

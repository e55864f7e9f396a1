"""Tables of how far calibrations carry, and sentences on them, from the stored results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cachekit.tools.bench.tables import markdown

from .calibrations import NAMES
from .carry import AIM, AIMED, COUNT, LONG_COUNT, PARTS, PLAIN, TOWARDS_OWN, stored

#: How far in dB two medians may lie apart and still be called equal.
EQUAL = 1.0
#: The figures of a cell of the table, in order.
FIGURES = ("carried", "own", "forecast", "plain")

Rows = Sequence[Mapping[str, Any]]


def uses() -> str:
    """Table of the uses of calibrations, and what it shows."""
    rows = _part("uses")
    if not rows:
        return ""
    columns = list(dict.fromkeys((row["model"], row["scheduler"]) for row in rows))
    lines = [[name, *(_cell(rows, name, column) for column in columns), _refused(rows, name)] for name in PARTS["uses"]]
    table = markdown(["used for", *(_title(*column) for column in columns), "the file as it is"], lines)
    legend = (
        "Each cell: the calibration, one made for this use, `forecast`, and the best spaced plain steps of as many"
        f" calls. Median PSNR in dB to uncached images, of {COUNT} prompts each."
    )
    return "\n\n".join([table.rstrip(), legend, " ".join(_reading(rows))])


def longer() -> str:
    """Table of longer runs, and whether fewer calls of them come nearer to many steps than half of the steps."""
    rows = _part("longer")
    columns = list(dict.fromkeys((row["model"], row["scheduler"]) for row in rows))
    if not rows:
        return ""
    lines = []
    for name in PARTS["longer"]:
        found = [_find(rows, name, column) for column in columns]
        calls = next((str(row["calls"]) for row in found if row), "-")
        lines.append([name, calls, *(f"{row['psnr']:.1f}" if row else "-" for row in found)])
    table = markdown(["run", "calls", *(_title(*column) for column in columns)], lines)
    verdicts = [_nearer(rows, name, columns) for name in (TOWARDS_OWN, AIMED)]
    return f"{table}\n{' '.join(filter(None, verdicts))}"


def batches() -> str:
    """Sentence on images of one call and of several."""
    rows = _part("batch")
    if not rows:
        return ""
    greatest, count = max(row["difference"] for row in rows), rows[0]["images"]
    unit = 10.0 ** math.floor(math.log10(greatest))
    return (
        f"{count} images drawn in one call differ from the same images drawn one by one by at most"
        f" {math.ceil(greatest / unit) * unit:.0e}, where values go from 0 to 1."
    )


def _part(name: str) -> Rows:
    return [row for row in stored() if row["part"] == name]


def _title(model: str, scheduler: str) -> str:
    return f"{NAMES[model]}, {NAMES[scheduler]}"


def _find(rows: Rows, name: str, column: tuple[str, str]) -> Mapping[str, Any] | None:
    return next((row for row in rows if (row["name"], row["model"], row["scheduler"]) == (name, *column)), None)


def _cell(rows: Rows, name: str, column: tuple[str, str]) -> str:
    row = _find(rows, name, column)
    return " / ".join("-" if row[key] is None else f"{row[key]:.1f}" for key in FIGURES) if row else "-"


def _refused(rows: Rows, name: str) -> str:
    found = {bool(row["refused"]) for row in rows if row["name"] == name}
    return " or ".join("refused" if refused else "works" for refused in sorted(found)) or "-"


# -- sentences ---------------------------------------------------------------------------------------------


def _reading(rows: Rows) -> Iterable[str]:
    """Yield sentences on the uses: worse than what is made for them, and worse than plain steps."""
    off = {name: _worst(rows, name, "own") for name in PARTS["uses"]}
    known = {name: value for name, value in off.items() if value is not None}
    worse = [f"{name} (by up to {value:.1f} dB)" for name, value in known.items() if value > EQUAL]
    yield f"More than {EQUAL:g} dB below a calibration made for the use: {'; '.join(worse) or 'none'}."
    beaten = [name for name in PARTS["uses"] if (_worst(rows, name, "plain") or 0) > 0]
    yield f"Plain steps are nearer in some column: {'; '.join(beaten) or 'nowhere'}."
    moved = [(row["name"].partition(",")[0], row["changed"]) for row in rows if "changed" in row]
    names = dict.fromkeys(name for name, _ in moved)
    spans = [f"{name} {_span([value for other, value in moved if other == name])}" for name in names]
    if spans:
        yield (
            "The LoRAs are random, of rank 4, in all attention; the number is the norm of what they add relative to the"
            f" weight's. PSNR in dB between uncached images with and without: {', '.join(spans)}."
        )


def _worst(rows: Rows, name: str, rival: str) -> float | None:
    """How far the calibration lies below a rival at most, in dB; None where it wasn't measured."""
    found = [row for row in rows if row["name"] == name and row[rival] is not None]
    return max((row[rival] - row["carried"] for row in found), default=None)


def _span(values: Sequence[float]) -> str:
    ends = dict.fromkeys((f"{min(values):.1f}", f"{max(values):.1f}"))
    return " to ".join(ends)


def _nearer(rows: Rows, name: str, columns: Sequence[tuple[str, str]]) -> str:
    pairs = [(_find(rows, name, column), _find(rows, f"{PLAIN} uncached steps", column)) for column in columns]
    leads = [one["psnr"] - other["psnr"] for one, other in pairs if one and other]
    if not leads:
        return ""
    won = sum(lead > 0 for lead in leads)
    where = "in all columns" if won == len(leads) else f"in {won} of {len(leads)} columns"
    ends = f"{min(leads):+.1f} to {max(leads):+.1f}" if len(leads) > 1 else f"{leads[0]:+.1f}"
    return (
        f"{name}: nearer to {AIM} uncached steps than {PLAIN} uncached steps are {where}, by {ends} dB"
        f" ({LONG_COUNT} captions)."
    )

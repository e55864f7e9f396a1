"""Amounts as text, and small tables of them for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def size(value: float) -> str:
    """Format a number of bytes.

    >>> size(0), size(640), size(32_768), size(3_500_000), size(2**31)
    ('0', '640 bytes', '32 KiB', '3.3 MiB', '2.0 GiB')
    """
    if not value:
        return "0"
    if value < 1 << 10:
        return f"{value:.0f} bytes"
    if value < 1 << 20:
        return f"{value / (1 << 10):.0f} KiB"
    return f"{value / (1 << 20):.1f} MiB" if value < 1 << 30 else f"{value / (1 << 30):.1f} GiB"


def macs(value: float) -> str:
    """Format a number of multiply-accumulates.

    >>> macs(912), macs(12_722_000_000), macs(5_993_000_000_000)
    ('912 MACs', '12.72 GMACs', '5.993 TMACs')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}MACs"
    return f"{value:.0f} MACs"


def table(rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Write a table as HTML; every text is escaped."""
    lines = [_row(row, "td") for row in rows]
    head = [_row(header, "th")] if header else []
    return "\n".join(["<table>", *head, *lines, "</table>"])


def _row(cells: Sequence[object], tag: str) -> str:
    inside = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"

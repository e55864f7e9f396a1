"""What the grid of the embedded model of four steps says, in sentences."""

from __future__ import annotations

from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.results import read
from cachekit.tools.bench.summary import Row, groups

from .ship import RESULTS

_GATES = ("tgate:m=1", "tgate:m=2")
_FEWER = "3 plain steps"
#: Forecasts and plain steps of equal MACs.
_EQUAL = (
    ("forecast", "forecast:order=0,of=x0", _FEWER),
    ("forecast:interval=3", "forecast:interval=3,order=0,of=x0", "2 plain steps"),
)


def gates() -> str:
    """Compare a step less with gates."""
    rows = _rows()
    fewer, uncached = rows[_FEWER], next(row for row in rows.values() if row.cell.specs)
    before = sum(bool(sample.uncached_shown) for sample in uncached.samples) / len(uncached.samples)
    return (
        f"A step less beside gates: {_line(fewer)}; "
        + "; ".join(_line(rows[spec]) for spec in _GATES)
        + f"; all four steps without a policy {100 * before:.0f} %."
    )


def forecasts() -> str:
    """Compare forecasts of lines and of the last x0 with fewer steps."""
    rows = _rows()
    return "\n\n".join(
        "At equal MACs: "
        + "; ".join(f"{_line(rows[name])}, {FIGURES['psnr'].text(rows[name])} dB" for name in names)
        + "."
        for names in _EQUAL
    )


def _rows() -> dict[str, Row]:
    """Read the rows by label; of several sittings, each has rows of its own."""
    return {row.label: row for group in groups(read(RESULTS / "demo-lcm.jsonl")[0]) for row in group.rows}


def _line(row: Row) -> str:
    name = f"`{row.label}`" if row.cell.specs else row.label
    macs, match = (FIGURES[figure].text(row) for figure in ("mac_reduction", "caption_match"))
    return f"{name}, MAC reduction {macs}, caption match {match}"

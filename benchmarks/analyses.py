"""Tables of `cachekit analyze` on the embedded models, and what they show in a sentence.

The tables of a model are a page that the command wrote, part by part. The mean of the predicted noise is kept as
`analysis.json` of a run of that part alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from cachekit.tools.analysis.comparing import TEXT_FIRST, gates
from cachekit.tools.analysis.noise import HEADER, TITLE, order, rows
from cachekit.tools.bench.tables import markdown

from .ship import RESULTS

_TEXT_LAST = "null_text:before="


def tables(model: str) -> str:
    """Tables that the command wrote for an embedded model."""
    source = RESULTS / f"analysis-{model}.md"
    return source.read_text() if source.exists() else ""


def noise(model: str) -> str:
    """Table of the mean of the predicted noise, with the command line, seed and versions it is from."""
    source = RESULTS / f"analysis-{model}-noise.json"
    if not source.exists():
        return ""
    data = json.loads(source.read_text())
    made, found = data["settings"], data["noise"]
    (gate,) = gates(made["steps"])[-1:]
    used = made["environment"]
    return (
        f"`cachekit analyze {model} --captions {len(made['captions'])} --only noise`, {made['steps']} steps, seed"
        f" {made['seed']}, cachekit {used['cachekit']}, torch {used['torch']}, diffusers {used['diffusers']}:\n\n"
        f"**{TITLE}**\n\n{markdown(HEADER, rows(found, gate))}\n- {order(found, gate)}"
    )


def read(model: str) -> str:
    """Say what the tables show of cross-attention, and of the text in a part of the steps."""
    cells = [*_cells(tables(model))]
    changes = next((row[2:5] for row in cells if row[0] == "cross_attention"), None)
    if changes is None:
        return ""
    start, middle, end = (f"{100 * float(change.split()[0]):.1f} %" for change in changes)
    early, late = (_matches(cells, prefix) for prefix in (TEXT_FIRST, _TEXT_LAST))
    return (
        f"Cross-attention changes by {start} of its norm after the first step, by {middle} half way and by {end} in the"
        f" last step. Text before a gate alone shows {_range(early)} of the captions, text from the gate on alone"
        f" {_range(late)}."
    )


def _cells(page: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables of a page."""
    for line in page.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def _matches(cells: list[list[str]], prefix: str) -> list[int]:
    """List the caption matches of the specs that begin so, in per cent."""
    return [int(row[4].partition("%")[0]) for row in cells if row[0].startswith(prefix)]


def _range(shares: list[int]) -> str:
    least, most = min(shares), max(shares)
    return f"{least} %" if least == most else f"{least} to {most} %"

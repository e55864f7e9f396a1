"""Images with the text in some steps alone, and of TGATE, beside uncached ones (arXiv 2404.02747, tables 1 to 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from cachekit.errors import CachekitError
from cachekit.tools.bench.cells import BenchError, Cell, Setting
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.suite import Suite
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.bench.workbench import Contender, Workbench

#: The papers' gates, at 25 steps (table 1).
GATES = (3, 5, 10)
#: The papers' lengths of runs, and the gate at each (table 2).
LENGTHS = {15: 6, 25: 10, 50: 20, 100: 25}
#: The papers' schedulers (tables 3 and 8).
SCHEDULERS = ("EulerDiscrete", "DPMSolverMultistep", "DDIM")
#: The beginnings of the specs that have text in the first steps alone, and of TGATE's.
TEXT_FIRST, GATED = "null_text:after=", "tgate:m="
_STEPS = 25
#: The figures that images are compared by: 1 where more is better, -1 where less is.
_SIGNS = {"caption_match": 1, "frechet": -1, "psnr": 1}


def gates(steps: int) -> list[int]:
    """List the papers' gates, at the same share of a run of `steps`; without those outside the run."""
    found = dict.fromkeys(round(gate * steps / _STEPS) for gate in GATES)
    return [gate for gate in found if 0 < gate < steps]


def first(gate: int) -> str:
    """Make the spec of S^F: text before the gate alone."""
    return f"{TEXT_FIRST}{gate}"


def last(gate: int) -> str:
    """Make the spec of S^L: text from the gate on."""
    return f"null_text:before={gate}"


def cell_of(setting: Setting, steps: int, seed: int) -> Cell:
    """Make a cell of the model's own scheduler, of which the others differ in specs, steps and scheduler."""
    (cell,) = Suite(setting, [()], steps=(steps,), seeds=(seed,), peers=False).cells()
    return cell


def compared(bench: Workbench, cell: Cell, specs: Iterable[str]) -> Group:
    """Measure specs beside the uncached pipeline; those that don't fit the model are left out with the reason.

    Raises `BenchError` where none of them fits.
    """
    contenders: list[Contender] = []
    left_out: list[str] = []
    for spec in specs:
        own = cell.model_copy(update={"specs": (spec,)})
        try:
            contenders.append(bench.prepare(own))
        except CachekitError as error:
            left_out.append(f"{own.label} is left out: {error}")
    if not contenders:
        raise BenchError(left_out[0])
    return Group([Row(result.cell, [result]) for result in bench.measure(contenders)], left_out)


def orders(group: Group) -> list[dict[str, Any]]:
    """Compare the order of images with that of the papers, by each figure that was measured.

    In the papers S^F is at least as good as S, and better than S^L; TGATE is at least as good as its base. Caption
    match is better where it is higher, the Frechet distance where it is lower. PSNR to S is of S^F and S^L alone.
    """
    rows = {row.cell.specs[0]: row for row in group.rows}
    found: list[dict[str, Any]] = []
    for spec, row in rows.items():
        if spec.startswith(TEXT_FIRST):
            found += _orders({"base": group.uncached, "row": row, "text_last": rows.get(last(_gate_of(spec)))}, row)
        elif spec.startswith(GATED):
            found += _orders({"base": group.uncached, "row": row}, row)
    return found


def _gate_of(spec: str) -> int:
    return int(spec.partition("=")[2])


def _orders(named: dict[str, Row | None], row: Row) -> Iterator[dict[str, Any]]:
    """Yield, for each figure, those of the base, of a row and of S^L, and whether they are in the papers' order."""
    known = {key: one for key, one in named.items() if one is not None}
    for figure, sign in _SIGNS.items():
        values = {key: getattr(one, figure) for key, one in known.items() if (figure, key) != ("psnr", "base")}
        if len(values) < 2 or any(value is None or math.isinf(value) for value in values.values()):
            continue
        good = {key: sign * value for key, value in values.items()}
        holds = good["row"] >= good.get("base", good["row"]) and good["row"] > good.get("text_last", -math.inf)
        yield {
            "spec": row.cell.specs[0],
            "scheduler": row.cell.scheduler,
            "steps": row.cell.steps,
            "figure": figure,
            **values,
            "is_tie": len(set(values.values())) == 1,
            "is_papers_order": holds,
        }


def verdicts(found: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Say of each spec by which figures the papers' order holds, by which it does not, and by which all are equal."""
    said: dict[str, dict[str, list[str]]] = {}
    for order in found:
        verdict = "tie" if order["is_tie"] else "yes" if order["is_papers_order"] else "no"
        figure = FIGURES[order["figure"]].name
        said.setdefault(order["spec"], {}).setdefault(verdict, []).append(figure)
    return {
        spec: "; ".join(f"{verdict}: {', '.join(one[verdict])}" for verdict in ("yes", "no", "tie") if verdict in one)
        for spec, one in said.items()
    }

"""Images with the text in some steps alone, and of TGATE, beside uncached ones (arXiv 2404.02747, tables 1 to 8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cachekit.bench.cells import BenchError, Cell, Setting
from cachekit.bench.suite import Suite
from cachekit.bench.summary import Group, Row
from cachekit.bench.workbench import Contender, Workbench
from cachekit.errors import CachekitError

#: The papers' gates, at 25 steps (table 1).
GATES = (3, 5, 10)
#: The papers' lengths of runs, and the gate at each (table 2).
LENGTHS = {15: 6, 25: 10, 50: 20, 100: 25}
#: The papers' schedulers (tables 3 and 8).
SCHEDULERS = ("EulerDiscrete", "DPMSolverMultistep", "DDIM")
_STEPS = 25


def gates(steps: int) -> list[int]:
    """List the papers' gates, at the same share of a run of `steps`; without those outside the run."""
    found = dict.fromkeys(round(gate * steps / _STEPS) for gate in GATES)
    return [gate for gate in found if 0 < gate < steps]


def first(gate: int) -> str:
    """Make the spec of S^F: text before the gate alone."""
    return f"null_text:after={gate}"


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

    In the papers S^F is at least as good as S, and S^L worse than S; TGATE is at least as good as its base. Caption
    match is better where it is higher, the Frechet distance where it is lower.
    """
    rows = {row.cell.specs[0]: row for row in group.rows}
    found = []
    for spec in rows:
        if spec.startswith(("null_text:after", "tgate")):
            other = rows.get(last(int(spec.partition("=")[2]))) if spec.startswith("null_text") else None
            found += [*_orders(group.uncached, spec, rows[spec], other)]
    return found


def _orders(base: Row, spec: str, row: Row, other: Row | None) -> Iterable[dict[str, Any]]:
    """Yield the figures of the base, of the row, and of S^L where there is one, for each figure."""
    for name, sign in (("caption_match", 1), ("frechet", -1)):
        named = {"base": base, "row": row, **({"text_last": other} if other else {})}
        values = {key: getattr(one, name) for key, one in named.items()}
        if any(value is None for value in values.values()):
            continue
        good = {key: sign * value for key, value in values.items()}
        yield {
            "spec": spec,
            "scheduler": row.cell.scheduler,
            "steps": row.cell.steps,
            "figure": name,
            **values,
            "as_good_as_base": good["row"] >= good["base"],
            **({"better_than_text_last": good["row"] > good["text_last"]} if other else {}),
        }


def as_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Write orders as lines, for the console."""
    lines = []
    for order in found:
        values = f"{order['base']:.3f} uncached, {order['row']:.3f} {order['spec']}"
        last_values = f", {order['text_last']:.3f} text from there on" if "text_last" in order else ""
        agrees = order["as_good_as_base"] and order.get("better_than_text_last", True)
        verdict = "the papers' order" if agrees else "not the papers' order"
        name = order["figure"].replace("_", " ")
        lines.append(f"{order['scheduler']}, {order['steps']} steps, {name}: {values}{last_values}: {verdict}")
    return lines

"""The bench on the embedded model: all configurations side by side, with the plain pipeline at the cost of the best.

A preset of the bench: the cells, measurements and figures are those of any other suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachekit.bench.cells import Cell, Method, Setting, digest
from cachekit.bench.figures import FIGURES
from cachekit.bench.measuring import Configuration, steps_at
from cachekit.bench.results import Result, Sample
from cachekit.bench.suite import Suite
from cachekit.bench.summary import Group, Row
from cachekit.bench.tables import CONFIGURATION, headings, legend, markdown, texts
from cachekit.bench.workbench import Workbench
from cachekit.interface.specs import parse_all
from cachekit.registry.catalog import installed

__all__ = ["HEADER", "LEGEND", "cells", "compare", "equal_cost", "from_json", "measure", "page", "table", "to_json"]

MODEL = "demo"
HEADER = (
    CONFIGURATION,
    *headings(("seconds", "speedup", "macs", "mac_reduction", "psnr", "ssim", "caption_match", "cache_bytes")),
)
LEGEND = f"{legend(HEADER)} The last row spends on plain steps what the cheapest composed row costs."

#: The figures of an image in JSON, which are fields of a sample.
_IMAGE = ("seconds", "macs", "cache_bytes", "psnr", "ssim", "shown")

#: Called after each run with the number of runs done and of all runs.
Progress = Callable[[int, int], None]


def cells(configurations: Sequence[Configuration], captions: Sequence[str], seed: int) -> tuple[Setting, list[Cell]]:
    """List the cells of cached configurations with the same number of steps, and the setting that measures them.

    Raises a `CachekitError` where a spec is wrong or does not fit the model.
    """
    # On a busy machine threads wait for each other, and that would be measured instead of the policies.
    setting = Setting(model=MODEL, captions=tuple(captions), device="cpu", threads=1, pictures=len(captions))
    catalog = installed()
    compositions = [parse_all(configuration.specs, catalog) for configuration in configurations]
    suite = Suite(setting, compositions, steps=(configurations[0].steps,), seeds=(seed,), peers=False)
    # Tables show specs as they were given, and not as policies write them.
    named = zip(suite.cells(), configurations)
    return setting, [cell.model_copy(update={"specs": configuration.specs}) for cell, configuration in named]


def measure(setting: Setting, chosen: Sequence[Cell], progress: Progress) -> Group:
    """Measure the cells of a setting, and the plain pipeline at the cost of the cheapest composed one."""
    # The uncached pipeline and each cached one are warmed up once, the plain one twice: to be counted and to be timed.
    total, done = 1 + len(chosen) + 2 + (len(chosen) + 2) * len(setting.captions), 0

    def ran() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return compare(Workbench(setting, ran=ran), chosen)


def compare(bench: Workbench, chosen: Sequence[Cell]) -> Group:
    """Measure cells side by side on a bench, and the plain pipeline at the cost of the cheapest composed one.

    All run once before anything is timed, and then take turns caption by caption.
    """
    contenders = [bench.prepare(cell) for cell in chosen]
    costs = {contender.cell: contender.first.macs for contender in contenders}
    contenders.append(bench.prepare(equal_cost(costs, bench.uncached_macs(chosen[0]))))
    return Group([Row(result.cell, [result]) for result in bench.measure(contenders)])


def equal_cost(costs: Mapping[Cell, int], uncached: int) -> Cell:
    """Cell of plain steps that cost most nearly as much as the best cached cell.

    The best is the cheapest of those that compose several policies, or of all where none does. Costs are MACs, of each
    cell and of the uncached pipeline.
    """
    composed = [cost for cell, cost in costs.items() if len(cell.specs) > 1]
    cell = next(iter(costs))
    return cell.plain(steps_at(min(composed or costs.values()) / uncached, cell.uncached_steps))


# -- how it is shown ---------------------------------------------------------------------------------------


def table(group: Group) -> list[list[str]]:
    """Texts of all rows, in the order of `HEADER`."""
    found = (texts(group, row) for row in (group.uncached, *group.rows))
    return [[text[name] for name in HEADER] for text in found]


def page(group: Group) -> str:
    """Table and its legend as Markdown."""
    return f"{markdown(HEADER, table(group))}\n{LEGEND}\n"


def to_json(group: Group) -> dict[str, Any]:
    """All figures, image by image, as plain data; JSON has no infinity, so an infinite PSNR is null."""
    prompts = [sample.caption for sample in group.uncached.samples]
    return {"prompts": prompts, "rows": [_row(row) for row in (group.uncached, *group.rows)]}


def _row(row: Row) -> dict[str, Any]:
    return {
        "specs": list(row.cell.specs),
        "steps": row.cell.steps,
        **{key: _finite(figure.value(row)) for key, figure in FIGURES.items()},
        "images": [{name: _finite(getattr(sample, name)) for name in _IMAGE} for sample in row.samples],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(data: Mapping[str, Any]) -> Group:
    """Read back what `to_json` wrote, beside the settings of the command; figures are computed from the images."""
    uncached, *rows = data["rows"]
    return Group([Row(result.cell, [result]) for result in (_result(data, row, uncached) for row in rows)])


def _result(data: Mapping[str, Any], row: Mapping[str, Any], uncached: Mapping[str, Any]) -> Result:
    cell = Cell(
        model=MODEL,
        model_hash="",
        method=Method.CACHEKIT if row["specs"] else Method.PLAIN,
        specs=tuple(row["specs"]),
        steps=row["steps"],
        uncached_steps=uncached["steps"],
        scheduler="",
        seed=data["seed"],
        captions=digest(data["prompts"]),
        **dict.fromkeys(("dtype", "device", "compiled", "height", "width", "guidance")),
        metrics=(),
        environment=digest(data["versions"]),
    )
    images = zip(data["prompts"], row["images"], uncached["images"])
    samples = [_sample(caption, image, plain) for caption, image, plain in images]
    return Result(id=cell.id, cell=cell, environment=data["versions"], first_seconds=None, samples=samples)


def _sample(caption: str, image: Mapping[str, Any], plain: Mapping[str, Any]) -> Sample:
    given = {**image, "psnr": math.inf if image["psnr"] is None else image["psnr"]}
    beside = {f"uncached_{name}": plain[name] for name in ("seconds", "macs", "shown")}
    return Sample(caption=caption, **given, **beside)

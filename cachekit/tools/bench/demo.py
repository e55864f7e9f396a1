"""The bench on the embedded model: configurations side by side, with the best plain steps at the cost of each.

A preset of the bench: the cells, measurements and figures are those of any other suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.errors import CachekitError
from cachekit.interface.specs import parse_all
from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import Cell, Method, Setting, digest
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.measuring import Configuration, steps_at
from cachekit.tools.bench.results import Result, Sample
from cachekit.tools.bench.spacing import absent, rivals
from cachekit.tools.bench.suite import Suite
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.bench.tables import CONFIGURATION, EQUAL_COST, EQUAL_LEGEND, headings, legend, markdown, texts
from cachekit.tools.bench.workbench import Contender, Workbench

__all__ = [
    "HEADER",
    "LEGEND",
    "Comparison",
    "compare",
    "comparison",
    "from_json",
    "measure",
    "page",
    "shown",
    "table",
    "to_json",
]

MODEL = "demo"
EQUAL_MACS = next(name for name, cost in EQUAL_COST.items() if cost == "MACs")
HEADER = (
    CONFIGURATION,
    *headings(("macs", "mac_reduction", "seconds", "speedup", "psnr", "caption_match", "ssim", "cache_bytes")),
    EQUAL_MACS,
)
LEGEND = f"{legend(HEADER)} {EQUAL_LEGEND}"

#: The figures of an image in JSON, which are fields of a sample.
_IMAGE = ("seconds", "macs", "cache_bytes", "psnr", "ssim", "shown")

#: Called after each run with the number of runs done and of all runs, 0 where it is not known yet.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """Cells to measure side by side with one setting, and a line for each configuration that is left out before.

    `optional` are specs of cells that are left out where they raise a `CachekitError`.
    """

    setting: Setting
    cells: Sequence[Cell]
    optional: Collection[tuple[str, ...]] = ()
    left_out: Sequence[str] = ()


def comparison(
    configurations: Sequence[Configuration],
    captions: Sequence[str],
    seed: int,
    scheduler: str | None = None,
    optional: Collection[Configuration] = (),
) -> Comparison:
    """List the cells of cached configurations with the same number of steps, and the setting that measures them.

    Raises a `CachekitError` where a spec is wrong or does not fit the model, or a scheduler does not; an `optional`
    configuration is left out with that reason instead.
    """
    # On a busy machine threads wait for each other, and that would be measured instead of the policies.
    setting = Setting(model=MODEL, captions=tuple(captions), device="cpu", threads=1, pictures=len(captions))
    found: list[Cell] = []
    left_out: list[str] = []
    for configuration in configurations:
        try:
            found.append(_cell(setting, configuration, seed, scheduler))
        except CachekitError as error:
            if configuration not in optional:
                raise
            left_out.append(_left_out(configuration.label, error))
    return Comparison(setting, found, [configuration.specs for configuration in optional], left_out)


def _cell(setting: Setting, configuration: Configuration, seed: int, scheduler: str | None) -> Cell:
    policies = parse_all(configuration.specs, installed())
    schedulers, steps = [scheduler] if scheduler else [], (configuration.steps,)
    (cell,) = Suite(setting, [policies], schedulers=schedulers, steps=steps, seeds=(seed,), peers=False).cells()
    # Tables show specs as they were given, and not as policies write them.
    return cell.model_copy(update={"specs": configuration.specs})


def _left_out(label: str, error: CachekitError) -> str:
    return f"{label} is left out: {error}"


def measure(chosen: Comparison, progress: Progress) -> Group:
    """Measure cells beside the uncached pipeline and plain steps at the cost of each; see `compare`."""
    done, total = 0, 0

    def ran() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def prepared(contenders: int) -> None:
        nonlocal total
        total = done + (1 + contenders) * len(chosen.setting.captions)

    group = compare(Workbench(chosen.setting, ran=ran), chosen.cells, chosen.optional, prepared)
    return Group(group.rows, [*chosen.left_out, *group.left_out])


def compare(
    bench: Workbench,
    chosen: Sequence[Cell],
    optional: Collection[tuple[str, ...]] = (),
    prepared: Callable[[int], None] = lambda count: None,
) -> Group:
    """Measure cells side by side on a bench, and plain steps that cost as much, with every spacing.

    All run once before anything is timed, and then take turns caption by caption; `prepared` is called in between with
    the number of contenders. Cells with `optional` specs that raise a `CachekitError` are left out with that reason.
    """
    contenders: list[Contender] = []
    left_out: list[str] = []
    for cell in chosen:
        try:
            contenders.append(bench.prepare(cell))
        except CachekitError as error:
            if cell.specs not in optional:
                raise
            left_out.append(_left_out(cell.label, error))
    contenders += [bench.prepare(cell) for cell in _plain_cells(bench, contenders)]
    prepared(len(contenders))
    return Group([Row(result.cell, [result]) for result in bench.measure(contenders)], left_out)


def _plain_cells(bench: Workbench, contenders: Sequence[Contender]) -> list[Cell]:
    wanted = []
    for contender in contenders:
        cell = contender.cell
        steps = steps_at(contender.first.macs / bench.uncached_macs(cell), cell.uncached_steps)
        wanted.append((cell, steps, bench.plan(cell, cell.specs, cell.steps)))
    return [cell for cell in rivals(wanted) if not absent(cell)]


# -- how it is shown ---------------------------------------------------------------------------------------


def shown(group: Group) -> list[Row]:
    """Rows of the table: cached ones, and then the best spacing of each number of plain steps, most steps first."""
    cached = [row for row in group.rows if row.cell.method is not Method.PLAIN]
    steps = {row.cell.steps for row in group.rows if row.cell.method is Method.PLAIN}
    best = (group.best_plain(count) for count in sorted(steps, reverse=True))
    return [*cached, *(row for row in best if row is not None)]


def table(group: Group) -> list[list[str]]:
    """Texts of the uncached row and of those shown, in the order of `HEADER`."""
    found = (texts(group, row) for row in (group.uncached, *shown(group)))
    return [[text[name] for name in HEADER] for text in found]


def page(group: Group) -> str:
    """Table, its legend and its notes as Markdown."""
    return "\n\n".join([markdown(HEADER, table(group)).rstrip(), LEGEND, *group.notes]) + "\n"


def to_json(group: Group) -> dict[str, Any]:
    """All figures, image by image, as plain data; JSON has no infinity, so an infinite PSNR is null."""
    return {
        "scheduler": group.cell.scheduler,
        "prompts": [sample.caption for sample in group.uncached.samples],
        "left_out": group.left_out,
        "rows": [_row(row) for row in (group.uncached, *group.rows)],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "specs": list(row.cell.specs),
        "steps": row.cell.steps,
        "spacing": row.cell.spacing,
        "plan": row.results[0].plan,
        **{key: _finite(figure.value(row)) for key, figure in FIGURES.items()},
        "images": [{name: _finite(getattr(sample, name)) for name in _IMAGE} for sample in row.samples],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(data: Mapping[str, Any]) -> Group:
    """Read back what `to_json` wrote, beside the settings of the command; figures are computed from the images."""
    uncached, *rows = data["rows"]
    results = [_result(data, row, uncached) for row in rows]
    return Group([Row(result.cell, [result]) for result in results], data["left_out"])


def _result(data: Mapping[str, Any], row: Mapping[str, Any], uncached: Mapping[str, Any]) -> Result:
    cell = Cell(
        model=MODEL,
        model_hash="",
        method=Method.CACHEKIT if row["specs"] else Method.PLAIN,
        specs=tuple(row["specs"]),
        steps=row["steps"],
        spacing=row["spacing"],
        uncached_steps=uncached["steps"],
        scheduler=data["scheduler"],
        seed=data["seed"],
        captions=digest(data["prompts"]),
        **dict.fromkeys(("dtype", "device", "compiled", "height", "width", "guidance")),
        metrics=(),
        environment=digest(data["versions"]),
    )
    images = zip(data["prompts"], row["images"], uncached["images"])
    samples = [_sample(caption, image, plain) for caption, image, plain in images]
    return Result(
        id=cell.id, cell=cell, environment=data["versions"], first_seconds=None, samples=samples, plan=row["plan"]
    )


def _sample(caption: str, image: Mapping[str, Any], plain: Mapping[str, Any]) -> Sample:
    given = {**image, "psnr": math.inf if image["psnr"] is None else image["psnr"]}
    beside = {f"uncached_{name}": plain[name] for name in ("seconds", "macs", "shown")}
    return Sample(caption=caption, **given, **beside)

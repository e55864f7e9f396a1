"""`cachekit bench grid`: costs and quality of grids of policies on any pipeline."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.demo import SPECS
from cachekit.cli.imaging import ImagingSettings
from cachekit.cli.models import any_model, complete_any, warn_of_shapes
from cachekit.cli.output import choice, json_results, print_table, progress_bar, say, warn
from cachekit.cli.settings import command
from cachekit.errors import CachekitError
from cachekit.files import unwritable_reason
from cachekit.models.names import EMBEDDED
from cachekit.tools.workers import EXECUTORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachekit.tools.bench.best import Best, Condition
    from cachekit.tools.bench.results import Result, Results
    from cachekit.tools.bench.suite import Suite
    from cachekit.tools.bench.summary import Group

_BEST = (
    "Name the cheapest spec that fulfils conditions on columns of the table, such as 'PSNR>=35,speedup>=2';"
    " exit code 1 where none does."
)
_MODELS = f"Folders or hub ids of pipelines, {EMBEDDED}, or architectures such as sd15, for times alone."
#: The figures of the two tables, by their keys.
_COST = ("seconds", "spread", "first_seconds", "speedup", "macs", "mac_reduction", "cache_bytes", "deciding_seconds")
_QUALITY = ("psnr", "ssim", "caption_match", "frechet")


@dataclass(frozen=True, kw_only=True)
class GridSettings(ImagingSettings):
    """Options of `cachekit bench grid`."""

    models: Annotated[list[str], typer.Argument(help=_MODELS, parser=any_model, autocompletion=complete_any)] = field(
        default_factory=list
    )
    peers: Annotated[bool, typer.Option(help="Measure other packages that are installed too.")] = True
    executor: Annotated[str, typer.Option(help="Where cells are measured.", **choice(EXECUTORS, "executor"))] = "serial"
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes or actors; default: one per GPU, or two without a GPU.")
    ] = None
    output: Annotated[Path, typer.Option(help="Results file, which is read first and appended to.")] = Path(
        "bench.jsonl"
    )
    merge: Annotated[list[Path], typer.Option(help="Add the results of another file; may be repeated.")] = field(
        default_factory=list
    )
    html: Annotated[Path | None, typer.Option(help="Write a report to this HTML page.")] = None
    best: Annotated[str | None, typer.Option(metavar="CONDITION", help=_BEST)] = None


@command(GridSettings)
def grid(settings: GridSettings) -> None:
    """Measure each composition of policies beside the uncached pipeline, and report.

    An interrupted run is resumed: cells that the results file holds are not measured again. Without MODELS the command
    only reports. Metrics: lpips (weights of AlexNet) and clip (folder of a CLIP model).
    """
    with json_results(settings.json) as give:
        conditions = _conditions(settings)
        results = _open(settings)
        suites = [_suite(model, settings) for model in settings.models]
        try:
            failures = [failure for suite in suites for failure in _measure(suite, results)]
        except KeyboardInterrupt:
            typer.echo(f"stopped: {len(results.all)} results are kept in {settings.output}; to go on:", err=True)
            typer.echo(f"  {shlex.join(['cachekit', *sys.argv[1:]])}", err=True)
            raise typer.Exit(130) from None
        for model in settings.models:
            warn_of_shapes(settings.captions, model)
        listed = _report(results.all, settings.html)
        bests = [found for group in listed if (found := best_row(group, conditions))]
        give({"groups": [_data(group) for group in listed], "best": [_best_data(one) for one in bests]})
    missed = bool(conditions) and not any(one.fulfils for one in bests)
    if failures or missed:
        raise typer.Exit(1)


def _conditions(settings: GridSettings) -> list[Condition]:
    from cachekit.tools.bench.best import parse_conditions
    from cachekit.tools.bench.quality import METRICS

    return parse_conditions(settings.best, list(METRICS)) if settings.best is not None else []


def best_row(group: Group, conditions: Sequence[Condition]) -> Best | None:
    """Print the cheapest row of a group that fulfils conditions, or the nearest, and the line to paste."""
    from cachekit.tools.bench.best import best_of

    found = best_of(group, conditions) if conditions else None
    if found is None:
        return None
    cell = found.row.cell
    where = f"{cell.model}, {cell.scheduler}, {cell.uncached_steps} steps"
    asked = " and ".join(one.text for one in conditions)
    if not found.fulfils:
        say(f"no spec fulfils {asked} on {where}; nearest: {found.row.label} ({found.figures})")
        return found
    say(f"best with {asked} on {where}: {found.row.label} ({found.figures})")
    say(f"  {found.code}")
    if found.plain is not None:
        warn(f"{found.plain.label} fulfils it too, and costs less")
    return found


def _open(settings: GridSettings) -> Results:
    """Open the results file and merge others; a file that cannot be read or written is refused before any run."""
    from cachekit.tools.bench.cells import BenchError
    from cachekit.tools.bench.results import Results, read

    merged, html = [read(path) for path in settings.merge], settings.html
    if html is not None and (reason := unwritable_reason(html)):
        raise BenchError(f"cannot write {str(html)!r}: {reason}")
    results = Results(settings.output)
    for problem in (*results.problems, *(problem for _, problems in merged for problem in problems)):
        typer.echo(f"warning: {problem}", err=True)
    added = results.add(result for found, _ in merged for result in found)
    if merged:
        say(f"merged {added} results into {settings.output}")
    return results


def _suite(model: str, settings: GridSettings) -> Suite:
    from cachekit.tools.bench.quality import METRICS
    from cachekit.tools.bench.suite import Suite, fitting
    from cachekit.tools.workers import check_executor, default_workers, threads_of

    compositions = settings.parse_specs(SPECS)
    check_executor(settings.executor)
    setting = settings.setting(model, METRICS)
    threads = setting.threads or threads_of(settings.executor, settings.workers)
    return Suite(
        setting=setting.model_copy(update={"threads": threads}),
        compositions=compositions if settings.spec else fitting(model, compositions),
        schedulers=settings.scheduler,
        steps=settings.steps,
        seeds=settings.seed,
        peers=settings.peers,
        executor=settings.executor,
        workers=settings.workers or default_workers(settings.executor),
    )


def _measure(suite: Suite, results: Results) -> list[str]:
    from cachekit.tools.bench.suite import measure_suite

    with progress_bar(f"{suite.setting.model}, images") as show:
        return measure_suite(
            suite, results, lambda done, total, failure: show(done, total, failure and f"not measured: {failure}")
        )


def _report(found: list[Result], html: Path | None) -> list[Group]:
    from cachekit.tools.bench.page import write_page
    from cachekit.tools.bench.summary import groups

    if not found:
        raise CachekitError("there is nothing to report: name models to measure, or files to --merge")
    listed = groups(found)
    for group in listed:
        _print(group)
    if html is not None:
        write_page(listed, html)
        say(f"wrote {html}")
    return listed


def _data(group: Group) -> dict[str, Any]:
    """Write the rows of a group as plain data, without its images."""
    from cachekit.tools.bench.figures import FIGURES

    shared = group.cell.model_dump(mode="json", exclude={"method", "specs", "steps", "spacing", "seed"})
    rows = [
        {
            "configuration": row.label,
            "method": row.cell.method.value,
            "specs": list(row.cell.specs),
            "steps": row.cell.steps,
            "spacing": row.cell.spacing,
            **{key: figure.value(row) for key, figure in FIGURES.items()},
            "metrics": row.metrics,
        }
        for row in (group.uncached, *group.rows)
    ]
    return {**shared, "environment": group.environment, "rows": rows, "notes": group.notes, "warnings": group.warnings}


def _best_data(best: Best) -> dict[str, Any]:
    cell = best.row.cell
    where = {"model": cell.model, "scheduler": cell.scheduler, "uncached_steps": cell.uncached_steps}
    return {**where, "fulfils": best.fulfils, "specs": list(cell.specs), "code": best.code}


def _print(group: Group) -> None:
    from cachekit.tools.bench.tables import CONFIGURATION, EQUAL_COST, headings, learned, texts, title

    rows = [group.uncached, *group.rows]
    memory = ["peak_memory"] if any(row.peak_memory is not None for row in rows) else []
    found = [texts(group, row) for row in rows]
    say(title(group))
    for names in (headings([*_COST, *memory]), [*headings(_QUALITY), *learned(rows), *EQUAL_COST]):
        header = [CONFIGURATION, *names]
        print_table(header, [[text.get(name, "-") for name in header] for text in found])
    for note in group.notes:
        say(note)
    for warning in group.warnings:
        say(f"warning: {warning}")

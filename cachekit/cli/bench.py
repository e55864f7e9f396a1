"""Measure grids of policies on any pipeline: cost and quality, beside fewer steps and the published packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.demo import SPECS
from cachekit.cli.output import console, progress_bar, say
from cachekit.cli.suites import SUITES, check_suite, coco, paper
from cachekit.errors import CachekitError
from cachekit.models.loading import EMBEDDED

if TYPE_CHECKING:
    from cachekit.bench.captions import Captions
    from cachekit.bench.cells import Setting
    from cachekit.bench.results import Result, Results
    from cachekit.bench.suite import Suite
    from cachekit.bench.summary import Group, Row

_MODELS = f"Folders or hub ids of pipelines, {EMBEDDED}, or architectures such as sd15 for times alone."
_SPEC = "Grid such as 'tgate:m=5|10+deepcache:interval=2|3'; may be repeated."
_CAPTIONS = "File with a caption per line, annotations of MS-COCO (.json), or how many of our own."
_METRIC = "Learned metric with its weights: lpips or clip; fid or clip for coco."
_COST = ("s/image", "spread", "first", "faster", "GMACs", "fewer", "kept", "deciding")
_QUALITY = ("PSNR", "SSIM", "shown", "Frechet")
_AGAINST = {"plain steps at equal MACs": "MACs", "at equal wall time": "wall time"}


def bench(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(help=_MODELS, metavar="MODELS...")] = None,
    suite: Annotated[str, typer.Option(help=f"What is measured: {', '.join(SUITES)}.")] = "grid",
    spec: Annotated[list[str] | None, typer.Option(help=_SPEC)] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="Scheduler of diffusers; may be repeated.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Steps, 25 if not given; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed, 0 if not given; may be repeated.")] = None,
    captions: Annotated[str, typer.Option(help=_CAPTIONS)] = "8",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many captions, the first.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision: float32, float16 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Device, if not cuda where present, else cpu.")] = None,
    compiled: Annotated[str | None, typer.Option("--compile", help="Compile blocks with, say, inductor.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels, if not the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels, if not the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, if not the pipeline's own.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help=_METRIC)] = None,
    peers: Annotated[bool, typer.Option(help="Measure published packages that are installed too.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker.")] = None,
    executor: Annotated[str, typer.Option(help="serial, process or ray.")] = "serial",
    workers: Annotated[int | None, typer.Option(min=1, help="Workers, each with a loaded pipeline.")] = None,
    output: Annotated[Path, typer.Option(help="File of results; what it holds is kept.")] = Path("bench.jsonl"),
    merge: Annotated[list[Path] | None, typer.Option(help="Take in results of another file; may be repeated.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report as one page.")] = None,
    references: Annotated[Path | None, typer.Option(help="coco: folder of true images, one for each caption.")] = None,
    images: Annotated[Path, typer.Option(help="coco: folder for images; what it holds is kept.")] = Path("bench-coco"),
) -> None:
    """Measure policies, resume what was interrupted, and report; without MODELS only report.

    --suite paper rebuilds the papers' tables, of MODELS or all; --suite coco scores images beside true ones.
    """
    given = dict(locals())
    check_suite(suite, context)
    if suite == "paper":
        return paper(models or [])
    if suite == "coco":
        return _coco(models or [], given)
    return _grid(models or [], given)


def _grid(models: list[str], given: dict[str, Any]) -> None:
    html = given["html"]
    results = _open(given["output"], given["merge"] or [], html)
    suites = [_suite(model, given) for model in models]
    failures = [failure for suite in suites for failure in _measure(suite, results)]
    _report(results.all, html)
    if failures:
        raise typer.Exit(1)


def _open(output: Path, merge: list[Path], html: Path | None) -> Results:
    """Return the results held and merged; whatever cannot be read or written ends the run before anything starts."""
    from cachekit.bench.cells import BenchError
    from cachekit.bench.results import Results, read

    taken = [read(path) for path in merge]
    if html is not None and not html.parent.is_dir():
        raise BenchError(f"cannot write {str(html)!r}: there is no folder {str(html.parent)!r}")
    if html is not None and html.is_dir():
        raise BenchError(f"cannot write {str(html)!r}: it is a folder")
    results = Results(output)
    for problem in (*results.problems, *(problem for _, problems in taken for problem in problems)):
        typer.echo(f"warning: {problem}", err=True)
    added = results.add(result for found, _ in taken for result in found)
    if merge:
        say(f"merged {added} results into {output}")
    return results


def _suite(model: str, given: dict[str, Any]) -> Suite:
    from cachekit.bench.cells import expand
    from cachekit.bench.executors import default_workers
    from cachekit.bench.executors import executor as known
    from cachekit.bench.suite import Suite, fitting
    from cachekit.registry.catalog import installed

    compositions = expand(given["spec"] or SPECS, installed().policies)
    known(given["executor"])
    return Suite(
        setting=_setting(model, given),
        compositions=compositions if given["spec"] else fitting(model, compositions),
        schedulers=given["scheduler"] or (),
        steps=given["steps"] or (25,),
        seeds=given["seed"] or (0,),
        peers=given["peers"],
        executor=given["executor"],
        workers=given["workers"] or default_workers(given["executor"]),
    )


def _coco(models: list[str], given: dict[str, Any]) -> None:
    from cachekit.bench.cells import expand
    from cachekit.registry.catalog import installed

    if not models:
        raise CachekitError("--suite coco has nothing to draw with: name a model")
    compositions = expand(given["spec"] or [], installed().policies)
    for model in models:
        coco(_setting(model, given), _captions(given), compositions, given)


def _setting(model: str, given: dict[str, Any]) -> Setting:
    from cachekit.bench.cells import Setting
    from cachekit.bench.coco import SCORES
    from cachekit.bench.quality import METRICS, parse_metrics

    known = SCORES if given["suite"] == "coco" else METRICS
    names = ("dtype", "device", "compiled", "height", "width", "guidance", "threads")
    return Setting(
        model=model,
        captions=_captions(given).texts,
        metrics=parse_metrics(given["metric"] or [], known),
        **{name: given[name] for name in names},
    )


def _captions(given: dict[str, Any]) -> Captions:
    from cachekit.bench.captions import read_captions

    return read_captions(given["captions"], given["limit"])


def _measure(suite: Suite, results: Results) -> list[str]:
    from cachekit.bench.suite import measure_suite

    def progress(done: int, total: int, failure: str | None) -> None:
        show(done, total, failure and f"not measured: {failure}")

    with progress_bar(suite.setting.model) as show:
        return measure_suite(suite, results, progress)


def _report(found: list[Result], html: Path | None) -> None:
    from cachekit.bench.page import write_page
    from cachekit.bench.summary import groups

    if not found:
        raise CachekitError("there is nothing to report: name models to measure, or files to --merge")
    listed = groups(found)
    for group in listed:
        _print(group)
    if html is not None:
        write_page(listed, html)
        say(f"wrote {html}")


def _print(group: Group) -> None:
    from cachekit.bench.page import title

    rows = [group.uncached, *group.rows]
    learned = list(dict.fromkeys(name for row in rows for name in row.metrics))
    memory = ["peak memory"] if any(row.peak_memory is not None for row in rows) else []
    say(title(group))
    _print_table(group, rows, [*_COST, *memory])
    _print_table(group, rows, [*_QUALITY, *learned, *_AGAINST])
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        say(f"warning: {warning}")


def _print_table(group: Group, rows: list[Row], names: list[str]) -> None:
    from rich.table import Table

    from cachekit.bench.page import against, columns

    table = Table("configuration")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        texts = columns(group, row)
        texts |= {name: against(group, row, cost) for name, cost in _AGAINST.items()}
        table.add_row(texts["configuration"], *(texts.get(name, "-") for name in names))
    console().print(table)

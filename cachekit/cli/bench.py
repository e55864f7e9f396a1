"""Measure grids of policies on any pipeline: cost and quality, beside fewer steps and the published packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CachekitError
from .demo import SPECS
from .output import console, say

if TYPE_CHECKING:
    from ..bench.cells import Setting
    from ..bench.results import Result, Results
    from ..bench.suite import Suite
    from ..bench.summary import Group, Row

_MODELS = "Folders or hub ids of diffusers pipelines, 'demo', or architectures such as sd15 for times alone."
_SPEC = "Grid such as 'tgate:m=5|10+deepcache:interval=2|3'; may be repeated."
_COST = ("s/image", "spread", "first", "faster", "GMACs", "fewer", "kept", "deciding")
_QUALITY = ("PSNR", "SSIM", "shown")
_AGAINST = {"plain steps at equal MACs": "MACs", "at equal wall time": "wall time"}


def bench(
    models: Annotated[list[str] | None, typer.Argument(help=_MODELS, metavar="MODELS...")] = None,
    spec: Annotated[list[str] | None, typer.Option(help=_SPEC)] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="Scheduler of diffusers; may be repeated.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Steps [default: 25]; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed [default: 0]; may be repeated.")] = None,
    captions: Annotated[str, typer.Option(help="File with a caption per line, or how many of our own.")] = "8",
    dtype: Annotated[str | None, typer.Option(help="Precision: float32, float16 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Device, if not cuda where present, else cpu.")] = None,
    compiled: Annotated[str | None, typer.Option("--compile", help="Compile blocks with, say, inductor.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels, if not the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels, if not the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, if not the pipeline's own.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="lpips or clip, with weights.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure published packages that are installed too.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker.")] = None,
    executor: Annotated[str, typer.Option(help="serial or process.")] = "serial",
    workers: Annotated[int | None, typer.Option(min=1, help="Workers, each with a loaded pipeline.")] = None,
    output: Annotated[Path, typer.Option(help="File of results; what it holds is kept.")] = Path("bench.jsonl"),
    merge: Annotated[list[Path] | None, typer.Option(help="Take in results of another file; may be repeated.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report as one page.")] = None,
) -> None:
    """Measure policies, resume what was interrupted, and report; without MODELS only report."""
    given = dict(locals())
    results = _open(output, merge or [], html)
    suites = [_suite(model, given) for model in models or []]
    failures = [failure for suite in suites for failure in _measure(suite, results)]
    _report(results.all, html)
    if failures:
        raise typer.Exit(1)


def _open(output: Path, merge: list[Path], html: Path | None) -> Results:
    """Return the results held and merged; whatever cannot be read or written ends the run before anything starts."""
    from ..bench.cells import BenchError
    from ..bench.results import Results, read

    taken = [read(path) for path in merge]
    if html is not None and not html.parent.is_dir():
        raise BenchError(f"cannot write {str(html)!r}: there is no folder {str(html.parent)!r}")
    results = Results(output)
    for problem in (*results.problems, *(problem for _, problems in taken for problem in problems)):
        typer.echo(f"warning: {problem}", err=True)
    added = results.add(result for found, _ in taken for result in found)
    if merge:
        say(f"merged {added} results into {output}")
    return results


def _suite(model: str, given: dict[str, Any]) -> Suite:
    from ..bench.cells import expand
    from ..bench.executors import default_workers
    from ..bench.executors import executor as known
    from ..bench.suite import Suite
    from ..catalog import installed

    known(given["executor"])
    return Suite(
        setting=_setting(model, given),
        compositions=expand(given["spec"] or SPECS, installed().policies),
        schedulers=given["scheduler"] or (),
        steps=given["steps"] or (25,),
        seeds=given["seed"] or (0,),
        peers=given["peers"],
        executor=given["executor"],
        workers=given["workers"] or default_workers(given["executor"]),
    )


def _setting(model: str, given: dict[str, Any]) -> Setting:
    from ..bench.cells import Setting
    from ..bench.quality import parse_metrics

    names = ("dtype", "device", "compiled", "height", "width", "guidance", "threads")
    return Setting(
        model=model,
        captions=tuple(_captions(given["captions"])),
        metrics=parse_metrics(given["metric"] or []),
        **{name: given[name] for name in names},
    )


def _captions(text: str) -> list[str]:
    from ..bench.cells import BenchError
    from ..demo import heldout_captions

    if text.isdigit() and int(text):
        return heldout_captions(int(text), 0)
    try:
        found = [line.strip() for line in Path(text).read_text().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read captions {text!r}: give a file or a number above 0") from error
    if not found:
        raise BenchError(f"captions {text!r}: the file holds none")
    return found


def _measure(suite: Suite, results: Results) -> list[str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench.suite import measure_suite

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(suite.setting.model, total=None)

        def progress(done: int, total: int, failure: str | None) -> None:
            bar.update(task, completed=done, total=total)
            if failure:
                typer.echo(f"warning: not measured: {failure}", err=True)

        return measure_suite(suite, results, progress)


def _report(found: list[Result], html: Path | None) -> None:
    from ..bench.page import write_page
    from ..bench.summary import groups

    if not found:
        raise CachekitError("there is nothing to report: name models to measure, or files to --merge")
    listed = groups(found)
    for group in listed:
        _print(group)
    if html is not None:
        write_page(listed, html)
        say(f"wrote {html}")


def _print(group: Group) -> None:
    from ..bench.page import title

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

    from ..bench.page import against, columns

    table = Table("configuration")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        texts = columns(group, row)
        texts |= {name: against(group, row, cost) for name, cost in _AGAINST.items()}
        table.add_row(texts["configuration"], *(texts.get(name, "-") for name in names))
    console().print(table)

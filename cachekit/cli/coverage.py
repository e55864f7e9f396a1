"""`cachekit coverage`: policies tried on every diffusers pipeline that can be built small from configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.output import check_writable, console, json_results, progress_bar, say, write
from cachekit.errors import CachekitError, nearest
from cachekit.interface.specs import split_specs
from cachekit.tools.coverage.results import LEFT_OUT

if TYPE_CHECKING:
    from cachekit.tools.coverage.results import Coverage, Trial

#: Options with which policies act within the few steps of a trial; those of other policies are their defaults.
OPTIONS = {
    "adaptive_guidance": "m=3",
    "block_cache": "threshold=9",
    "cache": "where=feed_forward,when=every(2)",
    "cair": "n=3",
    "deepcache": "interval=2",
    "dicache": "threshold=9,retained=0",
    "easycache": "threshold=1,first=1",
    "fbcache": "threshold=1",
    "fora": "interval=2",
    "guidance_interval": "stop=2",
    "hicache": "interval=2,warm_up=1",
    "magcache": "threshold=9,retained=0,ratios=1",
    "null_text": "after=3",
    "pab": "low=0,high=1000,spatial=2,temporal=2,cross=2",
    "seacache": "threshold=1",
    "smoothcache": "threshold=9",
    "spectrum": "warm_up=1",
    "taylorseer": "interval=2,warm_up=1",
    "teacache": "threshold=1",
    "tgate": "m=3",
}
COMPOSITIONS = (
    "tgate:m=3+deepcache:interval=2",
    "tgate:m=3+delta_dit",
    "adaptive_guidance:m=3,linear=true+delta_dit",
)

_NAMES = "Parts of pipeline names, such as Flux or SD3; default: all pipelines."


def default_specs(policies: Iterable[str]) -> list[str]:
    """List a spec of each of these policies but those of `LEFT_OUT`, and the compositions of them.

    >>> default_specs(["calibrated", "text_kv", "tgate"])
    ['text_kv', 'tgate:m=3']
    """
    tried = [name for name in policies if name not in LEFT_OUT]
    alone = [f"{name}:{OPTIONS[name]}" if name in OPTIONS else name for name in tried]
    parts = [{spec.partition(":")[0] for spec in split_specs(composition)} for composition in COMPOSITIONS]
    return alone + [composition for composition, names in zip(COMPOSITIONS, parts) if names <= {*tried}]


def coverage(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    spec: Annotated[
        list[str] | None, typer.Option(help="Specs to try instead of all policies, joined by +; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Time limit of each pipeline in seconds.")] = 300,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the results as JSON; results of other pipelines in the file are kept. - is stdout.",
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the results as a Markdown page.")] = None,
) -> None:
    """Build small pipelines, try policies on them, and report which work, are refused, stay idle or fail."""
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed
    from cachekit.tools.coverage.page import markdown as page
    from cachekit.tools.coverage.results import JOIN, Coverage, read

    check_writable(markdown)
    catalog = installed()
    wanted = spec or default_specs(sorted(catalog.policies))
    specs = [JOIN.join(map(str, parse_all(split_specs(text), catalog))) for text in wanted]
    older = read(json) if names and json is not None and json.exists() else Coverage(specs, [])
    Coverage(specs, []).updating(older)
    with json_results(json):
        found = Coverage(specs, _survey(_chosen(names or []), specs, workers, limit))
        _print(found)
        if not spec:
            for name, reason in LEFT_OUT.items():
                say(f"left out: {name}, {reason}")
        found = found.updating(older)
        for path, text in ((json, found.to_json), (markdown, lambda: page(found))):
            if path is not None:
                write(path, text())
    if any(found.results("fails")):
        raise typer.Exit(1)


def _chosen(wanted: list[str]) -> list[str]:
    """Find the pipelines whose name contains one of these words; SD stands for StableDiffusion."""
    from cachekit.tools.coverage.building import pipeline_names

    names = pipeline_names()
    words = [word.replace("SD", "StableDiffusion").lower() for word in wanted]
    for given, word in zip(wanted, words):
        if not any(word in name.lower() for name in names):
            raise CachekitError(
                f"no pipeline has {given!r} in its name{nearest(given, names)}; give a part of a diffusers class name"
            )
    return [name for name in names if not words or any(word in name.lower() for word in words)]


def _survey(names: list[str], specs: list[str], workers: int, limit: float) -> list[Trial]:
    from cachekit.tools.coverage.survey import survey

    trials: list[Trial] = []
    with progress_bar("trying") as show:
        show(0, len(names))
        for trial in survey(names, specs, workers, limit):
            trials.append(trial)
            show(len(trials), len(names), name=trial.pipeline)
    return trials


def _print(found: Coverage) -> None:
    from rich.table import Table

    from cachekit.tools.coverage.page import summary

    table = Table("pipeline", *found.specs)
    for row in summary(found):
        table.add_row(*row)
    for trial in found.not_built:
        table.add_row(trial.pipeline, f"not built: {trial.reason}"[:60], style="dim")
    console().print(table)
    for trial, spec, result in found.results("idle", "fails"):
        say(f"{result.state}: {trial.pipeline} with {spec}: {result.note}")
    for spec in found.specs:
        say(f"{spec}: {', '.join(f'{state} {count}' for state, count in found.counts(spec).items())}")
    say(f"built {len(found.built)} of {len(found.trials)}")

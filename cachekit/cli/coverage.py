"""`cachekit coverage`: policies tried on every diffusers pipeline that can be built small from configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.output import console, progress_bar, say, write
from cachekit.errors import CachekitError, nearest

if TYPE_CHECKING:
    from cachekit.coverage.results import Coverage, Trial

#: Specs tried by default: each policy with options that act within the few steps of a trial, and compositions.
SPECS = (
    "tgate:m=3",
    "deepcache:interval=2",
    "adaptive_guidance:m=3",
    "null_text:after=3",
    "delta_dit",
    "tgate:m=3+deepcache:interval=2",
    "tgate:m=3+delta_dit",
    "adaptive_guidance:m=3,linear=true+delta_dit",
)

_NAMES = "Parts of pipeline names, such as Flux or SD3; default: all pipelines."


def coverage(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    spec: Annotated[list[str] | None, typer.Option(help="Specs to try instead, joined by +; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Time limit of each pipeline in seconds.")] = 300,
    json: Annotated[
        Path | None, typer.Option(help="Write the results as JSON; results of other pipelines in the file are kept.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the results as a Markdown page.")] = None,
) -> None:
    """Build small pipelines, try policies on them, and report which work, are refused, stay idle or fail."""
    from cachekit.coverage.page import markdown as page
    from cachekit.coverage.results import JOIN, Coverage, read
    from cachekit.interface.specs import parse_all, split_specs
    from cachekit.registry.catalog import installed

    specs = [JOIN.join(map(str, parse_all(split_specs(text), installed()))) for text in spec or SPECS]
    older = read(json) if names and json is not None and json.exists() else Coverage(specs, [])
    Coverage(specs, []).updating(older)
    found = Coverage(specs, _survey(_chosen(names or []), specs, workers, limit))
    _print(found)
    found = found.updating(older)
    for path, text in ((json, found.to_json), (markdown, lambda: page(found))):
        if path is not None:
            write(path, text())
    if any(found.results("fails")):
        raise typer.Exit(1)


def _chosen(wanted: list[str]) -> list[str]:
    """Find the pipelines whose name contains one of these words; SD stands for StableDiffusion."""
    from cachekit.coverage.building import pipeline_names

    names = pipeline_names()
    words = [word.replace("SD", "StableDiffusion").lower() for word in wanted]
    for given, word in zip(wanted, words):
        if not any(word in name.lower() for name in names):
            raise CachekitError(
                f"no pipeline has {given!r} in its name{nearest(given, names)}; give a part of a diffusers class name"
            )
    return [name for name in names if not words or any(word in name.lower() for word in words)]


def _survey(names: list[str], specs: list[str], workers: int, limit: float) -> list[Trial]:
    from cachekit.coverage.survey import survey

    trials: list[Trial] = []
    with progress_bar("trying") as show:
        show(0, len(names))
        for trial in survey(names, specs, workers, limit):
            trials.append(trial)
            show(len(trials), len(names), name=trial.pipeline)
    return trials


def _print(found: Coverage) -> None:
    from rich.table import Table

    from cachekit.coverage.page import summary

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

"""Run the suites of `cachekit bench` that are no grids: the papers' tables, and scores on captions with true images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cachekit.cli.output import console, progress_bar, say
from cachekit.errors import CachekitError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachekit.bench.captions import Captions
    from cachekit.bench.cells import Setting
    from cachekit.bench.coco import Scored
    from cachekit.interface.policy import Policy

__all__ = ["SUITES", "check_suite", "coco", "paper"]

_DRAWING = {"spec", "scheduler", "steps", "seed", "captions", "limit", "dtype", "device", "compiled", "height"}
_DRAWING |= {"width", "guidance", "metric", "threads"}
#: The options that mean something to each suite.
SUITES = {
    "grid": {*_DRAWING, "peers", "executor", "workers", "output", "merge", "html"},
    "paper": set[str](),
    "coco": {*_DRAWING, "references", "images"},
}


def check_suite(name: str, context: typer.Context) -> None:
    """Refuse a suite that is not known, and options that would do nothing to this one."""
    if name not in SUITES:
        raise CachekitError(f"unknown suite {name!r}{nearest(name, SUITES)}; known: {', '.join(SUITES)}")
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter.name not in {"models", "suite", *SUITES[name]}:
            raise CachekitError(f"{parameter.opts[0]} means nothing to --suite {name}; leave it out")


def paper(models: Sequence[str]) -> None:
    """Print the papers' costs beside ours, and how their FIDs are measured where their data and weights are."""
    from cachekit.bench.paper import measurable, rebuilt
    from cachekit.models.architectures import architecture

    for model in models:
        architecture(model)
    line = "{:>7}  {:80}  {:>9}  {:>9}  {:>7}  {:>9}  {:>9}".format
    say(line("table", "multiply-accumulates in 10^12, parameters in 10^6", "paper", "ours", "ratio", "paper", "ours"))
    for row in rebuilt(models):
        params = (f"{row.paper_params:.3f}", f"{row.params / 1e6:.3f}") if row.paper_params and row.params else ("", "")
        say(line(row.table, row.name, f"{row.paper:.3f}", f"{row.ours:.3f}", f"{row.ratio:.5f}", *params).rstrip())
    say("\nNot reproducible here: the FIDs need the captions and images of MS-COCO and the published weights.")
    say("Where those are, each is measured by the command below it:")
    for found in measurable(models):
        say(f"\n{found.table:>7}  {found.name}: FID {found.paper:.3f} in the paper, ours not measured")
        for command in found.commands:
            say(f"         {command}")


def coco(setting: Setting, captions: Captions, compositions: Sequence[tuple[Policy, ...]], given: Any) -> None:
    """Draw and score one model's images, and print a table."""
    from cachekit.bench.coco import Coco, score

    if not setting.metrics:
        raise CachekitError("--suite coco needs a metric: --metric fid=FILE or --metric clip=FOLDER")
    folder: Path | None = given["references"]
    made = Coco(
        setting=setting,
        captions=captions,
        compositions=compositions,
        images=given["images"],
        references=captions.references(folder) if folder else (),
        schedulers=given["scheduler"] or (),
        steps=given["steps"] or (25,),
        seeds=given["seed"] or (0,),
    )
    with progress_bar(setting.model) as progress:
        found = [*score(made, progress)]
    _print(found)
    say(f"images and scores.jsonl are in {given['images']}")


def _print(found: Sequence[Scored]) -> None:
    from rich.table import Table

    names = [*dict.fromkeys(name for scored in found for name in scored.scores)]
    table = Table("configuration")
    for name in ("scheduler", "seed", "images", "s/image", "GMACs", *names):
        table.add_column(name, justify="right", overflow="fold")
    for scored in found:
        drawing = scored.drawing
        table.add_row(
            drawing.made.label,
            *(drawing.scheduler, str(drawing.seed), str(scored.images)),
            *(f"{scored.seconds:.3f}", f"{scored.macs / 1e9:.3f}"),
            *(f"{scored.scores[name]:.3f}" for name in names),
        )
    console().print(table)

"""`cachekit bench paper`: the papers' tables, rebuilt without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.output import JsonFile, json_results, say
from cachekit.cli.settings import command

if TYPE_CHECKING:
    from cachekit.tools.bench.paper import Rebuilt

_LINE = "{:>7}  {:80}  {:>9}  {:>9}  {:>7}  {:>9}  {:>9}".format


@dataclass(frozen=True, kw_only=True)
class PaperSettings:
    """Options of `cachekit bench paper`."""

    models: Annotated[list[str], typer.Argument(help="Architectures such as sd15; default: all.")] = field(
        default_factory=list
    )
    json: JsonFile = None


@command(PaperSettings)
def paper(settings: PaperSettings) -> None:
    """Count the costs that papers publish, and print the commands that measure their FIDs.

    No weights are needed for the costs. The FIDs need MS-COCO and the published weights.
    """
    from cachekit.models.architectures import architecture
    from cachekit.tools.bench.paper import rebuilt

    for model in settings.models:
        architecture(model)
    with json_results(settings.json) as give:
        rows = list(rebuilt(settings.models))
        _print(rows, settings)
        give([{**asdict(row), "ratio": row.ratio} for row in rows])


def _print(rows: Sequence[Rebuilt], settings: PaperSettings) -> None:
    from cachekit.tools.bench.paper import measurable

    say(_LINE("table", "multiply-accumulates in 10^12, parameters in 10^6", "paper", "ours", "ratio", "paper", "ours"))
    for row in rows:
        params = (f"{row.paper_params:.3f}", f"{row.params / 1e6:.3f}") if row.paper_params and row.params else ("", "")
        costs = (f"{row.paper:.3f}", f"{row.ours:.3f}", f"{row.ratio:.5f}")
        say(_LINE(row.table, row.name, *costs, *params).rstrip())
    say("\nNot reproducible here: the FIDs need the captions and images of MS-COCO and the published weights.")
    say("With those, each is measured by the command below it:")
    for found in measurable(settings.models):
        say(f"\n{found.table:>7}  {found.name}: FID {found.paper:.3f} in the paper, ours not measured")
        for line in found.commands:
            say(f"         {line}")

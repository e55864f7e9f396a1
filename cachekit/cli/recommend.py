"""`cachekit recommend`: what a model can use, what is published for it, and up to three lines to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.models import AnyModel
from cachekit.cli.output import JsonFile, json_results, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachekit.tools.tuning.recommend import Costs, Line, Recommendation, Setting

_STEPS = "Number of steps: iterations of the pipeline's loop; default: the pipeline's own."
_GUIDANCE = "Guidance scale; default: the pipeline's own."


def recommend(
    model: AnyModel,
    steps: Annotated[int | None, typer.Option(min=1, help=_STEPS)] = None,
    guidance: Annotated[float | None, typer.Option(help=_GUIDANCE)] = None,
    json_file: JsonFile = None,
) -> None:
    """Recommend settings for a model by estimates and published presets; nothing is run, no weights are needed."""
    from cachekit.tools.tuning.recommend import recommend as recommend_for

    with json_results(json_file) as give:
        found = recommend_for(model, steps, guidance)
        _print_model(found)
        _print_settings(found.settings)
        for line in found.lines:
            _print_line(line)
        if found.note:
            say(found.note)
        give(found.data())


def _print_model(found: Recommendation) -> None:
    known = f" of {found.architecture}" if found.architecture else ""
    say(f"{found.model}: {found.denoiser}{known}, adapter {found.adapter}")
    say(f"  run       {found.scheduler or 'unknown scheduler'}, {found.steps} steps, {found.guidance}")
    say(f"  sites     {', '.join(f'{kind} x {count}' for kind, count in found.sites.items())}")


def _print_settings(settings: Sequence[Setting]) -> None:
    """Print a row for each preset that fits, then why the others don't."""
    rows = [
        [f"preset:{one.name}", one.published_for, f"{one.costs.steps}", *_costs(one.costs), one.source]
        for one in settings
        if not one.refused
    ]
    if rows:
        print_table(["preset", "for", "steps", "MAC reduction", "kept", "evidence"], rows)
    elif not settings:
        say("no preset ships for this model")
    for one in settings:
        if one.refused:
            say(f"preset:{one.name} doesn't fit: {one.refused}")


def _print_line(line: Line) -> None:
    reduction, kept = _costs(line.costs)
    say(f"\n{line.level}: {reduction} MAC reduction in {line.costs.steps} steps, {kept} kept; {line.why}")
    if line.first:
        say(f"  first make its weights: {line.first}")
    say(f"  {line.code}")


def _costs(costs: Costs) -> list[str]:
    """Write the MAC reduction and the kept bytes; what is decided during a run has no reduction before it."""
    from cachekit.tools.bench.figures import size

    if costs.mac_reduction is None or costs.cache_bytes is None:
        return ["unknown", "unknown"]
    return ["in the run" if costs.open else f"{costs.mac_reduction:.2f}x", size(costs.cache_bytes)]

"""`cachekit check`: a policy, checked against what implementations have broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.output import JsonFile, choice, json_results, print_table, progress_bar, say
from cachekit.errors import CachekitError

if TYPE_CHECKING:
    from cachekit.testing.results import Result

_TINY = ("sd", "pixart", "sd3", "wan", "flux")
_MODELS = "Tiny model to check on; may be repeated. Default: all."
_CHECKS = "Check to make, such as check_undo; may be repeated. Default: all."
_EXPECT = "Check that has to fail, with the reason: check_linear_ramp='a mean, no forecast'; may be repeated."


def check(
    spec: Annotated[str, typer.Argument(help="Spec of a policy, or of several joined by +.")],
    model: Annotated[list[str] | None, typer.Option(help=_MODELS, **choice(_TINY, "model"))] = None,
    only: Annotated[list[str] | None, typer.Option("--check", help=_CHECKS)] = None,
    expect: Annotated[list[str] | None, typer.Option(help=_EXPECT)] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a policy on tiny pipelines: undone, repeated, resized, batched, combined; exit code 1 on a failure."""
    from cachekit.testing.models import MODELS
    from cachekit.testing.results import Outcome
    from cachekit.testing.running import check_policy
    from cachekit.testing.table import CHECKS

    run = partial(check_policy, spec, models=model or (), checks=only or (), expected=_reasons(expect or []))
    with json_results(json_file) as give:
        results = _shown(run, len(model or MODELS) * len(only or CHECKS))
        _print(results)
        give([asdict(result) for result in results])
    if any(result.outcome is Outcome.FAILED for result in results):
        raise typer.Exit(1)


def _reasons(pairs: Sequence[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for (name, equals, reason), pair in zip(split, pairs):
        if not equals or not name or not reason.strip():
            raise CachekitError(f"--expect {pair!r} is not check=reason; write check_linear_ramp='a mean, no forecast'")
    return {name.strip(): reason.strip() for name, _, reason in split}


def _shown(run: Callable[..., list[Result]], total: int) -> list[Result]:
    """Make the checks behind a progress bar."""
    with progress_bar("check") as progress:
        done: list[Result] = []

        def show(result: Result) -> None:
            done.append(result)
            progress(min(len(done), total), total, name=f"{result.check} on {result.model}")

        return run(show=show)


def _print(results: Sequence[Result]) -> None:
    """Print a row for each check with a column for each model, then what failed, and the reasons of the others."""
    from cachekit.testing.results import Outcome

    models = list(dict.fromkeys(result.model for result in results))
    found = {(result.check, result.model): result.outcome.value for result in results}
    rows = [
        [name, *(found.get((name, model), "") for model in models)] for name in dict.fromkeys(r.check for r in results)
    ]
    print_table(["check", *models], rows)
    reasons: dict[tuple[Outcome, str], list[str]] = {}
    for result in results:
        if result.note and result.outcome is not Outcome.FAILED:
            places = [result.model] if result.outcome is Outcome.REFUSED else [f"{result.check} on {result.model}"]
            named = reasons.setdefault((result.outcome, result.note), [])
            named += [place for place in places if place not in named]
    for (outcome, note), places in reasons.items():
        say(f"{outcome.value}: {', '.join(places)}: {note}")
    for result in results:
        if result.outcome is Outcome.FAILED:
            say(result)
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    say(", ".join(f"{outcome.value} {count}" for outcome, count in counts.items() if count))

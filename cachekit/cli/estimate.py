"""`cachekit estimate`: costs of policies on a model, counted without weights."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.amounts import macs
from cachekit.cli.models import AnyModel
from cachekit.cli.output import JsonFile, json_results, print_table, say
from cachekit.errors import CachekitError

if TYPE_CHECKING:
    from cachekit.costs.estimate import Estimate, StepCost

#: Sizes are multiples of this many pixels, which every known model can halve as often as it must.
_STRIDE = 16


class EstimateError(CachekitError):
    """A size that an estimate cannot use."""


def estimate(
    model: AnyModel,
    specs: Annotated[list[str] | None, typer.Argument(help="Specs such as tgate:m=10.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the pipeline's call (num_inference_steps).")] = 25,
    height: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels; default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels; default: the model's own.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Estimate MACs, parameters and cache size of policies on a model; no weights are loaded."""
    from cachekit.costs.estimate import estimate as estimate_cost
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed

    policies = parse_all(specs or [], installed())
    _check_size(height, width)
    with json_results(json_file) as give:
        found = estimate_cost(model, policies, num_inference_steps=steps, height=height, width=width)
        say(_title(model, [str(policy) for policy in policies], steps, len(found.steps)))
        _print_totals(found)
        _print_steps(found.steps)
        give({"model": model, "specs": [str(policy) for policy in policies], **_data(found)})


def _check_size(*sizes: int | None) -> None:
    for size in sizes:
        if size is not None and size % _STRIDE:
            raise EstimateError(f"a size of {size} pixels: give a multiple of {_STRIDE}")


def _title(model: str, specs: list[str], steps: int, iterations: int) -> str:
    loop = "" if iterations == steps else f" ({iterations} iterations)"
    return f"{model}, {steps} steps{loop}, {' + '.join(specs) or 'no specs'}"


def _print_totals(found: Estimate) -> None:
    print_table(("per image", "uncached", "cached"), found.totals)
    say(f"{found.mac_reduction:.2f}x MAC reduction; what a policy decides during a run is counted as computed")


def _print_steps(steps: tuple[StepCost, ...]) -> None:
    rows = []
    for cost, group in groupby(steps, key=lambda step: (step.branches, step.macs, step.attention_macs)):
        numbers = [step.step for step in group]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        branches, own, attention = cost
        rows.append([label, str(branches), macs(own), macs(attention)])
    print_table(("steps", "branches", "MACs", "attention products"), rows)


def _data(found: Estimate) -> dict[str, Any]:
    names = ("macs", "baseline_macs", "attention_macs", "baseline_attention_macs", "params", "baseline_params")
    figures = {name: getattr(found, name) for name in (*names, "cache_bytes", "mac_reduction")}
    return {**figures, "steps": [asdict(step) for step in found.steps]}

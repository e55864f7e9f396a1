"""`cachekit estimate`: costs of policies on a model, counted without weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import check_writable, print_table, say, write
from cachekit.errors import CachekitError
from cachekit.models.loading import EMBEDDED

if TYPE_CHECKING:
    from cachekit.costs.estimate import Estimate, StepCost

_MODEL = f"Architecture such as sd15, folder or hub id of a diffusers pipeline, or {EMBEDDED}."
#: Sizes are multiples of this many pixels, which every known model can halve as often as it must.
_STRIDE = 16


class EstimateError(CachekitError):
    """A size that an estimate cannot use."""


def estimate(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    specs: Annotated[list[str] | None, typer.Argument(help="Specs such as tgate:m=10.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps: iterations of the pipeline's loop.")] = 25,
    height: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels; default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels; default: the model's own.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Estimate MACs, parameters and cache size of policies on a model; no weights are loaded."""
    from cachekit.costs.estimate import estimate as estimate_cost
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed

    policies = parse_all(specs or [], installed())
    _check_size(height, width)
    check_writable(file)
    found = estimate_cost(_subject(model), policies, num_inference_steps=steps, height=height, width=width)
    say(_title(model, [str(policy) for policy in policies], steps))
    _print_totals(found)
    _print_steps(found.steps)
    if file:
        data = {"model": model, "specs": [str(policy) for policy in policies], **_data(found)}
        write(file, json.dumps(data, indent=1) + "\n")


def _subject(model: str) -> Any:
    """Find a known architecture by name, or build a pipeline without weights; a near miss of a name is refused."""
    from cachekit.models.architectures import architecture
    from cachekit.models.loading import is_architecture, pipeline_from_config

    return architecture(model).name if is_architecture(model) else pipeline_from_config(model)


def _check_size(*sizes: int | None) -> None:
    for size in sizes:
        if size is not None and size % _STRIDE:
            raise EstimateError(f"a size of {size} pixels: give a multiple of {_STRIDE}")


def _title(model: str, specs: list[str], steps: int) -> str:
    return f"{model}, {steps} steps, {' + '.join(specs) or 'no specs'}"


def _print_totals(found: Estimate) -> None:
    figures = (
        ("MACs of Linear and convolution layers", found.baseline_macs, found.macs),
        ("MACs of attention products", found.baseline_attention_macs, found.attention_macs),
        ("parameters in the final phase", found.baseline_params, found.params),
        ("peak bytes of cached tensors", 0, found.cache_bytes),
    )
    rows = [(name, f"{uncached:,}", f"{cached:,}") for name, uncached, cached in figures]
    print_table(("per image", "uncached", "cached"), rows)
    say(f"{found.mac_reduction:.2f}x MAC reduction; what a policy decides during a run is counted as computed")


def _print_steps(steps: tuple[StepCost, ...]) -> None:
    rows = []
    for cost, group in groupby(steps, key=lambda step: (step.branches, step.macs, step.attention_macs)):
        numbers = [step.step for step in group]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append([label, *(f"{figure:,}" for figure in cost)])
    print_table(("steps", "branches", "MACs", "attention products"), rows)


def _data(found: Estimate) -> dict[str, Any]:
    names = ("macs", "baseline_macs", "attention_macs", "baseline_attention_macs", "params", "baseline_params")
    figures = {name: getattr(found, name) for name in (*names, "cache_bytes", "mac_reduction")}
    return {**figures, "steps": [asdict(step) for step in found.steps]}

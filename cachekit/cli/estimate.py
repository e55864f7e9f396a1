"""Say what policies would cost on a model, before anything runs and without weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import console, say
from cachekit.errors import CachekitError
from cachekit.models.loading import EMBEDDED

if TYPE_CHECKING:
    from rich.table import Table

    from cachekit.costs.estimate import Estimate, StepCost

_MODEL = f"Architecture such as sd15, folder or hub id of a diffusers pipeline, or {EMBEDDED}."
#: Pixels per side of the cell that every known model can halve as often as it has to.
_STRIDE = 16


class EstimateError(CachekitError):
    """Report a size or a file that an estimate cannot use."""


def estimate(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    specs: Annotated[list[str] | None, typer.Argument(help="Specs such as tgate:m=10.", metavar="SPECS...")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Iterations of the pipeline's loop.")] = 25,
    height: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels, if not the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=_STRIDE, help="Pixels, if not the model's own.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Estimate cost, parameters and memory of policies on a model; no weights are loaded."""
    from cachekit.costs.estimate import estimate as estimate_cost
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed

    policies = parse_all(specs or [], installed().policies)
    _check_size(height, width)
    _check_file(file)
    found = estimate_cost(_subject(model), policies, num_inference_steps=steps, height=height, width=width)
    say(_title(model, [str(policy) for policy in policies], steps))
    _print_totals(found)
    _print_steps(found.steps)
    if file:
        _write(file, {"model": model, "specs": [str(policy) for policy in policies], **_data(found)})


def _subject(model: str) -> Any:
    """Return a known architecture's name, or a pipeline without weights; anything near a name is taken for one."""
    from cachekit.errors import nearest
    from cachekit.models.architectures import architecture, architectures
    from cachekit.models.loading import DEMOS, pipeline_from_config

    if model in architectures():
        return model
    if model not in DEMOS and not Path(model).exists() and nearest(model, architectures()):
        return architecture(model).name
    return pipeline_from_config(model)


def _check_size(*sizes: int | None) -> None:
    for size in sizes:
        if size is not None and size % _STRIDE:
            raise EstimateError(f"a size of {size} pixels is no multiple of {_STRIDE}")


def _check_file(file: Path | None) -> None:
    """Refuse a file that cannot be written before anything is counted."""
    if file is None:
        return
    try:
        file.open("a").close()
    except OSError as error:
        raise EstimateError(f"cannot write {str(file)!r}: {error.strerror}") from error


def _title(model: str, specs: list[str], steps: int) -> str:
    return f"{model}, {steps} steps, {' + '.join(specs) or 'no specs'}"


def _print_totals(found: Estimate) -> None:
    table = _table("per image", "uncached", "cached")
    table.add_row("MACs of Linear and convolution layers", f"{found.baseline_macs:,}", f"{found.macs:,}")
    table.add_row("MACs of attention products", f"{found.baseline_attention_macs:,}", f"{found.attention_macs:,}")
    table.add_row("parameters in the final phase", f"{found.baseline_params:,}", f"{found.params:,}")
    table.add_row("bytes kept at peak", "0", f"{found.cache_bytes:,}")
    console().print(table)
    say(f"{found.speedup:.2f}x fewer MACs; every cell that a run would decide counts as computed")


def _table(first: str, *figures: str) -> Table:
    from rich.table import Table

    table = Table(first)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _print_steps(steps: tuple[StepCost, ...]) -> None:
    table = _table("steps", "branches", "MACs", "attention products")
    for cost, group in groupby(steps, key=lambda step: (step.branches, step.macs, step.attention_macs)):
        numbers = [step.step for step in group]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        table.add_row(label, *(f"{figure:,}" for figure in cost))
    console().print(table)


def _data(found: Estimate) -> dict[str, Any]:
    names = ("macs", "baseline_macs", "attention_macs", "baseline_attention_macs", "params", "baseline_params")
    figures = {name: getattr(found, name) for name in (*names, "cache_bytes", "speedup")}
    return {**figures, "steps": [asdict(step) for step in found.steps]}


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")
    say(f"wrote {file}")

"""`cachekit demo`: policies compared on the embedded model."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import JsonFile, check_folder, json_results, print_table, progress_bar, say

if TYPE_CHECKING:
    from cachekit.tools.bench.summary import Group

#: Specs compared by default, besides those of the user.
SPECS = ("forecast:interval=2", "deepcache:interval=3", "tgate:m=10", "tgate:m=10+deepcache:interval=3")
#: Specs that are compared too where their policy is installed and has a calibration for what is compared.
CALIBRATED = ("calibrated:interval=3", "calibrated:interval=4", "calibrated:interval=6")


def demo(
    captions: Annotated[int, typer.Option(min=1, help="Number of held-out captions.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the uncached pipeline.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the captions and the noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the table.")] = Path("cachekit-demo"),
    scheduler: Annotated[str | None, typer.Option(help="Scheduler of diffusers; default: the model's own.")] = None,
    spec: Annotated[
        list[str] | None, typer.Option(help="Specs to compare as well, joined by +; may be repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare policies on the embedded model, which needs no download, and write a table and pictures."""
    from cachekit.models.demo import heldout_captions
    from cachekit.registry.catalog import installed
    from cachekit.tools.bench.demo import HEADER, LEGEND, comparison, measure, table, to_json
    from cachekit.tools.bench.measuring import Configuration

    first, *others = SPECS
    calibrated = CALIBRATED if CALIBRATED[0].partition(":")[0] in installed().policies else ()
    configurations = [Configuration.parse(text, steps) for text in (first, *calibrated, *others, *(spec or []))]
    optional = configurations[1 : 1 + len(calibrated)]
    chosen = comparison(configurations, heldout_captions(captions, seed), seed, scheduler, optional)
    check_folder(output)
    with json_results(json_file) as give:
        with progress_bar("generating") as progress:
            group = measure(chosen, progress)
        print_table(HEADER, table(group), LEGEND)
        for note in group.notes:
            say(note)
        for warning in group.warnings:
            say(f"warning: {warning}")
        settings = {"captions": captions, "steps": steps, "seed": seed, **_machine()}
        for path in _write(group, settings, output):
            say(f"wrote {path}")
        give({**settings, **to_json(group)})


def _write(group: Group, settings: dict[str, Any], folder: Path) -> list[Path]:
    from cachekit.tools.bench.demo import page, shown, to_json
    from cachekit.tools.bench.grid import picture_grid
    from cachekit.tools.bench.summary import Group

    folder.mkdir(parents=True, exist_ok=True)
    picture, table, data = folder / "pictures.png", folder / "table.md", folder / "table.json"
    picture_grid(Group(shown(group))).save(picture)
    table.write_text(page(group))
    data.write_text(json.dumps({**settings, **to_json(group)}, indent=1, allow_nan=False) + "\n")
    return [picture, table, data]


def _machine() -> dict[str, Any]:
    import torch

    from cachekit.upstream.versions import versions

    used = {"python": platform.python_version(), **versions()}
    return {"threads": torch.get_num_threads(), "machine": platform.machine(), "versions": used}

"""Compare policies on the embedded model: cost, likeness, and whether the captions are shown."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import console, say

if TYPE_CHECKING:
    from rich.console import Console

    from cachekit.bench.comparison import Comparison, Configuration

#: What is compared with the uncached pipeline, besides the user's own specs.
SPECS = ("tgate:m=10", "deepcache:interval=3", "adaptive_guidance:m=10", "tgate:m=10+deepcache:interval=3")


def demo(
    captions: Annotated[int, typer.Option(min=1, help="Held-out captions to draw.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the uncached pipeline.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of captions and noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the table.")] = Path("cachekit-demo"),
    spec: Annotated[list[str] | None, typer.Option(help="Compare these too; join several specs by '+'.")] = None,
) -> None:
    """Compare policies on the embedded model, which needs no download, and write table and pictures."""
    import torch

    from cachekit.models.demo import demo_pipeline, heldout_captions

    configurations = _configurations(steps, spec or [])
    # On a busy machine threads wait for each other, and that would be measured instead of the policies.
    torch.set_num_threads(1)
    pipe: Any = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    _check(pipe, configurations)
    screen = console()
    comparison = _compare(pipe, configurations, heldout_captions(captions, seed), seed, screen)
    _print(comparison, screen)
    settings = {"captions": captions, "steps": steps, "seed": seed, **_machine()}
    for path in _write(comparison, settings, output):
        say(f"wrote {path}")


def _configurations(steps: int, extra: list[str]) -> list[Configuration]:
    from cachekit.bench.comparison import Configuration
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed

    cached = [Configuration.parse(text, steps) for text in (*SPECS, *extra)]
    for configuration in cached:
        parse_all(configuration.specs, installed().policies)
    return [Configuration(steps), *cached]


def _check(pipe: Any, configurations: list[Configuration]) -> None:
    """Refuse a spec that does not fit before anything is drawn."""
    from cachekit.applying import apply

    for configuration in configurations:
        apply(pipe, configuration.specs).remove()


def _compare(
    pipe: Any, configurations: list[Configuration], prompts: list[str], seed: int, screen: Console
) -> Comparison:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cachekit.bench.comparison import compare
    from cachekit.models.demo import DEMO_GUIDANCE
    from cachekit.models.demo.checker import shows

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("drawing", total=None)
        return compare(
            pipe,
            configurations,
            prompts,
            seed=seed,
            arguments={"guidance_scale": DEMO_GUIDANCE},
            judge=lambda image, caption: bool(shows(image, caption)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print(comparison: Comparison, screen: Console) -> None:
    from rich.table import Table

    from cachekit.bench.comparison import HEADER

    table = Table(caption=_LEGEND, caption_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right", overflow="fold")
    for row in comparison.rows:
        table.add_row(*comparison.cells(row))
    screen.print(table)
    for warning in comparison.warnings:
        say(f"warning: {warning}")


_LEGEND = (
    "s/image: median wall time of one image; GMACs: multiply-accumulates of the denoiser's Linear and convolution"
    " layers, in thousand millions; PSNR (dB) and SSIM: median likeness to the uncached image; shown: images that show"
    " all that their caption says; kept: peak of cached tensors. The last row spends on plain steps what the cheapest"
    " composed row costs."
)


def _write(comparison: Comparison, settings: dict[str, Any], folder: Path) -> list[Path]:
    from cachekit.bench.grid import picture_grid

    folder.mkdir(parents=True, exist_ok=True)
    picture, table, data = folder / "pictures.png", folder / "table.md", folder / "table.json"
    picture_grid(comparison).save(picture)
    table.write_text(f"{comparison.markdown()}\n{_LEGEND}\n")
    data.write_text(json.dumps({**settings, **comparison.as_dict()}, indent=1, allow_nan=False) + "\n")
    return [picture, table, data]


def _machine() -> dict[str, Any]:
    import diffusers
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"threads": torch.get_num_threads(), "machine": platform.machine(), "versions": versions}

"""`cachekit analyze`: how outputs change over a run, and what the text and the scheduler are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.models import Dtype, RunnableModel, warn_of_shapes
from cachekit.cli.output import JsonFile, check_folder, choice, json_results, print_table, progress_bar, say

if TYPE_CHECKING:
    from cachekit.tools.analysis.parts import Found, Table
    from cachekit.tools.bench.cells import Setting

_CAPTIONS = "File with one caption per line, MS-COCO annotations (.json), or a number of held-out captions."
_PARTS = ("changes", "noise", "text", "lengths", "schedulers")
_STEPS = "Number of steps; gates keep their share of them. Default: 25; 4 for an embedded model of 4 steps."
_ONLY = "Part to run; may be repeated. Default: all."
_SCHEDULER = "Scheduler to compare; may be repeated. Default: Euler, DPM-Solver++ and DDIM, where the model takes them."


def analyze(
    model: RunnableModel,
    captions: Annotated[str, typer.Option(help=_CAPTIONS)] = "8",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first captions, this many.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help=_STEPS)] = None,
    only: Annotated[list[str] | None, typer.Option(help=_ONLY, **choice(_PARTS, "part"))] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help=_SCHEDULER)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first caption's noise; the next one's follows.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for figures, tables and pictures.")] = Path("analysis"),
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how outputs change from step to step, and what the text and the scheduler are worth.

    These are the figures 2 and 3 and the tables 1 to 4 and 8 of TGATE's paper (arXiv 2404.02747), on any pipeline.
    """
    from cachekit.models.demo import demo_steps
    from cachekit.models.loading import scheduler_for
    from cachekit.models.names import canonical
    from cachekit.tools.analysis.captions import usable_captions
    from cachekit.tools.analysis.parts import PARTS, Analysis
    from cachekit.tools.bench.captions import check_scenes
    from cachekit.tools.bench.cells import Setting
    from cachekit.tools.bench.subjects import load

    steps = steps or demo_steps(canonical(model))
    with json_results(json_file) as give:
        setting = Setting(model=model, captions=(), dtype=dtype, device=device, guidance=guidance, threads=threads)
        subject = load(setting)
        for name in scheduler or ():
            scheduler_for(subject.pipe, name)
        texts = usable_captions(captions, limit, subject.pipe)
        if subject.draws_scenes:
            check_scenes(texts)
        check_folder(output)
        setting = setting.model_copy(update={"captions": texts, "pictures": len(texts)})
        found: dict[str, Found] = {}
        for name in (name for name in PARTS if not only or name in only):
            with progress_bar(name) as show:
                found[name] = Analysis(setting, subject, steps, seed, scheduler or (), show).run(name)
            _print(found[name])
            _write(found, _settings(setting, steps, seed), output)
        warn_of_shapes(captions, model)
        for name in ("analysis.json", "tables.md", *(name for one in found.values() for name in one.pictures)):
            say(f"wrote {output / name}")
        give(_data(found, _settings(setting, steps, seed)))


def _settings(setting: Setting, steps: int, seed: int) -> dict[str, Any]:
    from cachekit.tools.bench.workbench import environment

    kept = setting.model_dump(mode="json", include={"model", "captions", "dtype", "device", "guidance"})
    return {**kept, "steps": steps, "seed": seed, "environment": environment(setting)}


def _print(found: Found) -> None:
    for table in found.tables:
        print_table(table.header, table.rows, table.title)
    for note in found.notes:
        say(note)


def _write(found: Mapping[str, Found], settings: dict[str, Any], folder: Path) -> None:
    """Write what has been found so far, so that a stopped analysis leaves its finished parts."""
    (folder / "analysis.json").write_text(json.dumps(_data(found, settings), indent=1, allow_nan=False) + "\n")
    (folder / "tables.md").write_text("\n".join(_page(one) for one in found.values()))
    for one in found.values():
        for name, picture in one.pictures.items():
            if isinstance(picture, str):
                (folder / name).write_text(picture)
            else:
                picture.save(folder / name)


def _data(found: Mapping[str, Found], settings: dict[str, Any]) -> dict[str, Any]:
    return {"settings": settings, **{name: one.data for name, one in found.items()}}


def _page(found: Found) -> str:
    """Write the tables and notes of a part as Markdown."""
    return "\n".join([*map(_markdown, found.tables), *(f"- {note}" for note in found.notes)]) + "\n"


def _markdown(table: Table) -> str:
    from cachekit.tools.bench.tables import markdown

    return f"**{table.title}**\n\n{markdown(table.header, table.rows)}"

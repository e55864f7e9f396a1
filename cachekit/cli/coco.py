"""`cachekit bench coco`: scores of images as a whole, beside reference images, as papers evaluate on MS-COCO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.imaging import ImagingSettings
from cachekit.cli.models import complete_runnable, runnable
from cachekit.cli.output import json_results, print_table, progress_bar, say
from cachekit.cli.settings import command
from cachekit.errors import CachekitError
from cachekit.models.names import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachekit.interface.policy import Policy
    from cachekit.tools.bench.coco import Coco, Scored

_MODELS = f"Folders or hub ids of pipelines, folders of cachekit generate --prompts, or {EMBEDDED}."


@dataclass(frozen=True, kw_only=True)
class CocoSettings(ImagingSettings):
    """Options of `cachekit bench coco`."""

    models: Annotated[list[str], typer.Argument(help=_MODELS, parser=runnable, autocompletion=complete_runnable)]
    references: Annotated[Path | None, typer.Option(help="Folder of reference images, one for each caption.")] = None
    images: Annotated[Path, typer.Option(help="Folder for images; those that exist are not generated again.")] = Path(
        "bench-coco"
    )


@command(CocoSettings)
def coco(settings: CocoSettings) -> None:
    """Generate an image for each caption, and score the images of each composition as a whole.

    Metrics: fid (a TorchScript network, needs --references) and clip (folder of a CLIP model). An interrupted run is
    resumed. Of a folder that cachekit generate --prompts has drawn, the images are scored as they are.
    """
    from cachekit.tools.batch.manifest import is_batch

    compositions = settings.parse_specs()
    with json_results(settings.json) as give:
        found: list[Scored] = []
        for model in settings.models:
            found += _drawn(Path(model), settings) if is_batch(Path(model)) else _scored(model, compositions, settings)
        give([one.model_dump(mode="json") for one in found])


def _scored(model: str, compositions: Sequence[tuple[Policy, ...]], settings: CocoSettings) -> list[Scored]:
    """Draw and score the images of a model."""
    from cachekit.tools.bench.coco import score

    chosen = _chosen(model, compositions, settings)
    with progress_bar(model) as progress:
        found = [*score(chosen, progress)]
    _print(found)
    say(f"images and scores.jsonl are in {settings.images}")
    return found


def _drawn(folder: Path, settings: CocoSettings) -> list[Scored]:
    """Score images that were drawn before."""
    from cachekit.tools.bench.drawn import score_folder

    with progress_bar(str(folder)) as progress:
        found = [*score_folder(folder, _chosen(str(folder), (), settings, drawn=True), settings.references, progress)]
    _print(found)
    return found


def _chosen(
    model: str, compositions: Sequence[tuple[Policy, ...]], settings: CocoSettings, drawn: bool = False
) -> Coco:
    from cachekit.tools.bench.coco import SCORES, Coco

    setting, captions = settings.setting(model, SCORES), settings.read_captions()
    if not setting.metrics:
        raise CachekitError("bench coco needs a metric: --metric fid=FILE or --metric clip=FOLDER")
    return Coco(
        setting=setting,
        captions=captions,
        compositions=compositions,
        images=settings.images,
        references=captions.references(settings.references) if settings.references and not drawn else (),
        schedulers=settings.scheduler,
        steps=settings.steps,
        seeds=settings.seed,
    )


def _print(found: Sequence[Scored]) -> None:
    from cachekit.tools.bench.figures import decimals
    from cachekit.tools.bench.tables import CONFIGURATION, headings

    names = [*dict.fromkeys(name for scored in found for name in scored.scores)]
    header = [CONFIGURATION, "scheduler", "seed", "images", *headings(("seconds", "macs")), *names]
    rows = [
        [
            scored.drawing.configuration.label,
            *(scored.drawing.scheduler, str(scored.drawing.seed), str(scored.images)),
            *(_figure(key, getattr(scored, key)) for key in ("seconds", "macs")),
            *(decimals(scored.scores[name]) for name in names),
        ]
        for scored in found
    ]
    print_table(header, rows)


def _figure(key: str, value: float | None) -> str:
    from cachekit.tools.bench.figures import FIGURES

    return "-" if value is None else FIGURES[key].format(value)

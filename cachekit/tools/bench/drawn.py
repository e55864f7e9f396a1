"""Score the folder of a batch: images that were drawn before, for prompts that they hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cachekit.tools.batch.images import described
from cachekit.tools.bench.captions import Captions, images_in
from cachekit.tools.bench.cells import BenchError, digest
from cachekit.tools.bench.coco import Coco, Drawing, Progress, Scored, load_scorers

__all__ = ["score_folder"]


def score_folder(folder: Path, coco: Coco, references: Path | None, progress: Progress) -> Iterator[Scored]:
    """Score the images of each composition, scheduler and number of steps in a folder; nothing is drawn.

    `coco` has the metrics and the device. All images in `references` count for each. Raises `BenchError` where a metric
    or an image can't be used.
    """
    sets = _sets(folder)
    names = images_in(references) if references is not None else []
    if "fid" in dict(coco.setting.metrics):
        if not names:
            raise BenchError("metric fid compares with true images: name their folder, --references FOLDER")
        few = next((len(files) for files in sets.values() if len(files) < 2), 0)
        if few:
            raise BenchError("metric fid needs at least 2 images of each composition: one image has no covariance")
    for done, (drawing, files) in enumerate(sets.items()):
        progress(done, len(sets), None)
        texts = tuple(str(info["prompt"]) for _, info in files)
        chosen = Coco(coco.setting, Captions(str(folder), texts), (), folder, names)
        scorers = load_scorers(chosen, coco.setting.device or "cpu", progress)
        paths = [path for path, _ in files]
        counted = [info["macs"] for _, info in files if info["macs"] is not None]
        yield Scored(
            drawing=drawing,
            images=len(files),
            captions=digest(texts),
            references=digest([path.name for path in names]) if names else None,
            metrics=dict(coco.setting.metrics),
            scores={name: scorer(paths, texts) for name, scorer in scorers.items()},
            environment=dict(files[0][1]["versions"]),
            seconds=median(info["seconds"] for _, info in files),
            macs=fmean(counted) if counted else None,
        )
    progress(len(sets), len(sets), None)


def _sets(folder: Path) -> dict[Drawing, Sequence[tuple[Path, dict[str, Any]]]]:
    """Sort the images of a folder by what they were drawn with."""
    found: dict[Drawing, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for path in sorted(folder.glob("*.png")):
        info = described(path)
        if "prompt" not in info:
            raise BenchError(f"image {str(path)!r} is not of a batch: it holds no prompt; remove it")
        found[_drawing(info)].append((path, info))
    if not found:
        raise BenchError(f"{str(folder)!r} has no images to score; draw them with cachekit generate --prompts")
    return dict(found)


def _drawing(info: dict[str, Any]) -> Drawing:
    width, height = info["size"] or (None, None)
    return Drawing(
        model=info["model"],
        model_hash="",
        specs=tuple(info["specs"]),
        scheduler=info["scheduler"],
        steps=info["steps"] or 0,
        seed=0,
        dtype=info["dtype"],
        compiled=None,
        height=height,
        width=width,
        guidance=info["guidance"],
    )

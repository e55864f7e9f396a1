"""Generate an image for each caption into files, and score all images of a contender together: FID and CLIP score.

This is how papers evaluate policies on MS-COCO. Images are files, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel, ConfigDict

from cachekit.applying import attach
from cachekit.files import write_whole
from cachekit.interface.policy import Policy
from cachekit.models.loading import scheduler_for
from cachekit.models.names import is_architecture
from cachekit.registry.notices import silent_log
from cachekit.tools.batch.images import described, encoded, opened
from cachekit.tools.bench.captions import Captions
from cachekit.tools.bench.cells import BenchError, Setting, digest
from cachekit.tools.bench.learned import Features, clip_score, pixels, torchmetrics
from cachekit.tools.bench.measuring import Configuration, ImageRunner, RunResult
from cachekit.tools.bench.subjects import Subject, load, model_hash, set_scheduler
from cachekit.tools.bench.workbench import environment

__all__ = ["SCORES", "Coco", "Drawing", "Progress", "Scored", "load_scorers", "score"]

#: Called after each image with the number of images that exist and of all, and a warning or None.
Progress = Callable[[int, int, "str | None"], None]
#: Scores image files together, given the caption of each.
Scorer = Callable[[Sequence[Path], Sequence[str]], float]


class Drawing(BaseModel):
    """All that an image depends on besides its caption, and so the name of its folder."""

    model_config = ConfigDict(frozen=True)

    model: str
    model_hash: str
    specs: tuple[str, ...]
    scheduler: str
    steps: int
    seed: int
    dtype: str | None
    compiled: str | None
    height: int | None
    width: int | None
    guidance: float | None

    @property
    def configuration(self) -> Configuration:
        """The specs and steps."""
        return Configuration(self.steps, self.specs)

    @property
    def folder(self) -> str:
        """The name of the folder, which depends on the files of the model and not on its path."""
        readable = re.sub(r"[^\w.=]+", "-", self.configuration.label)[:60]
        return f"{readable}-{digest(self.model_dump(mode='json', exclude={'model'}))}"


@dataclass(frozen=True)
class Coco:
    """What is scored on one model: the plain pipeline and each composition, with each scheduler, steps and seed."""

    setting: Setting
    captions: Captions
    compositions: Sequence[tuple[Policy, ...]]
    images: Path
    references: Sequence[Path] = ()
    schedulers: Sequence[str] = ()
    steps: Sequence[int] = (25,)
    seeds: Sequence[int] = (0,)


class Scored(BaseModel):
    """The costs of the images of one drawing, median seconds and mean MACs, and their scores."""

    drawing: Drawing
    images: int
    captions: str
    references: str | None
    metrics: dict[str, str]
    seconds: float
    macs: float | None
    scores: dict[str, float]
    environment: dict[str, Any]


def score(coco: Coco, progress: Progress) -> Iterator[Scored]:
    """Generate missing images, and yield the scores of each drawing, which `scores.jsonl` beside the images keeps too.

    Raises a `CachekitError` for wrong settings before the first image.
    """
    _check(coco)
    subject = load(coco.setting)
    drawings = _drawings(coco, subject.pipe)
    scorers = load_scorers(coco, subject.pipe.device, progress)
    texts = coco.captions.texts
    for place, drawing in enumerate(drawings):
        gallery = _Gallery(coco.images / drawing.folder, drawing, texts)
        for done in gallery.fill(subject):
            progress(place * len(texts) + done, len(drawings) * len(texts), None)
        scored = Scored(
            drawing=drawing,
            images=len(texts),
            captions=digest(texts),
            references=digest([path.name for path in coco.references]) if coco.references else None,
            metrics=dict(coco.setting.metrics),
            scores={name: scorer(gallery.files, texts) for name, scorer in scorers.items()},
            environment=environment(coco.setting),
            **gallery.costs(),
        )
        _append(coco.images / "scores.jsonl", scored)
        yield scored


def _drawings(coco: Coco, pipe: Any) -> list[Drawing]:
    """List all drawings, the uncached one first; raise where a scheduler or a policy does not fit the pipeline."""
    found = [type(scheduler_for(pipe, name)).__name__ for name in coco.schedulers]
    schedulers = list(dict.fromkeys(found)) or [type(pipe.scheduler).__name__]
    compositions = [(), *(policies for policies in coco.compositions if policies)]
    for policies in compositions:
        attach(pipe, policies).remove()
    names = ("model", "dtype", "compiled", "height", "width", "guidance")
    shared = {name: getattr(coco.setting, name) for name in names}
    shared["model_hash"] = model_hash(coco.setting.model)
    return [
        Drawing(specs=tuple(sorted(map(str, policies))), scheduler=scheduler, steps=steps, seed=seed, **shared)
        for scheduler, steps, seed, policies in product(schedulers, coco.steps, coco.seeds, compositions)
    ]


def _check(coco: Coco) -> None:
    """Refuse wrong settings that can be found before anything is loaded."""
    folder, model, metrics = coco.images, coco.setting.model, dict(coco.setting.metrics)
    if is_architecture(model):
        raise BenchError(f"{model} has random weights: images can only be scored of a trained model")
    if "fid" in metrics and not coco.references:
        raise BenchError("metric fid compares with true images: name their folder, --references FOLDER")
    if "fid" in metrics and len(coco.captions.texts) < 2:
        raise BenchError("metric fid needs at least 2 captions: one image has no covariance")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.jsonl").open("a").close()
    except OSError as error:
        raise BenchError(f"cannot write images to {str(folder)!r}: {error.strerror}; give another path") from error


def _append(file: Path, scored: Scored) -> None:
    line = scored.model_dump_json()
    if line not in file.read_text().split("\n"):
        with file.open("a") as end:
            end.write(line + "\n")


# -- images as files --------------------------------------------------------------------------------------


class _Gallery:
    """The images of one drawing as files, named by position, caption and seed; each file holds its costs."""

    def __init__(self, folder: Path, drawing: Drawing, captions: Sequence[str]) -> None:
        self._folder = folder
        self._drawing = drawing
        self._captions = captions

    @cached_property
    def files(self) -> list[Path]:
        """The file of each caption's image."""
        names = ((place, digest([text, self._seed(place)])) for place, text in enumerate(self._captions))
        return [self._folder / f"{place:06}-{name}.png" for place, name in names]

    def _seed(self, place: int) -> int:
        return self._drawing.seed + place

    def fill(self, subject: Subject) -> Iterator[int]:
        """Generate the missing images; yield the number of images that exist."""
        missing = [place for place, file in enumerate(self.files) if not file.exists()]
        yield len(self.files) - len(missing)
        set_scheduler(subject.pipe, self._drawing.scheduler)
        runner = ImageRunner(subject.pipe, subject.arguments)
        self._folder.mkdir(exist_ok=True)
        for count, place in enumerate(missing, len(self.files) - len(missing) + 1):
            with silent_log():
                result = runner.run(self._drawing.configuration, self._captions[place], self._seed(place))
            self._save(place, result)
            yield count

    def _save(self, place: int, result: RunResult) -> None:
        assert result.image is not None
        description = {"seconds": result.seconds, "macs": result.macs, **self._identity(place)}
        write_whole(self.files[place], encoded(result.image, description), BenchError)

    def _identity(self, place: int) -> dict[str, Any]:
        return {"caption": self._captions[place], "seed": self._seed(place), "specs": self._drawing.specs}

    def costs(self) -> dict[str, float]:
        """Median seconds and mean MACs of an image."""
        costs = [described(file) for file in self.files]
        return {"seconds": median(cost["seconds"] for cost in costs), "macs": fmean(cost["macs"] for cost in costs)}


# -- scores -----------------------------------------------------------------------------------------------


def load_scorers(coco: Coco, device: Any, progress: Progress) -> dict[str, Scorer]:
    """Load the metrics of a setting; a warning about one goes to `progress`."""
    found: dict[str, Scorer] = {}
    for name, path in coco.setting.metrics:
        found[name], warning = SCORES[name](path, device, coco)
        progress(0, 0, warning)
    return found


def _fid(path: str, device: Any, coco: Coco) -> tuple[Scorer, str | None]:
    """Load the Frechet inception distance to the references, which are read once."""
    torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = Features(path, device)
    metric = FrechetInceptionDistance(features, reset_real_features=False).to(device)
    for file in coco.references:
        metric.update(pixels(opened(file), device), real=True)

    def distance(files: Sequence[Path], captions: Sequence[str]) -> float:
        metric.reset()
        for file in files:
            metric.update(pixels(opened(file), device), real=False)
        return float(metric.compute())

    count = len(coco.captions.texts)
    few = f"fid of {count} images over {features.num_features} features is unreliable: it falls as images are added"
    return distance, few if count <= features.num_features else None


def _clip(path: str, device: Any, coco: Coco) -> tuple[Scorer, str | None]:
    """Load the mean CLIP score of images with their captions."""
    judge = clip_score(path, device)
    return lambda files, captions: fmean(judge(opened(file), text) for file, text in zip(files, captions)), None


SCORES: Mapping[str, Callable[[str, Any, Coco], tuple[Scorer, str | None]]] = {"clip": _clip, "fid": _fid}

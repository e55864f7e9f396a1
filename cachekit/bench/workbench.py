"""Measure cells on one loaded pipeline: contender and uncached pipeline by turns, caption by caption."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from cachekit.applying import apply
from cachekit.bench.caches import Cache
from cachekit.bench.cells import Cell, Method, Setting
from cachekit.bench.frechet import rendered
from cachekit.bench.measuring import Configuration, ImageRunner, RunResult, likeness, silent_log
from cachekit.bench.peers import Peer
from cachekit.bench.quality import Metric, load_metrics
from cachekit.bench.results import Result, Sample
from cachekit.bench.subjects import Subject, load, set_scheduler
from cachekit.interface.specs import parse_all
from cachekit.registry.catalog import installed
from cachekit.upstream.pipelines import denoiser_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Workbench", "environment", "measure"]

#: Draw a caption with a seed.
Contender = Callable[[str, int], RunResult]

_PICTURE_SIDE = 256


def measure(setting: Setting, cell: Cell) -> Result:
    """Measure a cell in this process, which keeps the pipeline for the next one."""
    return _workbench(setting).measure(cell)


@lru_cache(maxsize=1)
def _workbench(setting: Setting) -> Workbench:
    return Workbench(setting)


class Workbench:
    """Hold one loaded pipeline and measure cells on it."""

    def __init__(self, setting: Setting) -> None:
        """Load what the setting says."""
        import torch

        if setting.threads:
            torch.set_num_threads(setting.threads)
        self._setting = setting
        self._subject: Subject = load(setting)
        self._drawers: dict[str, ImageRunner] = {}

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        return load_metrics(self._setting.metrics, self._subject.pipe.device)

    def measure(self, cell: Cell) -> Result:
        """Return the figures of a cell; the first run of its contender is timed apart."""
        set_scheduler(self._subject.pipe, cell.scheduler)
        with silent_log():
            uncached = self._plain(cell, cell.uncached_steps)
            contender = self._contender(cell)
            first = contender(self._setting.captions[0], cell.seed)
            pairs = [self._pair(uncached, contender, index, cell.seed) for index in range(len(self._setting.captions))]
        captions = self._setting.captions
        return Result(
            id=cell.id,
            cell=cell,
            environment=environment(self._setting),
            first_seconds=first.seconds,
            samples=[self._sample(caption, *pair) for caption, pair in zip(captions, pairs)],
            counts=[asdict(count) for count in pairs[0][0].counts],
            plan=self._plan(cell) if cell.method is Method.CACHEKIT else None,
            pictures=[_pictures(caption, *pair) for caption, pair in zip(captions, pairs) if pair[0].image][
                : self._setting.pictures
            ],
            reference=rendered(captions) if self._subject.draws_scenes else None,
            warnings=list(dict.fromkeys(warning for drawn, _ in pairs for warning in drawn.warnings)),
        )

    def _pair(self, uncached: Contender, contender: Contender, index: int, seed: int) -> tuple[RunResult, RunResult]:
        """Return both results of one caption; who goes first changes, so that a drift favours nobody."""
        caption = self._setting.captions[index]
        if index % 2:
            drawn = contender(caption, seed + index)
            return drawn, uncached(caption, seed + index)
        plain = uncached(caption, seed + index)
        return contender(caption, seed + index), plain

    def _plain(self, cell: Cell, steps: int) -> Contender:
        """Return the plain pipeline, warmed up and counted before it is timed."""
        drawer = self._drawers.setdefault(cell.scheduler, ImageRunner(self._subject.pipe, self._subject.arguments))
        made = Configuration(steps)
        if made not in drawer:
            drawer.draw(made, self._setting.captions[0], cell.seed)
        return lambda caption, seed: drawer.draw(made, caption, seed)

    def _contender(self, cell: Cell) -> Contender:
        if cell.method is Method.PLAIN:
            return self._plain(cell, cell.steps)
        if cell.method is Method.CACHEKIT:
            drawer, made = self._drawers[cell.scheduler], Configuration(cell.steps, cell.specs)
            return lambda caption, seed: drawer.draw(made, caption, seed)
        if cell.method is not Method.PUBLISHED:
            cache = Cache(self._subject.pipe, cell.method, cell.specs[0], self._subject.arguments)
            return lambda caption, seed: cache.draw(cell.steps, caption, seed)
        peer = Peer(self._subject.pipe, parse_all(cell.specs, installed().policies), self._subject.arguments)
        return lambda caption, seed: peer.draw(cell.steps, caption, seed)

    def _sample(self, caption: str, drawn: RunResult, plain: RunResult) -> Sample:
        costs: dict[str, Any] = {
            "seconds": drawn.seconds,
            "uncached_seconds": plain.seconds,
            "macs": drawn.macs,
            "uncached_macs": plain.macs,
            "cache_bytes": drawn.cache_bytes,
            "deciding_seconds": drawn.deciding_seconds,
            "peak_memory": drawn.peak_memory,
            "uncached_peak_memory": plain.peak_memory,
        }
        if drawn.image is None or plain.image is None:
            return Sample(caption=caption, **costs)
        return Sample(caption=caption, **costs, **self._quality(caption, drawn.image, plain.image))

    def _quality(self, caption: str, image: Image, plain: Image) -> dict[str, Any]:
        psnr, ssim = likeness(image, plain)
        return {
            "psnr": psnr,
            "ssim": ssim,
            **(_judged(caption, image, plain) if self._subject.draws_scenes else {}),
            "metrics": {name: metric(image, plain, caption) for name, metric in self._metrics.items()},
            "uncached_metrics": {name: metric(plain, plain, caption) for name, metric in self._metrics.items()},
        }

    def _plan(self, cell: Cell) -> dict[str, Any]:
        """Return the table of actions as marks."""
        with apply(denoiser_of(self._subject.pipe), cell.specs) as attachment:
            plan = attachment.plan(cell.steps)
        return {"branches": [len(row.branches) for row in plan.rows], "columns": plan.columns()}


def _judged(caption: str, image: Image, plain: Image) -> dict[str, Any]:
    """Return whether two images show their caption, and the features by which crowds of them are compared."""
    from cachekit.models.demo import features, shows

    found = [[round(value, 6) for value in one] for one in features([image, plain]).tolist()]
    return {
        "shown": bool(shows(image, caption)),
        "uncached_shown": bool(shows(plain, caption)),
        "features": found[0],
        "uncached_features": found[1],
    }


def environment(setting: Setting) -> dict[str, Any]:
    """Return what besides the cell may move its figures: versions, processor and threads."""
    import diffusers
    import torch

    from cachekit import __version__

    on_gpu = torch.cuda.is_available() and setting.device != "cpu"
    return {
        "cachekit": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": setting.threads or torch.get_num_threads(),
    }


def _pictures(caption: str, drawn: RunResult, plain: RunResult) -> tuple[str, str, str]:
    assert drawn.image is not None
    assert plain.image is not None
    return caption, _data_uri(drawn.image), _data_uri(plain.image)


def _data_uri(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if max(image.size) <= _PICTURE_SIDE // 2 else "JPEG", quality=90)
    kind = "png" if max(image.size) <= _PICTURE_SIDE // 2 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Measure cells on one loaded pipeline: contenders and uncached pipeline in turns, caption by caption."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

from cachekit.applying import apply
from cachekit.interface.specs import parse_all
from cachekit.registry.catalog import installed
from cachekit.registry.notices import silent_log
from cachekit.tools.bench.caches import Cache
from cachekit.tools.bench.captions import check_scenes
from cachekit.tools.bench.cells import FULL_STEPS, Cell, Method, Setting
from cachekit.tools.bench.frechet import rendered
from cachekit.tools.bench.measuring import Configuration, ImageRunner, RunResult, similarity
from cachekit.tools.bench.peers import Peer
from cachekit.tools.bench.quality import Metric, load_metrics
from cachekit.tools.bench.results import Result, Sample
from cachekit.tools.bench.spacing import computed_steps, scheduler_with, table_of
from cachekit.tools.bench.subjects import Subject, load, set_scheduler
from cachekit.upstream.calling import with_scheduler
from cachekit.upstream.versions import versions

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Contender", "Ran", "Workbench", "environment", "measure", "no_news", "workbench"]

#: Generates the image of a caption with a seed.
Run = Callable[[str, int], RunResult]
#: Called after each image that a workbench generates.
Ran = Callable[[], None]

_PICTURE_SIDE = 256


def no_news() -> None:
    """Do nothing after an image."""


def measure(setting: Setting, cell: Cell, ran: Ran = no_news) -> Result:
    """Measure a cell in this process, which keeps the pipeline for the next one; `ran` is called after each image."""
    bench = workbench(setting)
    bench.ran = ran
    (result,) = bench.measure([bench.prepare(cell)])
    return result


def workbench(setting: Setting) -> Workbench:
    """Make the workbench of a setting, or return that of before; one model is kept, with what ran for any captions."""
    subject, benches = _loaded(setting.model_copy(update={"captions": ()}))
    if setting.captions not in benches:
        benches[setting.captions] = Workbench(setting, subject)
    return benches[setting.captions]


@lru_cache(maxsize=1)
def _loaded(setting: Setting) -> tuple[Subject, dict[tuple[str, ...], Workbench]]:
    """Load a model once for all captions."""
    return load(setting), {}


@dataclass(frozen=True)
class Contender:
    """A contender that has run once, and that first run, which no other figure includes."""

    cell: Cell
    run: Run
    first: RunResult


class Workbench:
    """Measures cells on one loaded pipeline."""

    def __init__(self, setting: Setting, subject: Subject | None = None, ran: Ran = no_news) -> None:
        """Load what the setting names, where no `subject` is given; `ran` is called after each run.

        Raises `BenchError` for a caption that images of an embedded model can't be checked against.
        """
        self._setting = setting
        self._subject = subject or load(setting)
        if self._subject.draws_scenes:
            check_scenes(setting.captions)
        self.ran = ran
        self._runners: dict[str, ImageRunner] = {}

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        return load_metrics(self._setting.metrics, self._subject.pipe.device)

    def prepare(self, cell: Cell) -> Contender:
        """Run the uncached pipeline, where it has not run yet, and the contender of a cell, to warm both up."""
        set_scheduler(self._subject.pipe, cell.scheduler)
        with silent_log():
            self._plain(cell, cell.uncached_steps)
            run = self._contender(cell)
            return Contender(cell, run, run(self._setting.captions[0], cell.seed))

    def uncached_macs(self, cell: Cell) -> int:
        """MACs of an image of the uncached pipeline beside a cell that is prepared."""
        return self._runners[cell.scheduler].plain_macs(Configuration(cell.uncached_steps))

    def measure(self, contenders: Sequence[Contender]) -> list[Result]:
        """Measure contenders of one scheduler, number of uncached steps and seed beside the uncached pipeline.

        All take turns, caption by caption, and each caption begins with another of them, so that a machine that slows
        down favours none.
        """
        cell = contenders[0].cell
        with silent_log():
            runs = [self._plain(cell, cell.uncached_steps), *(contender.run for contender in contenders)]
            rounds = [self._round(runs, index, cell.seed) for index in range(len(self._setting.captions))]
        return [
            self._result(contender, [(results[place], results[0]) for results in rounds])
            for place, contender in enumerate(contenders, 1)
        ]

    def _round(self, runs: Sequence[Run], index: int, seed: int) -> list[RunResult]:
        """Generate one caption's image with each of `runs`."""
        first = index % len(runs)
        turns = [*range(first, len(runs)), *range(first)]
        results = {turn: runs[turn](self._setting.captions[index], seed + index) for turn in turns}
        return [results[place] for place in range(len(runs))]

    def _result(self, contender: Contender, pairs: Sequence[tuple[RunResult, RunResult]]) -> Result:
        """Put together a result; each pair is the contender's image of a caption and the uncached one."""
        cell, captions = contender.cell, self._setting.captions
        pictures = [_pictures(caption, *pair) for caption, pair in zip(captions, pairs) if pair[0].image]
        return Result(
            id=cell.id,
            cell=cell,
            environment=environment(self._setting),
            first_seconds=contender.first.seconds,
            samples=[self._sample(caption, *pair) for caption, pair in zip(captions, pairs)],
            counts=[asdict(count) for count in pairs[0][0].counts],
            plan=self.plan(cell, cell.specs, cell.steps) if cell.method is Method.CACHEKIT else None,
            pictures=pictures[: self._setting.pictures],
            reference=rendered(captions) if self._subject.draws_scenes and self._setting.reference else None,
            warnings=list(dict.fromkeys(warning for result, _ in pairs for warning in result.warnings)),
        )

    def _plain(self, cell: Cell, steps: int) -> Run:
        """Plain pipeline, which runs once to be warmed up and counted before it is timed."""
        runner = self._runners.setdefault(cell.scheduler, ImageRunner(self._subject.pipe, self._subject.arguments))
        configuration = Configuration(steps)
        run = self._counted(partial(runner.run, configuration))
        if configuration not in runner:
            run(self._setting.captions[0], cell.seed)
        return run

    def _contender(self, cell: Cell) -> Run:
        if cell.method is Method.PLAIN:
            return self._spaced(cell) if cell.spacing else self._plain(cell, cell.steps)
        if cell.method is Method.CACHEKIT:
            return self._counted(partial(self._runners[cell.scheduler].run, Configuration(cell.steps, cell.specs)))
        return self._counted(partial(self._other(cell).run, cell.steps))

    def _spaced(self, cell: Cell) -> Run:
        """Plain pipeline with another spacing of its steps, warmed up and counted as `_plain` is."""
        pipe, arguments = self._subject.pipe, self._subject.arguments
        scheduler, table = scheduler_with(pipe, cell.scheduler, cell.spacing), {}
        if cell.spacing.startswith(FULL_STEPS):
            specs = Configuration.parse(cell.spacing.removeprefix(FULL_STEPS), cell.steps).specs
            computed = computed_steps(self.plan(cell, specs, cell.uncached_steps))
            table = table_of(pipe, scheduler, cell.uncached_steps, computed)
        runner = ImageRunner(pipe, lambda prompt: {**arguments(prompt), **table})

        def run(caption: str, seed: int) -> RunResult:
            with with_scheduler(pipe, scheduler):
                return runner.run(Configuration(cell.steps), caption, seed)

        counted = self._counted(run)
        counted(self._setting.captions[0], cell.seed)
        return counted

    def _other(self, cell: Cell) -> Peer | Cache:
        pipe, arguments = self._subject.pipe, self._subject.arguments
        if cell.method is Method.PUBLISHED:
            return Peer(pipe, parse_all(cell.specs, installed()), arguments)
        return Cache(pipe, cell.method, cell.specs[0], arguments)

    def _counted(self, run: Run) -> Run:
        """Call `ran` after each run."""

        def counted(caption: str, seed: int) -> RunResult:
            result = run(caption, seed)
            self.ran()
            return result

        return counted

    def _sample(self, caption: str, result: RunResult, plain: RunResult) -> Sample:
        costs: dict[str, Any] = {
            "seconds": result.seconds,
            "uncached_seconds": plain.seconds,
            "macs": result.macs,
            "uncached_macs": plain.macs,
            "cache_bytes": result.cache_bytes,
            "deciding_seconds": result.deciding_seconds,
            "peak_memory": result.peak_memory,
            "uncached_peak_memory": plain.peak_memory,
        }
        if result.image is None or plain.image is None:
            return Sample(caption=caption, **costs)
        return Sample(caption=caption, **costs, **self._quality(caption, result.image, plain.image))

    def _quality(self, caption: str, image: Image, plain: Image) -> dict[str, Any]:
        psnr, ssim = similarity(image, plain)
        return {
            "psnr": psnr,
            "ssim": ssim,
            **(_judged(caption, image, plain) if self._subject.draws_scenes else {}),
            "metrics": {name: metric(image, plain, caption) for name, metric in self._metrics.items()},
            "uncached_metrics": {name: metric(plain, plain, caption) for name, metric in self._metrics.items()},
        }

    def plan(self, cell: Cell, specs: Sequence[str], steps: int) -> dict[str, Any]:
        """Plan of specs with a cell's scheduler: the number of branches of each row, the columns."""
        set_scheduler(self._subject.pipe, cell.scheduler)
        with apply(self._subject.pipe, specs) as attachment:
            plan = attachment.plan(steps)
        return {"branches": [len(row.branches) for row in plan.rows], "columns": plan.columns()}


def _judged(caption: str, image: Image, plain: Image) -> dict[str, Any]:
    """Whether each image shows its caption, and its features for the Frechet distance."""
    from cachekit.models.demo import features, shows

    found = [[round(value, 6) for value in one] for one in features([image, plain]).tolist()]
    return {
        "shown": bool(shows(image, caption)),
        "uncached_shown": bool(shows(plain, caption)),
        "features": found[0],
        "uncached_features": found[1],
    }


def environment(setting: Setting) -> dict[str, Any]:
    """Collect what figures depend on besides the cell: versions, machine and threads."""
    import torch

    from cachekit.version import __version__

    on_gpu = torch.cuda.is_available() and setting.device != "cpu"
    return {
        "cachekit": __version__,
        **versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": setting.threads or torch.get_num_threads(),
    }


def _pictures(caption: str, result: RunResult, plain: RunResult) -> tuple[str, str, str]:
    assert result.image is not None
    assert plain.image is not None
    return caption, _data_uri(result.image), _data_uri(plain.image)


def _data_uri(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if max(image.size) <= _PICTURE_SIDE // 2 else "JPEG", quality=90)
    kind = "png" if max(image.size) <= _PICTURE_SIDE // 2 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Drawing the image of one task with a loaded pipeline, in any process."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cachekit.applying import attach
from cachekit.costs.known import KnownCosts
from cachekit.errors import CachekitError, first_line, nearest
from cachekit.models import loading
from cachekit.models.names import Sort, named
from cachekit.registry.notices import silent_log
from cachekit.tools.batch.images import encoded
from cachekit.tools.batch.rows import BatchError, Task
from cachekit.tools.workers import FAILURES, failure_line
from cachekit.upstream.calling import SCALE, STEPS, call_parameters, results_of
from cachekit.upstream.pipelines import hide_progress
from cachekit.upstream.versions import versions
from cachekit.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Drawing", "Drawn", "Job", "call", "check_arguments", "pictures_of", "unread_lines"]


@dataclass(frozen=True)
class Job:
    """A model and how it is loaded and called, for all rows.

    `load` and `arguments` are JSON objects with arguments of `from_pretrained` and of the pipeline's call.
    """

    model: str
    scheduler: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_cache_bytes: int | None = None
    cache_device: str | None = None
    load: str = "{}"
    arguments: str = "{}"
    threads: int | None = None

    def pipeline(self) -> Any:
        """Load the pipeline."""
        return loading.ready(self.model, self.scheduler, self.device, self.dtype, **json.loads(self.load))

    @property
    def identity(self) -> dict[str, Any]:
        """What images depend on, as plain data."""
        names = ("scheduler", "dtype", "max_cache_bytes", "load", "arguments")
        found = named(self.model)
        model = os.path.realpath(self.model) if found.sort is Sort.FOLDER else found.name
        return {"model": model, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Drawn:
    """An image as a PNG file, which holds its `description`, the report of its run, and what was warned of."""

    png: bytes
    description: dict[str, Any]
    report: dict[str, Any] | None
    worker: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """The work of drawing tasks; the pipeline is loaded with the first task of a worker, and kept."""

    job: Job

    @property
    def threads(self) -> int | None:
        """Threads of each worker."""
        return self.job.threads

    @property
    def device(self) -> str | None:
        """Device of each worker."""
        return self.job.device

    def do(self, task: Task) -> Drawn | str:
        """Draw an image; one line with the reason where that fails.

        Raises a `CachekitError` where the model can't be loaded.
        """
        studio = _studio(self.job)
        try:
            with silent_log():
                return studio.draw(task)
        except (CachekitError, *FAILURES) as error:
            return failure_line(error)


@lru_cache(maxsize=1)
def _studio(job: Job) -> _Studio:
    return _Studio(job)


class _Studio:
    """A loaded pipeline, and the MACs of its runs so far: of plain ones by their settings."""

    def __init__(self, job: Job) -> None:
        if job.threads:
            import torch

            torch.set_num_threads(job.threads)
        self._job = job
        self._pipe = job.pipeline()
        hide_progress(self._pipe)
        self._unread = unread_lines(self._pipe, json.loads(job.arguments))
        self._costs = KnownCosts()
        self._plain: dict[tuple[Any, ...], int | None] = {}

    def draw(self, task: Task) -> Drawn:
        """Draw the image of a task; only the pipeline's call is timed."""
        arguments = self._arguments(task)
        plain = (task.steps, task.size, task.guidance)
        # Without specs an attachment only counts, which one run of each sort is enough for.
        attached = bool(task.specs) or plain not in self._plain
        with self._attached(task) if attached else contextlib.nullcontext() as attachment:
            start = time.perf_counter()
            pictures = call(self._pipe, task.seed, arguments)
            seconds = time.perf_counter() - start
            report = attachment.report() if attachment else None
        if len(pictures) != 1:
            raise BatchError(f"the call gave {len(pictures)} images; a batch keeps one for each row, so give more rows")
        figures = report.to_dict() if report else None
        if figures and not task.specs:
            self._plain[plain] = figures["macs"]
        description = {
            **task.settings,
            "steps": task.steps or loading.default_steps(type(self._pipe)),
            **self._job.identity,
            "scheduler": type(getattr(self._pipe, "scheduler", None)).__name__,
            "seconds": round(seconds, 4),
            "macs": figures["macs"] if figures else self._plain[plain],
            "versions": {"cachekit": __version__, **versions(), "python": platform.python_version()},
        }
        worker = f"{platform.node()}:{os.getpid()}"
        warned = (*self._unread, *(report.warnings if report and task.specs else ()))
        return Drawn(encoded(pictures[0], description), description, figures if task.specs else None, worker, warned)

    def _attached(self, task: Task) -> Any:
        limits: dict[str, Any] = {
            "max_cache_bytes": self._job.max_cache_bytes,
            "cache_device": self._job.cache_device,
        }
        return attach(self._pipe, task.specs, **limits, cost=self._costs)

    def _arguments(self, task: Task) -> dict[str, Any]:
        width, height = task.size or (None, None)
        given = {STEPS: task.steps, SCALE: task.guidance, "width": width, "height": height}
        own = {name: value for name, value in given.items() if value is not None}
        arguments = {"prompt": task.prompt, **own, **json.loads(self._job.arguments)}
        check_arguments(self._pipe, arguments)
        return arguments


# -- calls of pipelines -------------------------------------------------------------------------------------


def call(pipe: Any, seed: int, arguments: Mapping[str, Any]) -> list[Image]:
    """Call a pipeline with a seed, and list its images, or the frames of its videos.

    Raises `BatchError` where it refuses its arguments, or gives no images.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    try:
        inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
        result = pipe(**{"generator": generator, **arguments})
    except (TypeError, ValueError) as error:
        raise BatchError(
            f"{type(pipe).__name__} refuses its arguments: {first_line(error)}; change what the call is given"
        ) from error
    return list(pictures_of(result, type(pipe).__name__))


def pictures_of(result: Any, name: str) -> Iterator[Image]:
    """Yield the images, or the frames of the videos, of a pipeline's result."""
    found = results_of(result)
    if not isinstance(found, list):
        raise BatchError(f"{name} gave no images that can be written; call it from Python")
    for item in found:
        yield from item if isinstance(item, list) else [item]


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the call lacks; where it takes **kwargs, only names that look mistyped."""
    parameters = call_parameters(pipe)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in arguments:
        meant = nearest(name, parameters)
        if name not in parameters and (meant or not takes_any):
            taken = "" if meant else f"; see help({type(pipe).__name__}.__call__) for those that it takes"
            raise BatchError(f"{type(pipe).__name__} takes no argument {name!r}{meant}{taken}")


def unread_lines(pipe: Any, own: Mapping[str, Any]) -> list[str]:
    """Lines on the arguments of `--set` that only the **kwargs of the call take, which pipelines seldom read."""
    unread = [name for name in own if name not in call_parameters(pipe)]
    return [f"--set {name}: {type(pipe).__name__} has no argument of that name, and may not read it" for name in unread]

"""Measure the cells of a suite that are not measured yet, and then the plain pipelines that they must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.driving.setup import Setup
from cachekit.errors import CachekitError
from cachekit.interface.policy import Policy
from cachekit.models.loading import denoiser_from_config, precision, scheduler_for
from cachekit.models.names import DEMOS, is_architecture
from cachekit.registry.catalog import installed
from cachekit.tools.bench.caches import caches_for
from cachekit.tools.bench.cells import BenchError, Cell, Method, Setting, digest
from cachekit.tools.bench.executors import outcomes
from cachekit.tools.bench.peers import peer_exists
from cachekit.tools.bench.results import Result, Results
from cachekit.tools.bench.spacing import absent
from cachekit.tools.bench.subjects import class_of_pipeline, model_hash, own_scheduler
from cachekit.tools.bench.workbench import environment
from cachekit.tools.workers import Crew

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Suite", "fitting", "measure_suite", "shared_fields"]

#: Called with the number of images drawn, of all that are known by then, and the reason of a failure.
Progress = Callable[[int, int, "str | None"], None]


@dataclass(frozen=True)
class Suite:
    """What is measured on one model: every composition with every scheduler, number of steps and seed."""

    setting: Setting
    compositions: Sequence[tuple[Policy, ...]]
    schedulers: Sequence[str] = ()
    steps: Sequence[int] = (25,)
    seeds: Sequence[int] = (0,)
    peers: bool = True
    executor: str = "serial"
    workers: int = 1

    def cells(self) -> list[Cell]:
        """List all cells; raise a `CachekitError` where a policy or scheduler does not fit the model."""
        denoiser, pipeline = self._checked(), class_of_pipeline(self.setting.model)
        shared = self._shared()
        found = []
        for scheduler, steps, seed in product(self._schedulers(), self.steps, self.seeds):
            at: dict[str, Any] = {"scheduler": scheduler, "steps": steps, "uncached_steps": steps, "seed": seed}
            for policies in self.compositions:
                made = {**shared, **at, "specs": tuple(sorted(map(str, policies)))}
                found.append(Cell(method=Method.CACHEKIT, **made))
                if self.peers and peer_exists(policies, pipeline):
                    found.append(Cell(method=Method.PUBLISHED, **made))
            for method, text in caches_for(denoiser, pipeline) if self.peers else ():
                found.append(Cell(method=method, specs=(text,), **shared, **at))
        return found

    def _checked(self) -> nn.Module:
        precision(self.setting.dtype)
        denoiser, catalog = _shape(self.setting.model), installed()
        for policies in self.compositions:
            Setup.of({"": denoiser}, policies, catalog)
        return denoiser

    def _schedulers(self) -> list[str]:
        own = own_scheduler(self.setting.model)
        if not self.schedulers:
            return [type(own).__name__]
        pipe: Any = type(class_of_pipeline(self.setting.model), (), {"scheduler": own})()
        return list(dict.fromkeys(type(scheduler_for(pipe, name)).__name__ for name in self.schedulers))

    def _shared(self) -> dict[str, Any]:
        around = {"executor": self.executor, "workers": self.workers}
        return shared_fields(self.setting, model_hash(self.setting.model), around)


def shared_fields(setting: Setting, hash_of_model: str, around: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a cell that follow from a setting, and from what its figures depend on besides."""
    names = ("model", "dtype", "device", "compiled", "height", "width", "guidance")
    return {
        **{name: getattr(setting, name) for name in names},
        "model_hash": hash_of_model,
        "captions": digest(setting.captions),
        "metrics": tuple(name for name, _ in setting.metrics),
        "environment": digest({**environment(setting), **around}),
    }


def fitting(model: str, compositions: Sequence[tuple[Policy, ...]]) -> list[tuple[Policy, ...]]:
    """Select the compositions that find their sites in a model; raise `BenchError` where none does."""
    denoiser = _shape(model)
    found = [policies for policies in compositions if _fits(denoiser, policies)]
    if not found:
        raise BenchError(f"{model}: none of the usual specs fits {type(denoiser).__name__}; name others with --spec")
    return found


def _shape(model: str) -> nn.Module:
    """Build a model's denoiser without weights, once for each content of its files."""
    has_files = not is_architecture(model) and (model in DEMOS or Path(model).is_dir())
    return _shape_of_files(model, model_hash(model)) if has_files else denoiser_from_config(model)


@lru_cache(maxsize=4)
def _shape_of_files(model: str, content: str) -> nn.Module:
    return denoiser_from_config(model)


def _fits(denoiser: nn.Module, policies: tuple[Policy, ...]) -> bool:
    try:
        Setup.of({"": denoiser}, policies, installed())
    except CachekitError:
        return False
    return True


def measure_suite(suite: Suite, results: Results, progress: Progress) -> list[str]:
    """Measure the cells that `results` lacks, and add each as soon as it is done; return a line for each failure."""
    import diffusers

    from cachekit.tools.bench.summary import groups

    cells = suite.cells()
    chosen = {cell.id for cell in cells}
    with Crew(suite.executor, suite.workers) as crew:
        run = partial(_run, crew, suite.setting, results)
        failures = [*run(cells, _Images(progress, suite.setting, len(cells)))]
        measured = [result for result in results.all if result.id in chosen]
        pipeline = getattr(diffusers, class_of_pipeline(suite.setting.model), None)
        baselines = [cell for group in groups(measured) for cell in group.baselines()]
        reasons = {cell: absent(cell, pipeline) for cell in baselines}
        present = [cell for cell in baselines if not reasons[cell]]
        images = _Images(progress, suite.setting, len(cells) + len(present), len(cells))
        for reason in dict.fromkeys(reasons[cell] for cell in baselines if not absent(cell)):
            images.show(reason and f"plain steps: {reason}")
        return [*failures, *run(present, images)]


class _Images:
    """Progress in images: a cell's are its own, and as many uncached ones beside them."""

    def __init__(self, progress: Progress, setting: Setting, cells: int, done: int = 0) -> None:
        """Begin where `done` of all `cells` are done."""
        self._progress = progress
        self._each = 2 * len(setting.captions)
        self._cells, self._done, self._drawn = cells, done, 0

    def show(self, warning: str | None = None) -> None:
        """Show how many of all images are drawn."""
        self._progress(self._done * self._each + self._drawn, self._cells * self._each, warning)

    def ran(self) -> None:
        """Count an image of a cell under way; those that only warm up are more than it has."""
        self._drawn = min(self._drawn + 1, self._each)
        self.show()

    def did(self, cells: int = 1, warning: str | None = None) -> None:
        """Count cells that are done."""
        self._done, self._drawn = self._done + cells, 0
        self.show(warning)


def _run(crew: Crew, setting: Setting, results: Results, cells: Sequence[Cell], images: _Images) -> Iterator[str]:
    missing = [cell for cell in cells if cell not in results]
    images.did(len(cells) - len(missing))
    if not missing:
        return
    for _, outcome in outcomes(crew, setting, missing, images.ran):
        failure = None if isinstance(outcome, Result) else outcome
        if isinstance(outcome, Result):
            results.add([outcome])
        images.did(warning=failure)
        if failure:
            yield failure

"""Spread cells over this process, a pool of processes or Ray actors, each with one loaded pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from ..errors import nearest
from .cells import BenchError, Cell, Setting
from .results import Result
from .workbench import measure

__all__ = ["EXECUTORS", "Outcome", "executor"]

#: What came of a cell: its result, or why there is none.
Outcome = tuple[Cell, "Result | str"]
Executor = Callable[[Setting, Sequence[Cell], int], Iterator[Outcome]]

#: What a single cell may raise without an end to all others: memory, shapes, a published package that is too old.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ImportError)


def executor(name: str) -> Executor:
    """Return an executor by name."""
    if name not in EXECUTORS:
        raise BenchError(f"unknown executor {name!r}{nearest(name, EXECUTORS)}; known: {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def attempt(setting: Setting, cell: Cell) -> Result | str:
    """Return a cell's result, or one line about why it failed."""
    try:
        return measure(setting, cell)
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{cell.label}: {type(error).__name__}: {lines[0]}"


def _serial(setting: Setting, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    for cell in cells:
        yield cell, attempt(setting, cell)


def _process(setting: Setting, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    context = get_context("spawn")
    places = context.SimpleQueue()
    for place in range(workers):
        places.put(place)
    # A forked process could not use a GPU that its parent has touched.
    pool = ProcessPoolExecutor(workers, context, _choose_gpu, (places, setting.device))
    try:
        futures = {pool.submit(attempt, setting, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _choose_gpu(places: Any, device: str | None) -> None:
    """Give each worker a GPU of its own as far as there are enough."""
    import torch

    place = places.get()
    if device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


def _ray(setting: Setting, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise BenchError("the ray executor needs Ray: pip install 'cachekit-diffusion[ray]'") from error
    started = not ray.is_initialized()
    if started:
        # A cluster that is named brings its own processors; one made here gets as many as there are workers.
        size = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **size)
    try:
        on_gpu = setting.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
        actor = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(_Actor)
        pool = ActorPool([actor.remote(setting) for _ in range(workers)])
        yield from pool.map_unordered(lambda one, cell: one.attempt.remote(cell), cells)
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """Measure cells in a process of Ray's, on any machine."""

    def __init__(self, setting: Setting) -> None:
        """Take the setting; the pipeline is loaded with the first cell."""
        self._setting = setting

    def attempt(self, cell: Cell) -> Outcome:
        """Return the cell with what came of it."""
        return cell, attempt(self._setting, cell)


def default_workers(name: str) -> int:
    """Return as many workers as there are GPUs, or two; a serial run has one."""
    import torch

    if name == "serial":
        return 1
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


EXECUTORS: dict[str, Executor] = {"serial": _serial, "process": _process, "ray": _ray}

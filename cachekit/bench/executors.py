"""Measure cells in this process, in a pool of processes or in the actors of a Ray cluster, each with one pipeline."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from math import ceil
from multiprocessing import get_context, parent_process
from textwrap import shorten
from typing import Any

from cachekit.bench.cells import BenchError, Cell, Setting
from cachekit.bench.results import Result
from cachekit.bench.workbench import measure
from cachekit.clusters import cluster, imported_ray
from cachekit.errors import nearest

__all__ = ["EXECUTORS", "FAILURES", "Outcome", "executor"]

#: A cell, and its result or the reason why there is none.
Outcome = tuple[Cell, "Result | str"]
Executor = Callable[[Setting, Sequence[Cell], int], Iterator[Outcome]]

#: Exceptions that fail a single cell and not the others: memory, shapes, a published package that is too old.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError)


def executor(name: str) -> Executor:
    """Find an executor by name."""
    if name not in EXECUTORS:
        raise BenchError(f"unknown executor {name!r}{nearest(name, EXECUTORS)}; known: {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def attempt(setting: Setting, cell: Cell) -> Result | str:
    """Measure a cell; return its result, or one line with the reason of its failure."""
    try:
        return measure(setting, cell)
    except FAILURES as error:
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
    pool = ProcessPoolExecutor(workers, context, _start_worker, (places, setting.device))
    try:
        futures = {pool.submit(attempt, setting, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], _result(future, futures[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result | str], cell: Cell) -> Result | str:
    try:
        return future.result()
    except BrokenProcessPool:
        return f"{cell.label}: a worker died, perhaps for want of memory, and took its pool along; run it again"


def _start_worker(places: Any, device: str | None) -> None:
    """Make a worker end with its parent, and choose its GPU; workers share GPUs where there are too few."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _choose_gpu(places.get(), device)


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot shut down its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _choose_gpu(place: int, device: str | None) -> None:
    import torch

    if device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


# -- Ray --------------------------------------------------------------------------------------------------


def _ray(setting: Setting, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    ray = imported_ray()
    count = min(workers, len(cells))
    with cluster(ray, count, setting.threads or 1):
        begin = partial(ray.remote(**_share(ray, setting, count))(_Actor).remote, setting)
        left = iter(cells)
        busy = {one.attempt.remote(cell): (one, cell) for cell in islice(left, count) for one in [begin()]}
        while busy:
            (done,), _ = ray.wait(list(busy))
            one, cell = busy.pop(done)
            outcome, lives = _taken(ray, done, cell)
            for following in islice(left, 1):
                one = one if lives else begin()
                busy[one.attempt.remote(following)] = one, following
            yield cell, outcome


class _Actor:
    """Measures cells in a process of Ray, on any machine of the cluster."""

    def __init__(self, setting: Setting) -> None:
        """Store the setting; the pipeline is loaded with the first cell."""
        self._setting = setting

    def attempt(self, cell: Cell) -> Result | str:
        """Measure a cell; return its result, or one line with the reason of its failure."""
        return attempt(self._setting, cell)


def _share(ray: Any, setting: Setting, workers: int) -> dict[str, Any]:
    """Resources of each actor; raise `BenchError` where they could never be had, which Ray would wait for."""
    there = ray.cluster_resources()
    threads, processors, gpus = setting.threads or 1, int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if processors < workers * threads:
        needed = f"{workers} workers of {threads} threads"
        raise BenchError(f"the Ray cluster has {processors} processors, too few for {needed}; ask for fewer")
    on_gpu = gpus and setting.device in (None, "cuda")
    return {"num_cpus": threads, "num_gpus": 1 / ceil(workers / gpus) if on_gpu else 0}


def _taken(ray: Any, done: Any, cell: Cell) -> tuple[Result | str, bool]:
    """Outcome of a cell, and whether its actor is still alive."""
    try:
        return ray.get(done), True
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        # The message has many lines, and the last one has the reason.
        *_, reason = str(error).strip().splitlines()
        return f"{cell.label}: {shorten(reason, 200, placeholder=' ...')}", False


def default_workers(name: str) -> int:
    """As many workers as there are GPUs, or two without a GPU; one for serial runs."""
    import torch

    if name == "serial":
        return 1
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


EXECUTORS: dict[str, Executor] = {"serial": _serial, "process": _process, "ray": _ray}

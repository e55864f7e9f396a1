"""Spread cells over this process or a pool of processes, each with one loaded pipeline."""

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


def default_workers(name: str) -> int:
    """Return as many workers as there are GPUs, or two; a serial run has one."""
    import torch

    if name == "serial":
        return 1
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


EXECUTORS: dict[str, Executor] = {"serial": _serial, "process": _process}

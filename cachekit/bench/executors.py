"""Measure cells in this process, in processes of its own or in the actors of a Ray cluster, each with one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cachekit.bench.cells import Cell, Setting
from cachekit.bench.results import Result
from cachekit.bench.workbench import measure
from cachekit.workers import FAILURES, Lost, check_executor, share_out

__all__ = ["Outcome", "executor"]

#: A cell, and its result or the reason why there is none.
Outcome = tuple[Cell, "Result | str"]
Executor = Callable[[Setting, Sequence[Cell], int], Iterator[Outcome]]


def executor(name: str) -> Executor:
    """Find an executor by name; raises a `CachekitError` for an unknown one."""
    check_executor(name)
    return partial(_measured, name)


def attempt(setting: Setting, cell: Cell) -> Result | str:
    """Measure a cell; return its result, or one line with the reason of its failure."""
    try:
        return measure(setting, cell)
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{cell.label}: {type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class _Measuring:
    """The measuring of cells with one setting; the pipeline is loaded with the first cell of a worker."""

    setting: Setting

    @property
    def threads(self) -> int | None:
        return self.setting.threads

    @property
    def device(self) -> str | None:
        return self.setting.device

    def do(self, cell: Cell) -> Result | str:
        return attempt(self.setting, cell)


def _measured(name: str, setting: Setting, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    for cell, found in share_out(name, _Measuring(setting), cells, workers):
        yield cell, f"{cell.label}: {found.reason}" if isinstance(found, Lost) else found

"""Measure cells in this process, in processes of its own or in the actors of a Ray cluster, each with one pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachekit.bench.cells import Cell, Setting
from cachekit.bench.results import Result
from cachekit.bench.workbench import measure
from cachekit.workers import FAILURES, Crew, Lost

__all__ = ["Outcome", "outcomes"]

#: A cell, and its result or the reason why there is none.
Outcome = tuple[Cell, "Result | str"]


def outcomes(crew: Crew, setting: Setting, cells: Sequence[Cell]) -> Iterator[Outcome]:
    """Measure cells with a crew; yield each as soon as it is done."""
    for cell, found in crew.share_out(_Measuring(setting), cells):
        yield cell, f"{cell.label}: {found.reason}" if isinstance(found, Lost) else found


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

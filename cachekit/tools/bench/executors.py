"""Measure cells in this process, in processes of its own or in the actors of a Ray cluster, each with one pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachekit.tools.bench.cells import Cell, Setting
from cachekit.tools.bench.results import Result
from cachekit.tools.bench.workbench import Ran, measure, no_news
from cachekit.tools.workers import FAILURES, Crew, Lost

__all__ = ["Outcome", "outcomes"]

#: A cell, and its result or the reason why there is none.
Outcome = tuple[Cell, "Result | str"]


def outcomes(crew: Crew, setting: Setting, cells: Sequence[Cell], ran: Ran = no_news) -> Iterator[Outcome]:
    """Measure cells with a crew; yield each as soon as it is done.

    `ran` is called after each image, where cells are measured in this process.
    """
    work = _Measuring(setting, ran if crew.name == "serial" else no_news)
    for cell, found in crew.share_out(work, cells):
        yield cell, f"{cell.label}: {found.reason}" if isinstance(found, Lost) else found


def attempt(setting: Setting, cell: Cell, ran: Ran = no_news) -> Result | str:
    """Measure a cell; return its result, or one line with the reason of its failure."""
    try:
        return measure(setting, cell, ran)
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{cell.label}: {type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class _Measuring:
    """The measuring of cells with one setting; the pipeline is loaded with the first cell of a worker."""

    setting: Setting
    ran: Ran

    @property
    def threads(self) -> int | None:
        return self.setting.threads

    @property
    def device(self) -> str | None:
        return self.setting.device

    def do(self, cell: Cell) -> Result | str:
        return attempt(self.setting, cell, self.ran)

"""Measure cells in this process, in processes of its own or in the actors of a Ray cluster, each with one pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachekit.tools.bench.cells import Cell, Setting
from cachekit.tools.bench.results import Result
from cachekit.tools.bench.workbench import Ran, measure, no_news
from cachekit.tools.workers import FAILURES, Crew, Lost, failure_line

__all__ = ["Outcome", "SettingWork", "outcomes"]

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
        return f"{cell.label}: {failure_line(error)}"


@dataclass(frozen=True)
class SettingWork:
    """Work with one setting; a worker loads the pipeline with its first item."""

    setting: Setting

    @property
    def threads(self) -> int | None:
        """Threads of each worker."""
        return self.setting.threads

    @property
    def device(self) -> str | None:
        """Device of each worker."""
        return self.setting.device


@dataclass(frozen=True)
class _Measuring(SettingWork):
    """The measuring of cells."""

    ran: Ran

    def do(self, cell: Cell) -> Result | str:
        return attempt(self.setting, cell, self.ran)

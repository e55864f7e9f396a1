"""Put results of several seeds together, and say which plain pipelines a cached one must beat."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median, quantiles
from typing import Any

from cachekit.bench.cells import Cell, Method
from cachekit.bench.frechet import crowd, distance, is_enough
from cachekit.bench.measuring import steps_at
from cachekit.bench.results import Result, Sample

__all__ = ["Group", "Row", "groups"]


@dataclass
class Row:
    """Hold the samples of one contender over all captions and seeds."""

    cell: Cell
    results: list[Result] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """Return the samples of all seeds."""
        return [sample for result in self.results for sample in result.samples]

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return self.cell.label

    @property
    def seconds(self) -> float:
        """Return the median wall time of an image."""
        return median(sample.seconds for sample in self.samples)

    @property
    def spread(self) -> float | None:
        """Return the distance between the quartiles of the wall time, which one image does not have."""
        return _spread([sample.seconds for sample in self.samples])

    @property
    def first_seconds(self) -> float | None:
        """Return the median wall time of the first run, which no other figure holds, or None where none was timed."""
        timed = [result.first_seconds for result in self.results if result.first_seconds is not None]
        return median(timed) if timed else None

    @property
    def faster(self) -> float:
        """Return the median of how many times less an image took than the uncached one beside it."""
        return median(sample.uncached_seconds / sample.seconds for sample in self.samples)

    @property
    def macs(self) -> float:
        """Return the mean multiply-accumulates of an image."""
        return fmean(sample.macs for sample in self.samples)

    @property
    def fewer(self) -> float:
        """Return how many times fewer multiply-accumulates there were than uncached."""
        return fmean(sample.uncached_macs for sample in self.samples) / self.macs

    @property
    def deciding_seconds(self) -> float:
        """Return the median time spent in deciding what to reuse."""
        return median(sample.deciding_seconds for sample in self.samples)

    @property
    def cache_bytes(self) -> int | None:
        """Return the peak of bytes kept, or None where nobody counted."""
        return _maximum(sample.cache_bytes for sample in self.samples)

    @property
    def peak_memory(self) -> int | None:
        """Return the peak of memory on the device, or None without one."""
        return _maximum(sample.peak_memory for sample in self.samples)

    @property
    def psnr(self) -> float | None:
        """Return the median PSNR to the uncached image, infinite where most are identical."""
        return self._median(lambda sample: sample.psnr)

    @property
    def ssim(self) -> float | None:
        """Return the median SSIM to the uncached image."""
        return self._median(lambda sample: sample.ssim)

    @property
    def shown(self) -> float | None:
        """Return the share of images that show what their caption says."""
        verdicts = [sample.shown for sample in self.samples if sample.shown is not None]
        return fmean(verdicts) if verdicts else None

    @property
    def images(self) -> int:
        """Return how many images the Frechet distance is of."""
        return len(self._features)

    @property
    def frechet(self) -> float | None:
        """Return the Frechet distance of the images to true ones, or None where there are none or too few."""
        found, reference = self._features, self.results[0].reference
        if reference is None or not is_enough(len(found), len(reference.mean)):
            return None
        return distance(crowd(found), reference)

    @property
    def _features(self) -> list[list[float]]:
        return [sample.features for sample in self.samples if sample.features is not None]

    @property
    def metrics(self) -> dict[str, float]:
        """Return the mean of each learned metric."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.metrics)
        return {name: fmean(sample.metrics[name] for sample in self.samples) for name in names}

    @property
    def reused(self) -> int | None:
        """Return how many times something was reused in the first image, or None where nobody counted."""
        counts = self.results[0].counts
        return sum(count["reused"] for count in counts) if self.cell.method is Method.CACHEKIT else None

    @property
    def warnings(self) -> list[str]:
        """Return each warning once."""
        return list(dict.fromkeys(warning for result in self.results for warning in result.warnings))

    def plain_steps(self) -> dict[str, int]:
        """Return the numbers of plain steps that cost as many MACs, and as much wall time."""
        whole = self.cell.uncached_steps
        return {"MACs": steps_at(1 / self.fewer, whole), "wall time": steps_at(1 / self.faster, whole)}

    def _median(self, figure: Callable[[Sample], float | None]) -> float | None:
        values = [value for value in map(figure, self.samples) if value is not None]
        return median(values) if values else None


@dataclass
class Group:
    """Hold the rows that are compared with each other: one model, scheduler, number of steps and environment."""

    rows: list[Row]

    @property
    def cell(self) -> Cell:
        """Return a cell that stands for the group."""
        return self.rows[0].cell

    @property
    def environment(self) -> dict[str, Any]:
        """Return the environment of the measurements."""
        return self.rows[0].results[0].environment

    @property
    def uncached(self) -> Row:
        """Return the uncached pipeline as it ran beside all contenders."""
        # The images are the same beside every contender, and a crowd must not count one twice.
        largest = max(self.rows, key=lambda row: len(row.samples))
        plain = [
            Sample(
                caption=sample.caption,
                seconds=sample.uncached_seconds,
                uncached_seconds=sample.uncached_seconds,
                macs=sample.uncached_macs,
                uncached_macs=sample.uncached_macs,
                peak_memory=sample.uncached_peak_memory,
                psnr=None if sample.psnr is None else math.inf,
                ssim=None if sample.ssim is None else 1.0,
                shown=sample.uncached_shown,
                features=sample.uncached_features if row is largest else None,
                metrics=sample.uncached_metrics,
            )
            for row in self.rows
            for sample in row.samples
        ]
        cell = self.cell.model_copy(
            update={"method": Method.PLAIN, "specs": (), "steps": self.cell.uncached_steps, "seed": 0}
        )
        first = self.rows[0].results[0]
        own = {"cell": cell, "samples": plain, "counts": [], "warnings": [], "first_seconds": None}
        return Row(cell, [first.model_copy(update=own)])

    def plain(self, steps: int) -> Row | None:
        """Return the row of that many plain steps, if it was measured."""
        if steps == self.cell.uncached_steps:
            return self.uncached
        found = [row for row in self.rows if row.cell.method is Method.PLAIN and row.cell.steps == steps]
        return found[0] if found else None

    def baselines(self) -> list[Cell]:
        """Return the cells of plain steps that the group's contenders must be compared with, for their seeds."""
        wanted: dict[str, Cell] = {}
        for row in self.rows:
            if row.cell.method is Method.PLAIN:
                continue
            for steps in row.plain_steps().values():
                for result in row.results:
                    made = {"method": Method.PLAIN, "specs": (), "steps": steps}
                    cell = result.cell.model_copy(update=made)
                    wanted.setdefault(cell.id, cell)
        return [cell for cell in wanted.values() if cell.steps < cell.uncached_steps]


def groups(results: Iterable[Result]) -> list[Group]:
    """Return the results row by row, in groups that can be compared."""
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        rows.setdefault(result.cell.row, Row(result.cell)).results.append(result)
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows.values():
        found[row.cell.group].append(row)
    return [Group(sorted(listed, key=lambda row: _METHODS.index(row.cell.method))) for listed in found.values()]


_METHODS = [Method.CACHEKIT, Method.PUBLISHED, Method.DIFFUSERS, Method.CACHE_DIT, Method.PLAIN]


def _spread(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _maximum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None

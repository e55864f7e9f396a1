"""Summarize results over captions and seeds, and find the plain pipelines that a cached one must beat."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, median, median_low, quantiles
from typing import Any

from cachekit.tools.bench.cells import Cell, Method
from cachekit.tools.bench.frechet import distance, gaussian_stats, is_enough
from cachekit.tools.bench.measuring import steps_at
from cachekit.tools.bench.results import Result, Sample
from cachekit.tools.bench.spacing import absent, rivals

__all__ = ["Group", "Row", "groups"]


@dataclass
class Row:
    """The results of one contender over all captions and seeds, and its figures.

    A figure is None where it was not measured.
    """

    cell: Cell
    results: list[Result] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """The samples of all seeds."""
        return [sample for result in self.results for sample in result.samples]

    @property
    def is_uncached(self) -> bool:
        """Whether this is the uncached pipeline with all steps."""
        return self.cell.method is Method.PLAIN and self.cell.steps == self.cell.uncached_steps

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"uncached, {self.cell.steps} steps" if self.is_uncached else self.cell.label

    @property
    def seconds(self) -> float:
        """Median wall time of an image."""
        return median(sample.seconds for sample in self.samples)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the wall time, in seconds; None for a single image."""
        return _interquartile_range([sample.seconds for sample in self.samples])

    @property
    def first_seconds(self) -> float | None:
        """Median wall time of the first run, which counts towards no other figure."""
        return _median(result.first_seconds for result in self.results)

    @property
    def speedup(self) -> float:
        """Median of the ratios of the uncached wall time to that of the image beside it."""
        return median(sample.uncached_seconds / sample.seconds for sample in self.samples)

    @property
    def macs(self) -> float:
        """Mean MACs of an image: they differ between images only where a policy decides during the run."""
        return fmean(sample.macs for sample in self.samples)

    @property
    def mac_reduction(self) -> float:
        """Ratio of the uncached MACs to those of the row."""
        return fmean(sample.uncached_macs for sample in self.samples) / self.macs

    @property
    def deciding_seconds(self) -> float:
        """Median time spent in decisions of policies during a run."""
        return median(sample.deciding_seconds for sample in self.samples)

    @property
    def cache_bytes(self) -> int | None:
        """Peak bytes of cached tensors."""
        return _maximum(sample.cache_bytes for sample in self.samples)

    @property
    def peak_memory(self) -> int | None:
        """Peak bytes allocated on the GPU."""
        return _maximum(sample.peak_memory for sample in self.samples)

    @property
    def psnr(self) -> float | None:
        """Median PSNR to the uncached image in dB, infinite where most images are identical.

        Where half of them are, it is the greatest of the others.
        """
        known = [sample.psnr for sample in self.samples if sample.psnr is not None]
        found = _median(known)
        return median_low(known) if found == math.inf else found

    @property
    def ssim(self) -> float | None:
        """Median SSIM to the uncached image."""
        return _median(sample.ssim for sample in self.samples)

    @property
    def caption_match(self) -> float | None:
        """Share of images that show all that their caption says."""
        return fmean(self._verdicts) if self._verdicts else None

    @property
    def checked_images(self) -> int:
        """Number of images behind `caption_match`."""
        return len(self._verdicts)

    @property
    def frechet(self) -> float | None:
        """Frechet distance of the images to scenes rendered from their captions; None for too few images."""
        found, reference = self._features, self.results[0].reference
        if reference is None or not is_enough(len(found), len(reference.mean)):
            return None
        return distance(gaussian_stats(found), reference)

    @property
    def frechet_images(self) -> int:
        """Number of images behind `frechet`."""
        return len(self._features)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each learned metric."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.metrics)
        return {name: fmean(sample.metrics[name] for sample in self.samples) for name in names}

    @property
    def reused(self) -> int | None:
        """Number of reuses in the first image."""
        counts = self.results[0].counts
        return sum(count["reused"] for count in counts) if self.cell.method is Method.CACHEKIT else None

    @property
    def warnings(self) -> list[str]:
        """The distinct warnings."""
        return list(dict.fromkeys(warning for result in self.results for warning in result.warnings))

    def plain_steps(self) -> dict[str, int]:
        """Numbers of plain steps that cost as many MACs, and as much wall time."""
        whole = self.cell.uncached_steps
        return {"MACs": steps_at(1 / self.mac_reduction, whole), "wall time": steps_at(1 / self.speedup, whole)}

    @property
    def _verdicts(self) -> list[bool]:
        return [sample.shown for sample in self.samples if sample.shown is not None]

    @property
    def _features(self) -> list[list[float]]:
        return [sample.features for sample in self.samples if sample.features is not None]


@dataclass
class Group:
    """Rows that are compared with each other: one model, scheduler, number of steps and environment."""

    rows: list[Row]
    #: A line for each contender that could not be measured.
    left_out: list[str] = field(default_factory=list)

    @property
    def cell(self) -> Cell:
        """A cell with the fields that all rows share."""
        return self.rows[0].cell

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of the measurements."""
        return self.rows[0].results[0].environment

    @property
    def warnings(self) -> list[str]:
        """The distinct warnings of all rows."""
        return list(dict.fromkeys(warning for row in self.rows for warning in row.warnings))

    @property
    def uncached(self) -> Row:
        """The uncached pipeline as it ran beside all contenders."""
        # The images are the same beside every contender; statistics of images must not count one twice.
        largest = max(self.rows, key=lambda row: len(row.samples))
        runs: dict[tuple[int, str, float], Sample] = {}
        for row in (largest, *self.rows):
            for result in row.results:
                for sample in result.samples:
                    # One run may be the uncached run of several contenders.
                    run = (result.cell.seed, sample.caption, sample.uncached_seconds)
                    runs.setdefault(run, _uncached(sample, row is largest))
        cell = self.cell.plain(self.cell.uncached_steps).model_copy(update={"seed": 0})
        first = self.rows[0].results[0]
        own = {"cell": cell, "samples": [*runs.values()], "counts": [], "warnings": [], "first_seconds": None}
        return Row(cell, [first.model_copy(update=own)])

    @property
    def notes(self) -> list[str]:
        """A line for each contender that is left out, and for each spacing of plain steps that is."""
        reasons = dict.fromkeys(filter(None, map(absent, self.baselines())))
        return [*self.left_out, *(f"plain steps left out: {reason}" for reason in reasons)]

    def plain(self, steps: int) -> Row | None:
        """Row of that many plain steps with the scheduler's own spacing, if it was measured."""
        return next((row for row in self._plains(steps) if not row.cell.spacing), None)

    def best_plain(self, steps: int) -> Row | None:
        """Row of that many plain steps that is most similar to the uncached image, of all spacings measured."""
        rows = self._plains(steps)
        return max(rows, key=lambda row: -math.inf if row.psnr is None else row.psnr) if rows else None

    def gain_by_spacing(self, steps: int) -> float | None:
        """PSNR of the best spacing of plain steps over the scheduler's own, in dB; None without one of them."""
        own, best = self.plain(steps), self.best_plain(steps)
        if own is None or best is None or own.psnr is None or best.psnr is None:
            return None
        # Both may be identical to the uncached image, whose PSNR is infinite.
        return 0.0 if own is best or own.psnr == best.psnr else best.psnr - own.psnr

    def best_match(self, steps: int) -> Row | None:
        """Row of that many plain steps with the highest caption match, of all spacings measured; None without any."""
        rows = [row for row in self._plains(steps) if row.caption_match is not None]
        return max(rows, key=lambda row: row.caption_match or 0.0) if rows else None

    def _plains(self, steps: int) -> list[Row]:
        if steps == self.cell.uncached_steps:
            return [self.uncached]
        return [row for row in self.rows if row.cell.method is Method.PLAIN and row.cell.steps == steps]

    def baselines(self) -> list[Cell]:
        """Cells of plain steps that the contenders must be compared with, for each of their seeds.

        Without images there is only the scheduler's own spacing: another one costs the same.
        """
        contenders = [row for row in self.rows if row.cell.method is not Method.PLAIN]
        wanted = (
            (result.cell, steps, result.plan)
            for row in contenders
            for steps in row.plain_steps().values()
            for result in row.results
        )
        judged = any(row.psnr is not None for row in contenders)
        return [cell for cell in rivals(wanted) if judged or not cell.spacing]


def groups(results: Iterable[Result]) -> list[Group]:
    """Sort results into rows, and rows into groups that can be compared."""
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        rows.setdefault(result.cell.row, Row(result.cell)).results.append(result)
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows.values():
        found[row.cell.group].append(row)
    return [Group(sorted(listed, key=lambda row: _METHODS.index(row.cell.method))) for listed in found.values()]


_METHODS = [Method.CACHEKIT, Method.PUBLISHED, Method.DIFFUSERS, Method.CACHE_DIT, Method.PLAIN]


def _uncached(sample: Sample, with_images: bool) -> Sample:
    """Uncached half of a sample, with its features and its verdict only where its image is to be counted."""
    return Sample(
        caption=sample.caption,
        seconds=sample.uncached_seconds,
        uncached_seconds=sample.uncached_seconds,
        macs=sample.uncached_macs,
        uncached_macs=sample.uncached_macs,
        peak_memory=sample.uncached_peak_memory,
        psnr=None if sample.psnr is None else math.inf,
        ssim=None if sample.ssim is None else 1.0,
        shown=sample.uncached_shown if with_images else None,
        features=sample.uncached_features if with_images else None,
        metrics=sample.uncached_metrics,
    )


def _interquartile_range(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _maximum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None

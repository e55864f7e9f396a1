"""Measure candidates with the bench: on the pipeline of this process, or by the bench's executors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cachekit.errors import CachekitError, first_line
from cachekit.interface.presets import Figures
from cachekit.tools.bench.cells import Cell, Method, Setting
from cachekit.tools.bench.executors import outcomes
from cachekit.tools.bench.results import Result
from cachekit.tools.bench.subjects import Subject
from cachekit.tools.bench.suite import shared_fields
from cachekit.tools.bench.summary import groups
from cachekit.tools.bench.workbench import Contender, Workbench
from cachekit.tools.tuning.candidates import Candidate
from cachekit.tools.tuning.weights import Weights
from cachekit.tools.workers import FAILURES, Crew
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.pipelines import denoiser_of

__all__ = ["Measurer", "figures_of"]


@dataclass
class Measurer:
    """Measures candidates beside the uncached pipeline of `steps` steps.

    A serial crew shares the subject's pipeline; others load the setting's model anew, once in each worker.
    """

    setting: Setting
    subject: Subject
    scheduler: str
    steps: int
    seed: int
    weights: Weights
    crew: Crew
    _benches: dict[tuple[str, ...], Workbench] = field(default_factory=dict, init=False)

    @cached_property
    def model(self) -> str:
        """Digest of the denoiser's weights."""
        return fingerprint(denoiser_of(self.subject.pipe))

    @property
    def batch(self) -> int:
        """How many candidates are measured together."""
        return 4 if self.crew.name == "serial" else 4 * self.crew.workers

    def cell(self, candidate: Candidate, captions: Sequence[str], specs: Sequence[str] | None = None) -> Cell:
        """Make the cell of a candidate, with other `specs` in place of its own."""
        around = {"executor": self.crew.name, "workers": self.crew.workers}
        setting = self.setting.model_copy(update={"captions": tuple(captions)})
        return Cell(
            method=Method.CACHEKIT if candidate.specs else Method.PLAIN,
            specs=tuple(specs if specs is not None else candidate.specs),
            steps=candidate.steps,
            uncached_steps=self.steps,
            scheduler=self.scheduler,
            seed=self.seed,
            spacing=candidate.spacing,
            **shared_fields(setting, self.model, around),
        )

    def measure(self, candidates: Sequence[Candidate], captions: Sequence[str], place: int = 0) -> list[Result | str]:
        """Measure candidates over captions, together; the reason stands for the result of one that fails.

        `place` is that of the first caption among all that they are measured over: it counts for the noise.
        """
        specs = [self._resolved(candidate) for candidate in candidates]
        cells = [
            found if isinstance(found, str) else self.cell(candidate, captions, found)
            for candidate, found in zip(candidates, specs)
        ]
        return self.measure_cells(cells, captions, place)

    def measure_cells(self, cells: Sequence[Cell | str], captions: Sequence[str], place: int = 0) -> list[Result | str]:
        """Measure cells, in which reasons stand for those that can't be; otherwise as `measure`."""
        there = [one.model_copy(update={"seed": one.seed + place}) for one in cells if isinstance(one, Cell)]
        measured = iter((self._here if self.crew.name == "serial" else self._elsewhere)(there, captions))
        return [cell if isinstance(cell, str) else next(measured) for cell in cells]

    def _resolved(self, candidate: Candidate) -> tuple[str, ...] | str:
        """Specs with the files of their weights, which are made where they are needed; or why they can't be."""
        try:
            return self.weights.resolved(candidate)
        except CachekitError as error:
            return str(error)
        except FAILURES as error:
            return f"{type(error).__name__}: {first_line(error)}"

    def _here(self, cells: Sequence[Cell], captions: Sequence[str]) -> list[Result | str]:
        bench = self._bench(tuple(captions))
        prepared = [self._prepared(bench, cell) for cell in cells]
        contenders = [one for one in prepared if isinstance(one, Contender)]
        results = iter(bench.measure(contenders) if contenders else [])
        return [one if isinstance(one, str) else next(results) for one in prepared]

    def _prepared(self, bench: Workbench, cell: Cell) -> Contender | str:
        try:
            return bench.prepare(cell)
        except CachekitError as error:
            return str(error)
        except FAILURES as error:
            return f"{type(error).__name__}: {first_line(error)}"

    def _bench(self, captions: tuple[str, ...]) -> Workbench:
        if captions not in self._benches:
            setting = self.setting.model_copy(update={"captions": captions})
            self._benches[captions] = Workbench(setting, self.subject)
        return self._benches[captions]

    def _elsewhere(self, cells: Sequence[Cell], captions: Sequence[str]) -> list[Result | str]:
        setting = self.setting.model_copy(update={"captions": tuple(captions)})
        found = {cell.id: outcome for cell, outcome in outcomes(self.crew, setting, cells, lenient=True)}
        return [found[cell.id] for cell in cells]


def figures_of(results: Sequence[Result]) -> Figures:
    """Put together the figures of one candidate from its results over several lots of captions."""
    first = results[0]
    samples = [sample for result in results for sample in result.samples]
    (group,) = groups([first.model_copy(update={"samples": samples})])
    (row,) = group.rows
    judged = [sample.uncached_shown for sample in samples if sample.uncached_shown is not None]
    similar = row.psnr is not None and row.psnr != float("inf")
    return Figures(
        images=len(samples),
        psnr=row.psnr if similar else None,
        ssim=row.ssim,
        caption_match=row.caption_match,
        uncached_caption_match=sum(judged) / len(judged) if judged else None,
        checked=row.checked_images,
        macs=row.macs,
        mac_reduction=row.mac_reduction,
        seconds=row.seconds,
        speedup=row.speedup,
    )

"""Measure candidates with the bench: on the pipeline of this process, or by workers that share the captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from cachekit.errors import CachekitError
from cachekit.interface.presets import Figures
from cachekit.tools.bench.cells import Cell, Method, Setting
from cachekit.tools.bench.executors import SettingWork
from cachekit.tools.bench.results import Result
from cachekit.tools.bench.subjects import Subject
from cachekit.tools.bench.suite import shared_fields
from cachekit.tools.bench.summary import groups
from cachekit.tools.bench.workbench import Contender, Workbench, workbench
from cachekit.tools.tuning.candidates import Candidate
from cachekit.tools.tuning.weights import Weights
from cachekit.tools.workers import FAILURES, Crew, Lost, failure_line
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
        setting = _with(self.setting, tuple(captions))
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
        there = [cell for cell in cells if isinstance(cell, Cell)]
        found = self._shared_out(there, captions, place) if there else []
        measured = iter([_whole(outcomes) for outcomes in zip(*found)])
        return [cell if isinstance(cell, str) else next(measured) for cell in cells]

    def _resolved(self, candidate: Candidate) -> tuple[str, ...] | str:
        """Specs with the files of their weights, which are made where they are needed; or why they can't be."""
        try:
            return self.weights.resolved(candidate)
        except (CachekitError, *FAILURES) as error:
            return failure_line(error)

    def _shared_out(self, cells: Sequence[Cell], captions: Sequence[str], place: int) -> list[list[Result | str]]:
        """Measure all cells over each worker's share of the captions, beside the same uncached images."""
        if self.crew.name == "serial":
            share = _Share(tuple(cells), tuple(captions), place)
            return [share.measure(self._bench(share.captions))]
        # Where there are fewer captions than workers, they share out the cells too.
        count = min(self.crew.workers, len(captions))
        groups = min(self.crew.workers // count, len(cells))
        bounds = [piece * len(captions) // count for piece in range(count + 1)]
        shares = [
            [_Share(tuple(cells[group::groups]), tuple(captions[first:stop]), place + first) for group in range(groups)]
            for first, stop in pairwise(bounds)
        ]
        found = self._outcomes([share for piece in shares for share in piece])
        return [[found[piece[index % groups]][index // groups] for index in range(len(cells))] for piece in shares]

    def _outcomes(self, shares: Sequence[_Share]) -> dict[_Share, list[Result | str]]:
        """Measure shares; where a worker dies of one, each of its cells is measured alone."""
        found: dict[_Share, list[Result | str]] = {}
        lost: list[_Share] = []
        for share, outcome in self.crew.share_out(_Measuring(self.setting), shares):
            found[share] = [outcome.reason] * len(share.cells) if isinstance(outcome, Lost) else outcome
            if isinstance(outcome, Lost) and len(share.cells) > 1:
                lost.append(share)
        for share in lost:
            alone = [replace(share, cells=(cell,)) for cell in share.cells]
            again = self._outcomes(alone)
            found[share] = [again[one][0] for one in alone]
        return found

    def _bench(self, captions: tuple[str, ...]) -> Workbench:
        if captions not in self._benches:
            self._benches[captions] = Workbench(_with(self.setting, captions), self.subject)
        return self._benches[captions]


@dataclass(frozen=True)
class _Share:
    """Cells, and the captions over which one worker measures all of them; `place` is that of the first caption."""

    cells: tuple[Cell, ...]
    captions: tuple[str, ...]
    place: int

    def measure(self, bench: Workbench) -> list[Result | str]:
        """Measure the cells in turns; the reason stands for the result of one that doesn't run."""
        cells = [cell.model_copy(update={"seed": cell.seed + self.place}) for cell in self.cells]
        prepared = [_prepared(bench, cell) for cell in cells]
        contenders = [one for one in prepared if isinstance(one, Contender)]
        found = _attempted(bench, contenders)
        if isinstance(found, str) and len(contenders) > 1:
            return [replace(self, cells=(cell,)).measure(bench)[0] for cell in self.cells]
        results: Iterator[Result | str] = iter([found] if isinstance(found, str) else found)
        return [one if isinstance(one, str) else next(results) for one in prepared]


class _Measuring(SettingWork):
    """The measuring of shares."""

    def do(self, share: _Share) -> list[Result | str]:
        try:
            bench = workbench(_with(self.setting, share.captions))
        except FAILURES as error:
            return [failure_line(error)] * len(share.cells)
        return share.measure(bench)


def _with(setting: Setting, captions: tuple[str, ...]) -> Setting:
    return setting.model_copy(update={"captions": captions})


def _prepared(bench: Workbench, cell: Cell) -> Contender | str:
    try:
        return bench.prepare(cell)
    except (CachekitError, *FAILURES) as error:
        return failure_line(error)


def _attempted(bench: Workbench, contenders: Sequence[Contender]) -> list[Result] | str:
    try:
        return bench.measure(contenders) if contenders else []
    except (CachekitError, *FAILURES) as error:
        return failure_line(error)


def _whole(outcomes: Sequence[Result | str]) -> Result | str:
    """Put together the results of one cell over all shares; the first reason, where there is one."""
    reasons = [one for one in outcomes if isinstance(one, str)]
    results = [one for one in outcomes if isinstance(one, Result)]
    if reasons:
        return reasons[0]
    return results[0].model_copy(update={"samples": [sample for one in results for sample in one.samples]})


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

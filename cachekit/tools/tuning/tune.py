"""Tune: find the specs that reach a target on one pipeline, with evidence from captions of their own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachekit.costs.estimate import Estimator
from cachekit.files import unwritable_reason
from cachekit.interface.presets import HERE, Evidence, Preset, misfit_of
from cachekit.interface.specs import parse
from cachekit.models.architectures import guided_by_default
from cachekit.models.names import DEMOS, canonical
from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import Cell, Method, Setting, Spacing
from cachekit.tools.bench.spacing import absent
from cachekit.tools.bench.subjects import load, set_scheduler, subject_of
from cachekit.tools.bench.workbench import environment
from cachekit.tools.tuning.candidates import Candidate, Space
from cachekit.tools.tuning.captions import Lots, check_lengths, lots_of
from cachekit.tools.tuning.measuring import Measurer
from cachekit.tools.tuning.search import Budget, Progress, Search
from cachekit.tools.tuning.study import Journal, Measured
from cachekit.tools.tuning.targets import Targets, TuningError
from cachekit.tools.tuning.verdict import Judged, Verdict, judge
from cachekit.tools.tuning.weights import Weights, precision_of
from cachekit.tools.workers import Crew, check_executor, threads_of
from cachekit.upstream.calling import with_scheduler
from cachekit.upstream.pipelines import call_arguments, denoiser_of, without_progress
from cachekit.upstream.scales import scale_of
from cachekit.upstream.versions import versions

__all__ = ["Tuned", "movable", "tune"]


@dataclass(frozen=True)
class Tuned:
    """What a tuning has found.

    `measured` has all candidates of the search, `front` those that no other beats, the cheapest first. `verdict` has
    the figures on fresh captions, `preset` the best of them with its evidence, None where no cached candidate reaches
    the target. `refused` are the reasons for which candidates were not measured.
    """

    measured: list[Measured]
    front: list[Measured]
    verdict: Verdict
    preset: Preset | None
    refused: list[str]
    targets: Targets


def tune(
    model: Any,
    captions: int | Sequence[str] = 16,
    *,
    fresh: int | None = None,
    at_least: float | None = None,
    caption_match: float | None = None,
    at_most: float | None = None,
    speedup: float | None = None,
    policies: Collection[str] = (),
    trials: int = 40,
    seconds: float | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    executor: str = "serial",
    workers: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Find the specs that reach a target on a model, and judge them on captions that the search never used.

        tuned = cachekit.tune("demo", 16, at_least=35, output="fast.json")
        cachekit.apply(pipe, "preset:fast.json")

    `model` is a loaded pipeline, or what `cachekit bench` takes. `captions` are texts, of which the last `fresh` are
    kept for the verdict, by default half; for an embedded model the number of held-out ones that the search draws. All
    targets given must hold: `at_least` is a PSNR in dB to uncached images of `num_inference_steps` steps,
    `caption_match` the change of the share of images that show their captions (-0.01), `at_most` seconds for an image,
    `speedup` a ratio of wall times. Where a quality is asked, the cheapest that reaches it is the best; otherwise the
    most similar.

    `policies` are the names of those to try, by default all that find their sites. The search ends after `trials`
    measured candidates, or `seconds`. `journal` is a file that keeps the study: a stopped one resumes, and several
    processes may share it. The preset is written to `output`, beside weights that it needs. `executor` is as for the
    bench; a loaded pipeline is measured in this process alone.

    Raises `TuningError`, a `CachekitError`, for a target that makes no sense, captions that can't be used, and a
    journal with a study of something else.
    """
    targets = Targets(at_least, caption_match, at_most, speedup)
    check_executor(executor)
    named = isinstance(model, str)
    model = canonical(model) if named else model
    if not named and executor != "serial":
        raise TuningError(f"executor {executor!r} loads models by name; give the pipeline's folder, or executor serial")
    lots = lots_of(captions, fresh, named and model in DEMOS)
    setting = Setting(
        model=model if named else type(model).__name__,
        captions=lots.search,
        device=device,
        dtype=dtype,
        guidance=guidance_scale,
        threads=threads_of(executor, workers),
        # A search has too few images for Frechet distances.
        reference=False,
        pictures=0,
    )
    target_file = Path(output) if output is not None else None
    if target_file is not None:
        _check_file(target_file)
    # Threads are those of workers, not of the caller.
    subject = load(setting.model_copy(update={"threads": None})) if named else subject_of(model, setting)
    if not isinstance(captions, int):
        check_lengths(captions, subject.pipe)
    if targets.caption_match is not None and not subject.draws_scenes:
        raise TuningError(
            f"{setting.model}: whether images show their captions can be checked for {', '.join(DEMOS)} alone; ask for"
            " a similarity"
        )
    crew = Crew(executor, workers)
    with _scheduler_of(subject.pipe, scheduler) as name, without_progress(subject.pipe), crew:
        weights = Weights(subject, name, lots.weights, target_file and _beside(target_file))
        measurer = Measurer(setting, subject, name, num_inference_steps, seed, weights, crew)
        work = _Tuning(measurer, targets, lots, policies)
        return work.run(Budget(trials, seconds), Path(journal) if journal is not None else None, target_file, progress)


def _check_file(target: Path) -> None:
    """Refuse a file that can't be written, or whose path can't stand in the specs of weights beside it."""
    if reason := unwritable_reason(target):
        raise TuningError(f"cannot write {str(target)!r}: {reason}")
    # Candidates name the files of their weights, with their whole paths.
    if misfit := misfit_of(str(_beside(target))):
        raise TuningError(f"cannot put weights beside {str(target)!r}: its path {misfit}; write it elsewhere")


class _Tuning:
    """One tuning: its search, its verdict and its preset."""

    def __init__(self, measurer: Measurer, targets: Targets, lots: Lots, policies: Collection[str]) -> None:
        self._measurer, self._targets, self._lots, self._policies = measurer, targets, lots, policies
        self._pipe = measurer.subject.pipe

    def run(self, budget: Budget, journal: Path | None, output: Path | None, progress: Progress | None) -> Tuned:
        """Search, judge, and write the preset."""
        measurer, targets, show = self._measurer, self._targets, progress or (lambda done, total, line: None)
        spacings = [*self._spacings()]
        space = Space(denoiser_of(self._pipe), installed(), measurer.steps, spacings, self._policies)
        study = Journal(journal, self._key(space), targets, measurer.subject.draws_scenes, measurer.seed)
        estimator = Estimator.of(self._pipe, guided=guided_by_default(self._pipe, self._scale))
        Search(space, study, measurer, targets, self._lots.search, estimator).run(budget, show)
        show(budget.trials, budget.trials, "")
        verdict = judge(study, measurer, targets, self._lots.fresh, type(self._pipe))
        preset = self._preset(verdict.best, output) if verdict.best else None
        if preset and output:
            preset.save(output)
        return Tuned(study.measured, study.front(), verdict, preset, study.reasons, targets)

    def _key(self, space: Space) -> dict[str, Any]:
        """List what the figures of a study are of, and what it may try: a study of anything else is another."""
        measurer = self._measurer
        words = [str(value) for value in environment(measurer.setting).values()] if self._targets.by_time else []
        return {
            "model": measurer.model,
            "precision": precision_of(denoiser_of(self._pipe)),
            "scheduler": measurer.scheduler,
            "steps": measurer.steps,
            "guidance": self._scale,
            "captions": list(self._lots.search),
            "seed": measurer.seed,
            "cost": "wall time" if self._targets.by_time else "MACs",
            "environment": words,
            "policies": list(space.policies),
            "parts": space.parts,
        }

    @property
    def _scale(self) -> float | None:
        given = dict(self._measurer.subject.arguments(self._lots.search[0]))
        return scale_of(call_arguments(self._pipe, (), given))

    def _spacings(self) -> Iterator[str]:
        cell = self._measurer.cell(Candidate((), 1), self._lots.search)
        for spacing in ("", *(one.value for one in Spacing)):
            if not spacing or not absent(_plain(cell, spacing), type(self._pipe)):
                yield spacing

    def _preset(self, best: Judged, output: Path | None) -> Preset:
        measurer, pipe = self._measurer, self._pipe
        specs = measurer.weights.resolved(best.candidate)
        if output is not None:
            specs = tuple(movable(spec, output) for spec in specs)
        evidence = Evidence(
            pipeline=type(pipe).__name__,
            denoiser=type(denoiser_of(pipe)).__name__,
            model=measurer.model or None,
            scheduler=measurer.scheduler,
            steps=best.candidate.steps,
            reference_steps=measurer.steps,
            guidance=self._scale,
            target=[target.text for target in self._targets.listed],
            figures=best.figures,
            plain=best.plain,
            versions=_versions(),
        )
        return Preset(specs=list(specs), requires=_owners(best.candidate.specs), evidence=evidence)


@contextmanager
def _scheduler_of(pipe: Any, name: str | None) -> Iterator[str]:
    """Give a pipeline the scheduler that is tuned for, and its own back at the end."""
    with with_scheduler(pipe, pipe.scheduler):
        set_scheduler(pipe, name or type(pipe.scheduler).__name__)
        yield type(pipe.scheduler).__name__


def _plain(cell: Cell, spacing: str) -> Cell:
    return cell.model_copy(update={"method": Method.PLAIN, "specs": (), "spacing": spacing})


def _beside(output: Path) -> Path:
    """Folder for the weights of a preset."""
    return output.absolute().with_name(f"{output.stem}-weights")


def movable(spec: str, output: Path) -> str:
    """Write the path of weights beside a preset so that they may be moved together."""
    beside = _beside(output)
    return spec.replace(str(beside), f"{HERE}/{beside.name}")


def _owners(specs: Sequence[str]) -> dict[str, str]:
    """Distribution of each policy of the specs."""
    catalog = installed()
    names = dict.fromkeys(parse(spec, catalog).name for spec in specs)
    return {name: catalog.plugins[catalog.owners[f"policy {name!r}"]] for name in names}


def _versions() -> dict[str, str]:
    from cachekit.version import __version__

    return {"cachekit": __version__, **{name: str(value) for name, value in versions().items()}}

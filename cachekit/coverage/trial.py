"""Run one pipeline uncached and under each policy, and classify the outcome."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cachekit.applying import apply
from cachekit.coverage.branches import agrees, branches_of, expected
from cachekit.coverage.building import arguments, build
from cachekit.coverage.components import NotBuiltError
from cachekit.coverage.facts import facts_of
from cachekit.coverage.results import FAILS, IDLE, REFUSED, WORKS, Result, Sites, Trial
from cachekit.errors import CachekitError
from cachekit.interface.sites import Kind
from cachekit.interface.specs import split_specs
from cachekit.registry.catalog import installed
from cachekit.runs.report import Report
from cachekit.upstream.pipelines import denoisers_of

#: All numbers of a pipeline's output.
Output = list[np.ndarray[Any, Any]]


class Subject:
    """One small pipeline, with its uncached output and the branches of its calls."""

    def __init__(self, name: str) -> None:
        """Build the pipeline and run it twice.

        Raises `NotBuiltError` unless both outputs are finite and equal.
        """
        self.name = name
        self.pipe = build(name)
        self.uncached = self.run()
        if not all(np.isfinite(part).all() for part in self.uncached):
            raise NotBuiltError("its output is not finite")
        if not self.is_uncached(self.run()):
            raise NotBuiltError("two runs with one seed differ")
        self.branches = self._branches()

    def run(self, **changes: Any) -> Output:
        """Run the pipeline from a fixed seed, with some arguments changed."""
        torch.manual_seed(0)
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.pipe(**{**arguments(self.pipe, self.name), **changes})
        part = facts_of(self.name).output
        return list(_arrays(output[part] if part else output))

    def _branches(self) -> str:
        try:
            modules = list(denoisers_of(self.pipe).values())
            return branches_of(modules, lambda changes: self.run(**changes), arguments(self.pipe, self.name))
        except Exception:  # noqa: BLE001 - some pipelines refuse the changed prompt: then nothing is known
            return ""

    def is_uncached(self, output: Output) -> bool:
        """Whether an output equals the uncached one to the bit."""
        return same(output, self.uncached)


def examine(name: str, specs: Sequence[str]) -> Trial:
    """Try each spec on a pipeline class; every error becomes part of the trial."""
    try:
        subject = Subject(name)
    except NotBuiltError as error:
        return Trial(name, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a pipeline raises goes into the report
        because = facts_of(name).because
        return Trial(name, f"{f'{because}: ' if because else ''}{_where(error)}{last_line(error)}")
    trial = Trial(name, sites=dict(_sites(subject.pipe)), branches=subject.branches)
    for spec in specs:
        trial.results[spec] = _result(subject, spec)
        if trial.results[spec].state == FAILS:
            subject = Subject(name)
    return trial


def _result(subject: Subject, spec: str) -> Result:
    try:
        return attempt(subject, spec)
    except Exception as error:  # noqa: BLE001 - as above
        return Result(FAILS, f"{_where(error)}{last_line(error)}")


def attempt(subject: Subject, spec: str) -> Result:
    """Try one spec: apply, run, remove, run, and do it again."""
    try:
        cached, report = _cached(subject, spec)
    except CachekitError as error:
        if subject.is_uncached(subject.run()):
            return Result(REFUSED, str(error))
        return Result(FAILS, f"refused, and the image changed: {error}")
    if not subject.is_uncached(subject.run()):
        return Result(FAILS, "undone, the output is not what it was")
    loops = (*report.earlier, report)
    acted = {count.policy for one in loops for count in one.counts if count.reused}
    if not acted:
        return Result(IDLE, _why_idle(report)) if subject.is_uncached(cached) else Result(FAILS, "changes unasked")
    layout = loops[0].record.layout
    if not agrees(subject.branches, layout):
        return Result(FAILS, f"calls are for {subject.branches}, and are taken for {expected(layout)}")
    again, _ = _cached(subject, spec)
    if not same(again, cached):
        return Result(FAILS, "applied again, the output is not what it was")
    alone = f"{' and '.join(sorted(acted))} alone" if len(acted) < len(report.policies) else ""
    return Result(WORKS, "the output is the same" if subject.is_uncached(cached) else alone)


def _why_idle(report: Report) -> str:
    only_guidance = all(count.kind == Kind.GUIDANCE for count in report.counts)
    if only_guidance and not report.record.guided:
        return "one branch alone, without guidance or with an embedded one: nothing to drop"
    return f"the run ends after {report.steps} steps, before the policy begins"


def _cached(subject: Subject, spec: str) -> tuple[Output, Report]:
    """Run with a spec applied, and remove it.

    Raises `ArithmeticError` for an output that is not finite.
    """
    with apply(subject.pipe, split_specs(spec)) as attachment:
        output, report = subject.run(), attachment.report()
    if not all(np.isfinite(part).all() for part in output):
        raise ArithmeticError("the output is not finite")
    return output, report


def same(one: Output, other: Output) -> bool:
    """Whether two outputs are equal to the bit."""
    return len(one) == len(other) and all(np.array_equal(left, right) for left, right in zip(one, other))


def last_line(error: BaseException) -> str:
    """Format an error as the last line of its traceback."""
    lines = [line for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    return " ".join(lines[0].split()) if lines else type(error).__name__


def _where(error: BaseException) -> str:
    """Name the file and line that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: " if frames else ""


def _sites(pipe: Any) -> Iterator[tuple[str, Sites]]:
    try:
        found = denoisers_of(pipe)
    except CachekitError:
        return
    for denoiser in found.values():
        yield type(denoiser).__name__, sites_of(denoiser)


def sites_of(denoiser: Any) -> Sites:
    """Find the sites of a denoiser with the installed adapters."""
    try:
        adapter = installed().adapter_for(denoiser)
        sites = adapter.sites(denoiser)
    except CachekitError as error:
        return Sites("none", {}, note=str(error))
    kinds = Counter(str(site.kind) for site in sites.sites)
    return Sites(adapter.name, dict(sorted(kinds.items())), len(sites.regions), [len(chain) for chain in sites.chains])


def _arrays(output: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Find the arrays and numbers in a pipeline's output; texts and None are left out."""
    if isinstance(output, torch.Tensor):
        yield output.detach().float().numpy()
    elif isinstance(output, np.ndarray):
        yield output
    elif hasattr(output, "to_tuple"):
        yield from _arrays(output.to_tuple())
    elif isinstance(output, dict):
        yield from _arrays(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _arrays(part)
    elif hasattr(output, "getpixel"):
        yield np.asarray(output).astype(float)
    elif isinstance(output, (int, float)) and not isinstance(output, bool):
        yield np.asarray(float(output))

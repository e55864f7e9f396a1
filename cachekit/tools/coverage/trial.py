"""Run one pipeline uncached and under each policy, and classify the outcome."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachekit.applying import apply
from cachekit.errors import CachekitError, CalibrationError
from cachekit.interface.indicators import Indicator
from cachekit.interface.policy import Policy
from cachekit.interface.sites import Kind
from cachekit.interface.specs import parse_all, split_specs
from cachekit.registry.catalog import installed
from cachekit.runs.report import Report
from cachekit.tools.calibrating.calibrate import measured_in, measured_name
from cachekit.tools.calibrating.measured import Measured
from cachekit.tools.coverage.branches import agrees, branches_of, expected
from cachekit.tools.coverage.building import arguments, build
from cachekit.tools.coverage.components import NotBuiltError
from cachekit.tools.coverage.facts import facts_of
from cachekit.tools.coverage.results import FAILS, IDLE, REFUSED, WORKS, Result, Sites, Trial
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
    """Try one spec: apply, run, remove, run, and do it again; figures that it lacks are measured first."""
    try:
        policies = parse_all(split_specs(spec), installed())
    except CachekitError as error:
        return _refused(subject, error)
    try:
        return _tried(subject, policies)
    except CalibrationError as error:
        return _measured(subject, policies) if any(map(_lacks_figures, policies)) else _refused(subject, error)
    except CachekitError as error:
        return _refused(subject, error)


def _refused(subject: Subject, error: CachekitError) -> Result:
    if subject.is_uncached(subject.run()):
        return Result(REFUSED, str(error))
    return Result(FAILS, f"refused, and the image changed: {error}")


def _measured(subject: Subject, policies: Sequence[Policy]) -> Result:
    """Try policies with figures that are measured on the pipeline, and left out of the result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        try:
            found = _tried(subject, [_with_figures(subject, policy, file) for policy in policies])
        except CachekitError as error:
            found = _refused(subject, error)
    return Result(found.state, found.note.replace(f",file={file}", ""))


def _tried(subject: Subject, policies: Sequence[Policy]) -> Result:
    """Try policies; raises a `CachekitError` where they are refused."""
    cached, report = _cached(subject, policies)
    if not subject.is_uncached(subject.run()):
        return Result(FAILS, "undone, the output is not what it was")
    loops = (*report.earlier, report)
    acted = {count.policy for one in loops for count in one.counts if count.reused}
    if not acted:
        if not subject.is_uncached(cached):
            return Result(FAILS, "changes unasked")
        return Result(IDLE, _why_idle(subject.pipe, policies, report))
    layout = loops[0].record.layout
    if not agrees(subject.branches, layout):
        return Result(FAILS, f"calls are for {subject.branches}, and are taken for {expected(layout)}")
    again, _ = _cached(subject, policies)
    if not same(again, cached):
        return Result(FAILS, "applied again, the output is not what it was")
    alone = f"{' and '.join(sorted(acted))} alone" if len(acted) < len(report.policies) else ""
    return Result(WORKS, "the output is the same" if subject.is_uncached(cached) else alone)


def _lacks_figures(policy: Policy) -> bool:
    return getattr(policy, "file", "") is None and bool(measured_name(policy))


def _with_figures(subject: Subject, policy: Policy, file: Path) -> Policy:
    """Measure the figures that a policy lacks in an uncached run of the pipeline."""
    if not _lacks_figures(policy):
        return policy
    measured_in(subject.pipe, policy, lambda _: subject.run()).save(file)
    return policy.model_copy(update={"file": str(file)})


def _why_idle(pipe: Any, policies: Sequence[Policy], report: Report) -> str:
    only_guidance = all(count.kind == Kind.GUIDANCE for count in report.counts)
    if only_guidance and not report.record.guided:
        return "one branch alone, without guidance or with an embedded one: nothing to drop"
    if _decided(pipe, policies, report.steps):
        return "no change stayed below the threshold"
    return f"the run ends after {report.steps} steps, before the policy begins"


def _decided(pipe: Any, policies: Sequence[Policy], steps: int) -> bool:
    """Whether changes between the steps of a run decided that all of them are full."""
    schedules = [choice.when for policy in policies for choice in policy.chosen().values()]
    if any(isinstance(schedule, Measured) for schedule in schedules):
        return steps > 1
    if not any(isinstance(schedule, Indicator) for schedule in schedules):
        return False
    with apply(pipe, policies) as attachment:
        return any("?" in marks[1:] for *_, marks in attachment.plan(steps).columns())


def _cached(subject: Subject, policies: Sequence[Policy]) -> tuple[Output, Report]:
    """Run with policies applied, and remove them.

    Raises `ArithmeticError` for an output that is not finite.
    """
    with apply(subject.pipe, policies) as attachment:
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

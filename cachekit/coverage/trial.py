"""Run one pipeline uncached and with each policy, and say what came of it."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from cachekit.applying import apply
from cachekit.coverage.branches import agrees, branches_of, expected
from cachekit.coverage.building import arguments, build
from cachekit.coverage.facts import facts_of
from cachekit.coverage.parts import NotBuiltError
from cachekit.errors import CachekitError
from cachekit.interface.sites import Kind
from cachekit.registry.catalog import installed
from cachekit.reports.report import Report
from cachekit.upstream.pipelines import denoisers_of

WORKS, REFUSED, IDLE, FAILS = "works", "refused", "idle", "fails"
STATES = (WORKS, REFUSED, IDLE, FAILS)
#: What stands between the specs of a composition.
JOIN = "+"


@dataclass
class Result:
    """Hold what came of one policy on one pipeline: the state and one line about it."""

    state: str
    note: str = ""


@dataclass
class Sites:
    """Hold what an adapter names in one denoiser class."""

    adapter: str
    kinds: dict[str, int]
    regions: int = 0
    chains: list[int] = field(default_factory=list)
    note: str = ""


@dataclass
class Trial:
    """Hold what came of one pipeline: why it was not built, or each policy's result."""

    pipeline: str
    reason: str = ""
    results: dict[str, Result] = field(default_factory=dict)
    sites: dict[str, Sites] = field(default_factory=dict)
    branches: str = ""

    @property
    def built(self) -> bool:
        """Tell whether the pipeline was built and gave the same finite output twice."""
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """Return what `as_dict` gave."""
        results = {spec: Result(**result) for spec, result in data["results"].items()}
        sites = {name: Sites(**found) for name, found in data["sites"].items()}
        return cls(data["pipeline"], data["reason"], results, sites, data["branches"])


class Subject:
    """Own one small pipeline, its call and its uncached output."""

    def __init__(self, name: str) -> None:
        """Build the pipeline and run it twice; raise `NotBuiltError` unless both outputs are finite and equal."""
        self.name = name
        self.pipe = build(name)
        self.plain = self.run()
        if not all(np.isfinite(part).all() for part in self.plain):
            raise NotBuiltError("its output is not finite")
        if not self.is_plain(self.run()):
            raise NotBuiltError("two runs with one seed differ")
        self.branches = self._branches()

    def run(self, **changes: Any) -> list[np.ndarray[Any, Any]]:
        """Return all numbers of the output of a run, with some arguments changed."""
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
        except Exception:  # noqa: BLE001 - it may be that another prompt cannot be read: then nothing is known
            return ""

    def is_plain(self, output: list[np.ndarray[Any, Any]]) -> bool:
        """Tell whether an output equals the uncached one to the bit."""
        return same(output, self.plain)


def examine(name: str, specs: Sequence[str]) -> Trial:
    """Return what comes of a pipeline class under each spec; nothing is raised."""
    try:
        subject = Subject(name)
    except NotBuiltError as error:
        return Trial(name, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a pipeline raises is what the report says
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
    """Return what comes of one spec: it acts and is undone, is refused, never acts, or goes wrong."""
    try:
        cached, report = _cached(subject, spec)
    except CachekitError as error:
        unharmed = subject.is_plain(subject.run())
        return Result(REFUSED, str(error)) if unharmed else Result(FAILS, f"refused, and the image changed: {error}")
    if not subject.is_plain(subject.run()):
        return Result(FAILS, "undone, the output is not what it was")
    loops = (*report.earlier, report)
    acted = {count.policy for one in loops for count in one.counts if count.reused}
    if not acted:
        return Result(IDLE, _why_idle(report)) if subject.is_plain(cached) else Result(FAILS, "changes unasked")
    layout = loops[0].record.layout
    if not agrees(subject.branches, layout):
        return Result(FAILS, f"calls are for {subject.branches}, and are taken for {expected(layout)}")
    again, _ = _cached(subject, spec)
    if not same(again, cached):
        return Result(FAILS, "applied again, the output is not what it was")
    alone = f"{' and '.join(sorted(acted))} alone" if len(acted) < len(report.policies) else ""
    return Result(WORKS, "the output is the same" if subject.is_plain(cached) else alone)


def _why_idle(report: Report) -> str:
    only_guidance = all(count.kind == Kind.GUIDANCE for count in report.counts)
    if only_guidance and not report.record.guided:
        return "one branch alone, without guidance or with an embedded one: nothing to drop"
    return f"the run ends after {report.steps} steps, before the policy begins"


def _cached(subject: Subject, spec: str) -> tuple[list[np.ndarray[Any, Any]], Report]:
    """Return the output under a spec, and what it did; the spec is removed again."""
    with apply(subject.pipe, spec.split(JOIN)) as attachment:
        output, report = subject.run(), attachment.report()
    if not all(np.isfinite(part).all() for part in output):
        raise ArithmeticError("the output is not finite")
    return output, report


def same(one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]) -> bool:
    """Tell whether two outputs are equal to the bit."""
    return len(one) == len(other) and all(np.array_equal(left, right) for left, right in zip(one, other))


def last_line(error: BaseException) -> str:
    """Return an error as the last line of its traceback would."""
    lines = [line for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    return " ".join(lines[0].split()) if lines else type(error).__name__


def _where(error: BaseException) -> str:
    """Return the file and line of the innermost frame."""
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
    """Return what the installed adapters name in a denoiser."""
    try:
        adapter = installed().adapter_for(denoiser)
        sites = adapter.sites(denoiser)
    except CachekitError as error:
        return Sites("none", {}, note=str(error))
    kinds = Counter(str(site.kind) for site in sites.sites)
    return Sites(adapter.name, dict(sorted(kinds.items())), len(sites.regions), [len(chain) for chain in sites.chains])


def _arrays(output: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield every number of a pipeline's output as an array, texts and none left out."""
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

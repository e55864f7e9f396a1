"""Run checks of policies on models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from cachekit.errors import CachekitError, nearest
from cachekit.interface.policy import Policy
from cachekit.interface.specs import Spec, parse_all, split_specs
from cachekit.registry.catalog import Catalog, installed
from cachekit.testing.models import MODELS, forget
from cachekit.testing.results import CheckFailedError, NotApplicableError, Outcome, Result
from cachekit.testing.subject import Subject
from cachekit.testing.table import CHECKS, Check

#: The check that a policy works on any of the models at all.
SOMEWHERE = "check_works_somewhere"


def check_policy(
    spec: Spec,
    *,
    models: Iterable[str] = (),
    checks: Iterable[str] = (),
    expected: Mapping[str, str] | None = None,
    catalog: Catalog | None = None,
    show: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check a policy on tiny models; by default every check on each model.

    `spec` is a policy, or a spec of one or several. `expected` has reasons for checks that are expected to fail: one
    that passes nevertheless is a failure. `show` is called with each result.

    Raises `CachekitError` for unknown names, and `SpecError` where the spec doesn't parse.
    """
    known = catalog or installed()
    policies = parsed(spec, known)
    names, wanted = chosen(models, MODELS, "model"), chosen(checks, {**CHECKS, SOMEWHERE: None}, "check")
    reasons = dict(expected or {})
    chosen(reasons, {**CHECKS, SOMEWHERE: None}, "check")
    subjects = [Subject(policies, name, known) for name in names]
    results = []
    for result in _results(subjects, wanted, reasons):
        results.append(result)
        show(result)
    return results


def _results(subjects: Sequence[Subject], wanted: Sequence[str], reasons: Mapping[str, str]) -> Iterator[Result]:
    for subject in subjects:
        for name in wanted:
            if name != SOMEWHERE:
                yield as_expected(result_of(CHECKS[name], subject), reasons)
    if SOMEWHERE in wanted:
        yield as_expected(works_somewhere(subjects), reasons)


def parsed(spec: Spec, catalog: Catalog) -> tuple[Policy, ...]:
    """Parse a spec, or several joined by `+`; a policy is taken as it is."""
    return parse_all(split_specs(spec) if isinstance(spec, str) else spec, catalog)


def chosen(given: Iterable[str], known: Mapping[str, object], noun: str) -> list[str]:
    """Check names, by default all; raises `CachekitError` for an unknown one."""
    names = list(given) or list(known)
    for name in names:
        if name not in known:
            raise CachekitError(f"unknown {noun} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return names


def result_of(check: Check, subject: Subject) -> Result:
    """Make one check; whatever the policy raises is a failure."""

    def result(outcome: Outcome, note: str = "") -> Result:
        return Result(check.name, subject.model.name, subject.spec, outcome, " ".join(note.split()))

    with _quietly():
        try:
            if subject.refusal:
                return result(Outcome.REFUSED, subject.refusal)
            if subject.error is not None and not check.static:
                return result(Outcome.SKIPPED, "it doesn't run: see check_runs")
            check.run(subject)
        except NotApplicableError as reason:
            return result(Outcome.SKIPPED, str(reason))
        except Exception as error:  # noqa: BLE001 - a policy may raise anything
            forget()
            return result(Outcome.FAILED, f"{_described(error)}; likely cause: {check.cause}")
    return result(Outcome.PASSED)


def works_somewhere(subjects: Sequence[Subject]) -> Result:
    """Whether one of the models takes the policy, which then reuses something."""
    refusals = [subject.refusal for subject in subjects]
    reusing = [not subject.refusal and (subject.error is not None or subject.reuses) for subject in subjects]
    name, spec = ("any", subjects[0].spec) if len(subjects) > 1 else (subjects[0].model.name, subjects[0].spec)
    if any(reusing):
        return Result(SOMEWHERE, name, spec, Outcome.PASSED)
    note = refusals[0] if all(refusals) else "nothing is reused on a model that takes it"
    return Result(SOMEWHERE, name, spec, Outcome.FAILED, f"{'refused everywhere: ' * all(refusals)}{note}")


def as_expected(result: Result, reasons: Mapping[str, str]) -> Result:
    """Turn a failure that is expected into one with its reason, and a success that isn't into a failure."""
    reason = reasons.get(result.check)
    if reason is None or result.outcome in (Outcome.SKIPPED, Outcome.REFUSED):
        return result
    if result.outcome is Outcome.FAILED:
        return Result(result.check, result.model, result.spec, Outcome.EXPECTED, reason)
    note = f"passes, though it is expected to fail ({reason}); take it off the list"
    return Result(result.check, result.model, result.spec, Outcome.FAILED, note)


def _described(error: Exception) -> str:
    if isinstance(error, (CheckFailedError, CachekitError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Compute with one thread, the fastest for models as small as these, and without warnings of each run."""
    loggers = [logging.getLogger(name) for name in ("cachekit", "diffusers")]
    before = torch.get_num_threads(), [logger.level for logger in loggers]
    torch.set_num_threads(1)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before[0])
        for logger, level in zip(loggers, before[1]):
            logger.setLevel(level)

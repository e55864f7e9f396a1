"""Checks as parameters of a pytest test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachekit.errors import CachekitError
from cachekit.interface.specs import Spec
from cachekit.registry.catalog import Catalog, installed
from cachekit.testing.models import MODELS
from cachekit.testing.results import CheckFailedError, Outcome, Result
from cachekit.testing.running import SOMEWHERE, chosen, parsed, result_of, works_somewhere
from cachekit.testing.subject import Subject
from cachekit.testing.table import CHECKS


@dataclass(frozen=True)
class Case:
    """One check of one policy on one model: call it to make the check."""

    check: str
    model: str
    subjects: tuple[Subject, ...] = field(repr=False)

    def result(self) -> Result:
        """Make the check."""
        if self.check == SOMEWHERE:
            return works_somewhere(self.subjects)
        return result_of(CHECKS[self.check], self.subjects[0])

    def __call__(self) -> None:
        """Make the check: raises where it fails, and skips the test where there is nothing to check."""
        import pytest

        result = self.result()
        if result.outcome is Outcome.FAILED:
            raise CheckFailedError(str(result))
        if result.outcome is not Outcome.PASSED:
            pytest.skip(f"{result.outcome.value}: {result.note}")

    def __str__(self) -> str:
        """Write the identifier of the test."""
        return f"{self.check}-{self.model}-{self.subjects[0].spec}"


def parametrize_with_checks(
    specs: Iterable[Spec],
    *,
    models: Iterable[str] = (),
    checks: Iterable[str] = (),
    expected: Mapping[str, str] | None = None,
    catalog: Catalog | None = None,
) -> Any:
    """Make a decorator that parametrizes the argument `check` of a pytest test, which has to call it.

        @parametrize_with_checks(["my_policy", MyPolicy(interval=4)], expected={"check_linear_ramp": "a mean"})
        def test_my_policy(check):
            check()

    Each of `specs` is a policy, or a spec of one or several. Checks in `expected` have to fail, and have a reason. By
    default every check is made on each model; the names are in `CHECKS` and `MODELS`.
    """
    import pytest

    if isinstance(specs, str):
        raise CachekitError(f"specs {specs!r}: is a string; give a list of specs")
    known, reasons = catalog or installed(), dict(expected or {})
    chosen(reasons, {**CHECKS, SOMEWHERE: None}, "check")
    wanted = chosen(checks, {**CHECKS, SOMEWHERE: None}, "check")
    names = chosen(models, MODELS, "model")
    cases = [case for spec in specs for case in _cases(spec, names, wanted, known)]
    return pytest.mark.parametrize("check", [_param(case, reasons) for case in cases])


def _cases(spec: Spec, models: Sequence[str], checks: Sequence[str], catalog: Catalog) -> list[Case]:
    policies = parsed(spec, catalog)
    subjects = tuple(Subject(policies, name, catalog) for name in models)
    cases = [Case(name, one.model.name, (one,)) for one in subjects for name in checks if name != SOMEWHERE]
    return [*cases, *([Case(SOMEWHERE, "any", subjects)] if SOMEWHERE in checks else [])]


def _param(case: Case, reasons: Mapping[str, str]) -> Any:
    import pytest

    reason = reasons.get(case.check)
    marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True, raises=CheckFailedError)]
    return pytest.param(case, id=str(case), marks=marks)

"""Results of checks, and how a check ends early."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CheckFailedError(AssertionError):
    """An invariant that doesn't hold: what differs, at which site and in which step, where that is known."""


class NotApplicableError(Exception):
    """A check that has nothing to look at, with the reason."""


class Outcome(str, Enum):
    """How a check ended.

    `REFUSED` is a model that the policy refuses in `apply`, or for its guidance or sample when the run begins.
    `EXPECTED` is a failure for which a reason was given beforehand.
    """

    PASSED = "passed"
    FAILED = "failed"
    EXPECTED = "expected failure"
    SKIPPED = "skipped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Result:
    """The outcome of one check of one policy on one model, and its reason in one line."""

    check: str
    model: str
    spec: str
    outcome: Outcome
    note: str = ""

    def __str__(self) -> str:
        """Write the result in one line."""
        return f"{self.outcome.value}: {self.check} of {self.spec} on {self.model}{self.note and ': '}{self.note}"

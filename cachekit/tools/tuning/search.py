"""The search: what is tried, refused before anything is drawn, measured on a few images and, if it may win, on more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachekit.costs.estimate import Estimator
from cachekit.errors import CachekitError
from cachekit.tools.bench.results import Result
from cachekit.tools.tuning.candidates import Candidate, Space
from cachekit.tools.tuning.measuring import Measurer, figures_of
from cachekit.tools.tuning.study import Journal
from cachekit.tools.tuning.targets import LEAST, Targets

__all__ = ["Budget", "Progress", "Search"]

#: Called with the number of candidates measured, of all that will be, and a line about the last one, "" for none.
Progress = Callable[[int, int, str], None]
#: Images that every candidate is measured on.
_FEW = 2
#: How far a candidate may lie behind on a few images, in dB, to be measured on more.
_MARGIN = 1.5
#: The share of an asked speedup that the MACs must promise.
_PROMISE = 0.8
#: Trials that may be refused for each of the budget; one that fails counts as so many.
_REFUSALS = 20


@dataclass(frozen=True)
class Budget:
    """When to stop: after `trials` measured candidates in the whole study, or `seconds` of this process."""

    trials: int
    seconds: float | None = None


@dataclass
class Search:
    """Searches a space for candidates that reach the targets."""

    space: Space
    journal: Journal
    measurer: Measurer
    targets: Targets
    captions: Sequence[str]
    estimator: Estimator
    _refused: dict[Candidate, str] = field(default_factory=dict, init=False)
    _variations: list[list[dict[str, Any]]] = field(default_factory=list, init=False)

    def run(self, budget: Budget, progress: Progress) -> None:
        """Try candidates until the budget is spent; what is measured is in the journal at once."""
        end = math.inf if budget.seconds is None else time.monotonic() + budget.seconds
        for ladder in self.space.beginnings():
            self.journal.enqueue(ladder)
        self._variations = [*self.space.variations()]
        refused, most = 0, _REFUSALS * budget.trials
        while (done := len(self.journal.measured)) < budget.trials and time.monotonic() < end:
            if refused > most:
                reason = "too many candidates were refused or failed; name policies that fit"
                progress(done, budget.trials, f"the rest: {reason}")
                return
            progress(done, budget.trials, "")
            with self.journal.begun_again():
                wanted = min(self.measurer.batch, budget.trials - done)
                chosen, more = self._choose(wanted, most - refused, end)
                refused += more
                refused += _REFUSALS * self._measure(chosen, progress, done, budget.trials)
        progress(len(self.journal.measured), budget.trials, "")

    def _choose(self, wanted: int, most: int, end: float) -> tuple[list[tuple[Any, Candidate]], int]:
        """Choose candidates until so many are `wanted`, more than `most` are refused, or time ends; count refusals."""
        chosen: list[tuple[Any, Candidate]] = []
        refused = 0
        while len(chosen) < wanted and refused <= most and time.monotonic() < end:
            # Other numbers come before what is proposed freely, and after greater intervals that a batch may ask for.
            while self._variations and not self.journal.has_waiting:
                if chosen:
                    return chosen, refused
                self.journal.enqueue(self._variations.pop(0))
            trial = self.journal.ask()
            found = self._accepted(trial, [candidate for _, candidate in chosen])
            refused += found is None
            chosen += [(trial, found)] if found else []
        return chosen, refused

    # -- before anything is drawn -------------------------------------------------------------------------

    def _accepted(self, trial: Any, beside: Sequence[Candidate]) -> Candidate | None:
        """Make a trial's candidate; end the trial where there is a reason not to measure it."""
        candidate = None
        try:
            candidate = self.space.choose(trial)
            reason = self._refused.get(candidate) or self._refusal(candidate, beside)
        except CachekitError as error:
            reason = str(error)
        if not reason:
            return candidate
        if candidate is not None:
            self._refused[candidate] = reason
        self.journal.refuse(trial, candidate, reason)
        self.journal.climb(trial)  # more may be saved there
        return None

    def _refusal(self, candidate: Candidate, beside: Sequence[Candidate]) -> str:
        """Why a candidate need not be measured, "" where it must; raises `CachekitError` where it can't be."""
        if candidate in beside or any(one.candidate == candidate for one in self.journal.measured):
            return f"{candidate.label}: measured already"
        saving, certain = self._promised(candidate)
        least = max(LEAST, _PROMISE * self.targets.speedup if self.targets.speedup else 0.0)
        if certain and saving < least:
            return f"{candidate.label}: saves {saving:.2f}x MACs by the estimate, less than {least:.2f}x"
        return ""

    def _promised(self, candidate: Candidate) -> tuple[float, bool]:
        """Ratio of MACs by the estimate, and whether the run can't differ from it."""
        steps = self.measurer.steps
        if not candidate.specs:
            return steps / candidate.steps, True
        found = self.estimator(candidate.specs, candidate.steps)
        certain = not any("?" in marks for *_, marks in found.plan.columns())
        return found.baseline_macs * steps / candidate.steps / found.macs, certain

    # -- measuring ----------------------------------------------------------------------------------------

    def _measure(self, chosen: Sequence[tuple[Any, Candidate]], progress: Progress, done: int, total: int) -> int:
        """Measure candidates; return how many have failed."""
        if not chosen:
            return 0
        few, more = self.captions[:_FEW], self.captions[_FEW:]
        first = self.measurer.measure([candidate for _, candidate in chosen], few)
        held: dict[int, list[Result]] = {
            place: [outcome] for place, outcome in enumerate(first) if isinstance(outcome, Result)
        }
        surviving = [place for place in held if self._may_win(held, place)]
        if surviving and more:
            outcomes = self.measurer.measure([chosen[place][1] for place in surviving], more, _FEW)
            for place, outcome in zip(surviving, outcomes):
                held[place] += [outcome] if isinstance(outcome, Result) else []
        for place, (trial, candidate) in enumerate(chosen):
            failure = first[place]
            if isinstance(failure, str):
                self._refused[candidate] = failure
                self.journal.refuse(trial, candidate, failure)
                progress(done, total, f"{candidate.label}: {failure}")
            else:
                self.journal.add(trial, candidate, figures_of(held[place]))
                if place in surviving:
                    self.journal.climb(trial)
        return sum(isinstance(outcome, str) for outcome in first)

    def _may_win(self, held: dict[int, list[Result]], place: int) -> bool:
        """Whether nothing measured is clearly better than a candidate on a few images."""
        own = figures_of(held[place])
        others = [figures_of(results) for other, results in held.items() if other != place]
        others += [one.figures for one in self.journal.measured]
        return not any(self.journal.beats(other, own, _MARGIN) for other in others)

"""Tell what a run did: computed, stored, reused and missed, and what that saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cachekit.errors import CostError
from cachekit.interface.policy import Action
from cachekit.planning.assignments import Assignment

if TYPE_CHECKING:
    from cachekit.reports.record import Cost, Record


@dataclass(frozen=True)
class Count:
    """Count what one policy did at one kind of site: calls of modules, or of the denoiser for guidance."""

    policy: str
    kind: str
    targets: int
    computed: int
    stored: int
    reused: int
    missed: int


class Report:
    """Hold the figures of one run; `str(report)` prints them.

    `earlier` are the reports of runs that ended before it within the same call of a pipeline, such as a prior's.
    `steps` counts the loop's iterations that were reached, `calls` the denoiser's forwards. Costs are counted
    on demand, by replaying the run's distinct steps without values.
    """

    def __init__(self, assignments: Sequence[Assignment], record: Record, cost: Callable[[Record], Cost]) -> None:
        """Report on `record`; `cost` counts what its calls cost when asked for."""
        self.record = record
        self._assignments = assignments
        self._cost = cost
        self.earlier: tuple[Report, ...] = ()

    @property
    def steps(self) -> int:
        """Return how many steps were reached."""
        return len(self.record.rows)

    @property
    def calls(self) -> int:
        """Return how many times the denoiser ran."""
        return len(self.record.calls)

    @property
    def policies(self) -> list[str]:
        """Return the names of the policies."""
        return list(dict.fromkeys(bound.policy.name for bound in self._assignments))

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the plain arguments (numbers, texts) of the pipeline's call; empty for a bare loop."""
        return self.record.arguments

    @property
    def cache_bytes(self) -> int:
        """Return the peak of bytes kept."""
        return self.record.peak_bytes

    @property
    def deciding_seconds(self) -> float:
        """Return the time spent in finding steps, composing rows and observing."""
        return self.record.deciding_seconds

    @property
    def traces(self) -> dict[str, list[Any]]:
        """Return what observing policies wrote down, by policy."""
        return self.record.traces

    @cached_property
    def cost(self) -> Cost:
        """Return the multiply-accumulates run and those of the same calls without any policy."""
        return self._cost(self.record)

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of Linear and convolution layers that ran."""
        return self.cost.macs

    @property
    def baseline_macs(self) -> int:
        """Return the multiply-accumulates of the same calls uncached."""
        return self.cost.baseline_macs

    @property
    def counts(self) -> list[Count]:
        """Return the counts per policy and kind of site."""
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, bound in enumerate(self._assignments):
            groups[str(bound.policy), str(bound.target.kind)].append(index)
        return [self._count(policy, kind, group) for (policy, kind), group in groups.items()]

    def _count(self, policy: str, kind: str, group: list[int]) -> Count:
        def total(action: Action) -> int:
            return sum(self.record.counts[index][action] for index in group)

        missed = sum(self.record.missed[index] for index in group)
        numbers = (total(Action.COMPUTE), total(Action.STORE), total(Action.REUSE), missed)
        return Count(policy, kind, len(group), *numbers)

    @property
    def warnings(self) -> list[str]:
        """Return one line per policy that changed nothing, and per policy that had to throw something away."""
        fired: dict[str, bool] = {}
        for count in (count for report in (*self.earlier, self) for count in report.counts):
            fired[count.policy] = fired.get(count.policy, False) or count.reused > 0
        branches = "guided" if self.record.guided else "unguided"
        return [
            f"{policy} never fired in this run of {self.steps} {branches} steps"
            for policy, did in fired.items()
            if not did
        ] + self._discarded()

    def _discarded(self) -> list[str]:
        steps: dict[tuple[str, str], list[int]] = defaultdict(list)
        for policy, step, why in self.record.discarded:
            steps[policy, why].append(step)
        return [
            f"{policy}: {_outputs(len(at))} at {_places(at)} {_were(at)} {why} and {_were(at)} not kept:"
            " computed instead"
            for (policy, why), at in steps.items()
        ]

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """Return (spec, name of the target) of what was computed throughout, to fit into `max_cache_bytes`."""
        indices = sorted(self.record.fit.dropped) if self.record.fit else []
        return [(str(self._assignments[i].policy), self._assignments[i].target.name) for i in indices]

    @property
    def needed_bytes(self) -> int:
        """Return the peak of bytes that a run without `max_cache_bytes` would have kept, as planned."""
        fit = self.record.fit
        return fit.needed if fit and fit.needed else self.cache_bytes

    def _budget_lines(self) -> list[str]:
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for index in self.record.fit.dropped if self.record.fit else ():
            counts[str(self._assignments[index].policy), str(self._assignments[index].target.kind)] += 1
        if not counts:
            return []
        given_up = ", ".join(f"{policy} {kind} x {count}" for (policy, kind), count in sorted(counts.items()))
        return [f"without the limit {self.needed_bytes:,} bytes; computed to save bytes: {given_up}"]

    def _cost_line(self) -> str:
        try:
            cost = self.cost
        except CostError as error:
            return f"MACs unknown: {error}"
        return f"MACs {cost.macs:,} of {cost.baseline_macs:,} ({cost.speedup:.2f}x fewer)"

    def __str__(self) -> str:
        """Return the report as text."""
        lines = [line for report in self.earlier for line in (str(report), "")]
        lines += [
            f"steps {self.steps}, denoiser calls {self.calls}, {'guided' if self.record.guided else 'unguided'}",
            self._cost_line(),
            f"kept at peak {self.cache_bytes:,} bytes, deciding {self.deciding_seconds * 1e3:.1f} ms",
        ]
        lines += self._budget_lines()
        if self.record.shortened:
            lines.append(f"ControlNet: {self.record.shortened} calls left out what would have been thrown away")
        for count in self.counts:
            lines.append(
                f"{count.policy} {count.kind} x {count.targets}: computed {count.computed}, stored {count.stored},"
                f" reused {count.reused}, missed {count.missed}"
            )
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def _outputs(count: int) -> str:
    return "1 output" if count == 1 else f"{count} outputs"


def _were(steps: Sequence[int]) -> str:
    return "was" if len(steps) == 1 else "were"


def _places(steps: Sequence[int]) -> str:
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first} to {last}"

"""Report what a run computed, stored, reused and missed, and what that saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from cachekit.amounts import macs, size, table
from cachekit.errors import CostError
from cachekit.interface.moment import Action
from cachekit.planning.assignments import Assignment
from cachekit.runs.record import Cost, Record


@dataclass(frozen=True)
class Count:
    """How often one policy took each action at one kind of site.

    Calls of modules are counted, and calls of the denoiser for guidance. What is `stored` was computed too, and is not
    counted under `computed`. A `missed` reuse found nothing kept; it is counted as `stored`.
    """

    policy: str
    kind: str
    #: How many places of this kind the policy acts on.
    targets: int
    computed: int
    stored: int
    reused: int
    missed: int

    @property
    def ran(self) -> int:
        """How often the sites were computed, whether that was kept or not."""
        return self.computed + self.stored

    def __str__(self) -> str:
        """Format the counts as a line of a report."""
        missed = f", missed {self.missed}" if self.missed else ""
        ran = f"ran {self.ran} times, {self.stored} of them kept"
        return f"{self.policy} {self.kind} x {self.targets}: {ran}, reused {self.reused}{missed}"


class Report:
    """Figures of one run; `str(report)` is a summary.

        report = attachment.report()
        print(report.mac_reduction, report.speedup, report.warnings)

    MACs are counted when they are first asked for, by repeating the run's distinct calls on the meta device.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        record: Record,
        cost: Callable[[Record], Cost],
        uncached: Callable[[Record], float | None],
    ) -> None:
        """Report on `record`; on demand, `cost` counts its MACs and `uncached` finds the seconds of a like run."""
        self.record = record
        self._assignments = assignments
        self._cost = cost
        self._uncached = uncached
        #: Reports of runs that ended before this one in the same call of a pipeline, such as a prior's.
        self.earlier: tuple[Report, ...] = ()

    @property
    def steps(self) -> int:
        """Steps that the run reached."""
        return len(self.record.rows)

    @property
    def calls(self) -> int:
        """Calls of the denoiser that ran."""
        return sum(not call.dropped and not call.left_out for call in self.record.calls)

    @property
    def left_out(self) -> int:
        """Calls of the denoiser that did not run, because their output was predicted."""
        return sum(call.left_out for call in self.record.calls)

    @property
    def policies(self) -> list[str]:
        """Names of the policies."""
        return list(dict.fromkeys(bound.policy.name for bound in self._assignments))

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers and texts among the arguments of the pipeline's call; empty for a bare loop."""
        return self.record.arguments

    @property
    def cache_bytes(self) -> int:
        """Most bytes kept at once for reuse: what `max_cache_bytes` limits and estimates predict."""
        return self.record.peak_bytes

    @property
    def memory_bytes(self) -> int:
        """Most bytes of tensors that policies held at once to decide by, in the memories of a `Moment`.

        They are not part of `cache_bytes`: the limit doesn't apply to them, and estimates don't have them.
        """
        return self.record.memory_bytes

    @property
    def seconds(self) -> float:
        """Wall time from the first call of the denoiser to the end of the pipeline's call, decoding included.

        Of a bare loop, or a run that has not ended, it is the time to the end of the last call so far.
        """
        return self.record.seconds

    @property
    def speedup(self) -> float | None:
        """Seconds of a like uncached run over those of this run; None where there was none.

        Uncached are runs within `attachment.using([])`: of those with the same pipeline, shapes, steps and device as
        this one, the fastest counts.
        """
        uncached = None if self.record.interrupted else self._uncached(self.record)
        return uncached / self.seconds if uncached and self.seconds else None

    @property
    def deciding_seconds(self) -> float:
        """Seconds spent in reading arguments, finding steps, composing rows, recording and observing."""
        return self.record.deciding_seconds

    @property
    def traces(self) -> dict[str, list[Any]]:
        """What observing policies recorded, by name of the policy."""
        return self.record.traces

    @cached_property
    def cost(self) -> Cost:
        """MACs of the run, and of the same calls without policies.

        Raises `CostError` where the denoiser doesn't run on the meta device.
        """
        return self._cost(self.record)

    @property
    def macs(self) -> int:
        """MACs of the Linear and convolution layers that ran."""
        return self.cost.macs

    @property
    def baseline_macs(self) -> int:
        """MACs of the same calls without policies."""
        return self.cost.baseline_macs

    @property
    def mac_reduction(self) -> float:
        """MACs without policies, over those of the run."""
        return self.cost.mac_reduction

    @property
    def counts(self) -> list[Count]:
        """Counts of actions by policy and kind of site."""
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
        """A line for each policy that never reused anything, that calls for caution, or lost what it kept."""
        reused: dict[str, int] = defaultdict(int)
        for count in (count for report in (*self.earlier, self) for count in report.counts):
            reused[count.policy] += count.reused
        acting = {str(bound.policy) for bound in self._assignments if not bound.choice.what.watches}
        idle = (policy for policy, total in reused.items() if not total and policy in acting)
        never = [f"{policy} never fired in this run of {self.steps} {self._guided} steps" for policy in idle]
        policies = dict.fromkeys(bound.policy for bound in self._assignments)
        cautions = (policy.caution for policy in policies if str(policy) in reused and reused[str(policy)])
        return [*never, *filter(None, cautions), *self._discarded()]

    def _discarded(self) -> Iterator[str]:
        places: dict[tuple[str, str], list[int]] = defaultdict(list)
        for policy, step, reason in self.record.discarded:
            places[policy, reason].append(step)
        for (policy, reason), steps in places.items():
            outputs, were = ("1 output", "was") if len(steps) == 1 else (f"{len(steps)} outputs", "were")
            yield f"{policy}: {outputs} at {_range(steps)} {were} {reason} and {were} not kept: computed instead"
        if self.record.not_finite:
            names, step = " + ".join(self.record.not_finite[0]), self.record.not_finite[1]
            yield f"{names}: NaN or inf first came at step {step}, of which parts were predicted; use another stand-in"

    @property
    def _omitted(self) -> str:
        return f" and {self.left_out} left out" if self.left_out else ""

    @property
    def _held(self) -> str:
        return f" and {size(self.memory_bytes)} to decide by" if self.memory_bytes else ""

    @property
    def _guided(self) -> str:
        return "guided" if self.record.guided else "unguided"

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """Spec and target's name of each place that `max_cache_bytes` left uncached."""
        indices = sorted(self.record.fit.dropped) if self.record.fit else []
        return [(str(self._assignments[i].policy), self._assignments[i].target.name) for i in indices]

    @property
    def needed_bytes(self) -> int:
        """Most bytes that the run would have kept at once without `max_cache_bytes`, as planned."""
        fit = self.record.fit
        return fit.needed if fit and fit.needed else self.cache_bytes

    def _budget_lines(self) -> list[str]:
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for index in self.record.fit.dropped if self.record.fit else ():
            counts[str(self._assignments[index].policy), str(self._assignments[index].target.kind)] += 1
        if not counts:
            return []
        dropped = ", ".join(f"{policy} {kind} x {count}" for (policy, kind), count in sorted(counts.items()))
        return [f"without the limit {size(self.needed_bytes)}; computed to save bytes: {dropped}"]

    def _cost_line(self) -> str:
        try:
            cost = self.cost
        except CostError as error:
            return f"MACs unknown: {error}"
        return f"{macs(cost.macs)} of {macs(cost.baseline_macs)}, {cost.mac_reduction:.2f}x MAC reduction"

    @property
    def _time(self) -> str:
        faster = "" if self.speedup is None else f", {self.speedup:.2f}x as fast as uncached"
        return f"{self.seconds:.3g} s{faster}"

    def to_dict(self) -> dict[str, Any]:
        """Collect all figures as plain values, for JSON.

        MACs, and what is made of them, are None where they can't be counted, and so is a speedup that isn't known.
        """
        try:
            cost: Cost | None = self.cost
        except CostError:
            cost = None
        names = ("macs", "baseline_macs", "mac_reduction")
        return {
            "specs": list(dict.fromkeys(str(bound.policy) for bound in self._assignments)),
            **{name: getattr(self, name) for name in _FIGURES},
            "guided": self.record.guided,
            "interrupted": self.record.interrupted,
            **{name: None if cost is None else getattr(cost, name) for name in names},
            "counts": [asdict(count) for count in self.counts],
            "dropped": [list(place) for place in self.dropped],
            "warnings": self.warnings,
            "arguments": _plain(self.arguments),
            "traces": _plain(self.traces),
            "earlier": [report.to_dict() for report in self.earlier],
        }

    def __repr__(self) -> str:
        """Summarise the run in a line, without counting MACs."""
        policies = " + ".join(self.policies) or "no policy"
        return f"<Report: {policies}, {self.steps} steps, {self.calls} denoiser calls{self._omitted}, {self._time}>"

    def _repr_html_(self) -> str:
        """Write the figures as tables, for notebooks."""
        rows = [
            ("steps", f"{self.steps}, {self._guided}"),
            ("denoiser calls", f"{self.calls}{self._omitted}"),
            ("time", self._time),
            ("MACs", self._cost_line()),
            ("kept at peak", f"{size(self.cache_bytes)}{self._held}"),
            *(("warning", warning) for warning in self.warnings),
        ]
        counts = [(it.policy, it.kind, it.targets, it.ran, it.stored, it.reused, it.missed) for it in self.counts]
        header = ("policy", "kind", "places", "ran", "of them kept", "reused", "missed")
        own = [table(rows), table(counts, header)] if counts else [table(rows)]
        return "\n".join([*(report._repr_html_() for report in self.earlier), *own])

    def __str__(self) -> str:
        """Summarise the run, with the reports of `earlier` runs first."""
        lines = [line for report in self.earlier for line in (str(report), "")]
        lines += [
            f"steps {self.steps}, denoiser calls {self.calls}{self._omitted}, {self._guided}",
            self._cost_line(),
            f"{self._time}, of which deciding {self.deciding_seconds * 1e3:.1f} ms",
            f"kept at peak {size(self.cache_bytes)}{self._held}",
        ]
        lines += self._budget_lines()
        if self.record.shortened:
            lines.append(
                f"ControlNet: {self.record.shortened} calls skipped outputs that the denoiser would have discarded"
            )
        lines += map(str, self.counts)
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


#: Figures of a report that are plain values.
_FIGURES = ("steps", "calls", "left_out", "seconds", "speedup", "deciding_seconds", "cache_bytes", "memory_bytes")


def _plain(value: Any) -> Any:
    """Make what JSON can hold of a value; anything unknown becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _range(steps: Sequence[int]) -> str:
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first} to {last}"
